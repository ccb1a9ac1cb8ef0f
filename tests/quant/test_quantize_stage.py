"""`quantize` on pico models of every family: what is stored is what computes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compress.artifact import Artifact
from compress.errors import CompressError, InvalidInput
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.pipeline.file import load_pipeline
from compress.pipeline.graph import resolve
from compress.quant.qtensor import QTensor
from compress.quant.store import load_quantized_model, read_quantized
from compress.stage import Reporter, StageContext, Target
from compress.stages.quantize.stage import Quantize
from pico import MODEL_TYPES, VOCAB_SIZE, make_pico

Pico = Callable[[str], Path]
SMALL: dict[str, Any] = {"tokens": 256, "sequence_length": 32}
SILENT = Reporter(logging.getLogger("test"))


class RandomText:
    """Stands in for a pipeline's text."""

    def blocks(self, split: str, tokenizer: object, sequence_length: int, max_tokens: int) -> np.ndarray[Any, Any]:
        assert split == "train"
        shape = (max_tokens // sequence_length, sequence_length)
        return np.random.default_rng(0).integers(0, VOCAB_SIZE, shape)


def quantize(folder: Path, out: Path, **options: Any) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    source = Artifact(folder, "torch", "source", "key")
    context = StageContext(out, out / "work", {"input": source}, RandomText(), 0, Target(), SILENT)  # type: ignore[arg-type]
    return dict(Quantize(**{**SMALL, **options}).run(context)["result"])


def logits(model: torch.nn.Module, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        result: torch.Tensor = model(ids)[0]
    return result


def change(folder: Path, quantised: Path) -> float:
    """The relative mean square change of the output."""
    before, after = logits(load_model(folder)), logits(load_quantized_model(quantised))
    return ((after - before).square().sum() / before.square().sum()).item()


@pytest.mark.parametrize("scheme", ["w4-block32", "w8a8-dynamic"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_reloads_to_what_was_stored(model_type: str, scheme: str, pico: Pico, tmp_path: Path) -> None:
    figures = quantize(pico(model_type), tmp_path / "q", scheme=scheme, method="search", reduce_range=False) \
        if scheme == "w8a8-dynamic" else quantize(pico(model_type), tmp_path / "q")  # fmt: skip
    config, tensors = read_quantized(tmp_path / "q")
    quantised = {name for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    shape = shape_of(config)
    num_projections = len([name for name in quantised if name.split(".")[-2] != "lm_head" and ".0." in name])
    num_tables = 1 if shape.tie_word_embeddings or shape.family.kind == "encoder" else 2
    assert len(quantised) == num_projections * shape.num_hidden_layers + num_tables
    assert change(pico(model_type), tmp_path / "q") < (0.3 if scheme == "w4-block32" else 0.01)
    assert figures["bits_per_weight"] == pytest.approx(5.0) or scheme == "w8a8-dynamic"
    # naive: the float model with the stored weights written back computes the same where activations are not rounded
    if scheme == "w4-block32":
        naive = load_model(pico(model_type))
        with torch.no_grad():
            for name, parameter in naive.named_parameters():
                stored = tensors.get(name)
                if isinstance(stored, QTensor):
                    parameter.copy_(stored.dequantize().T if _is_conv1d(naive, name) else stored.dequantize())
        torch.testing.assert_close(logits(load_quantized_model(tmp_path / "q")), logits(naive), rtol=1e-5, atol=1e-5)
    original = json.loads((pico(model_type) / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == original
    assert (tmp_path / "q" / "LICENSE").is_file()
    assert (tmp_path / "q" / "errors.png").stat().st_size > 1000


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "errors.json").read_text()))


def _is_conv1d(model: torch.nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


def test_a_tied_table_is_stored_once(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", method="rtn")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert [name for name in stored if "lm_head" in name] == []
    assert stored["model.embed_tokens.weight.codes"].shape == (VOCAB_SIZE, 2, 16)
    model: Any = load_quantized_model(tmp_path / "q")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_masked_language_model_and_a_classifier(tmp_path: Path) -> None:
    for architecture in ("BertForMaskedLM", "BertForSequenceClassification"):
        folder = make_pico("bert", tmp_path / architecture, num_hidden_layers=2, architecture=architecture)
        quantize(folder, tmp_path / f"{architecture}-q")
        assert change(folder, tmp_path / f"{architecture}-q") < 0.3


def test_rows_that_do_not_fill_their_last_block(tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "odd", num_hidden_layers=2, hidden_size=80, intermediate_size=112)
    quantize(folder, tmp_path / "q")
    config, tensors = read_quantized(tmp_path / "q")
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(down, QTensor)
    assert down.shape == (80, 112)
    assert config["quantization_config"]["tensors"]["model.layers.0.mlp.down_proj.weight"] == {"in_features": 112}
    embedding = tensors["model.embed_tokens.weight"]
    assert isinstance(embedding, QTensor)
    assert embedding.scheme.name == "w4-block16", "80 can't be gathered by blocks of 32"
    assert change(folder, tmp_path / "q") < 0.2


def test_each_search_lowers_the_error_of_the_one_before(pico: Pico, tmp_path: Path) -> None:
    def total(method: str, **options: Any) -> float:
        quantize(pico("gpt2"), tmp_path / method, method=method, **options)
        return sum(value for name, value in report(tmp_path / method)["errors"].items() if ".h." in name)

    searched = total("search")
    assert total("gptq") < 0.8 * searched
    assert searched < 0.9 * total("rtn", scaling="awq")  # which is the only one of these to need text for "rtn"


def outlier_model(folder: Path) -> Path:
    """A pico model with one projection whose output is a hundredfold in one channel, and another that reads it."""
    make_pico("llama", folder, num_hidden_layers=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] *= 300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static"])
def test_projections_with_outliers_keep_their_activations(scheme: str, tmp_path: Path) -> None:
    folder = outlier_model(tmp_path / "outliers")
    name = "model.layers.1.mlp.down_proj.weight"
    bits = {"reduce_range": False}  # with 7, the weights' own rounding would be most of the change
    quantize(folder, tmp_path / "auto", scheme=scheme, method="rtn", **bits)
    assert report(tmp_path / "auto")["spared"] == ["model.layers.1.mlp.up_proj.weight", name]
    _, tensors = read_quantized(tmp_path / "auto")
    spared = tensors[name]
    assert isinstance(spared, QTensor)
    assert spared.scheme.name == "w8-block32"
    quantize(folder, tmp_path / "all", scheme=scheme, method="rtn", exceptions={}, **bits)
    assert change(folder, tmp_path / "auto") < 0.5 * change(folder, tmp_path / "all")
    assert report(tmp_path / "all")["spared"] == []


def test_mixed_precision_by_path(pico: Pico, tmp_path: Path) -> None:
    exceptions = {"down_proj": "w8-block32", "layers.0.mlp.*": "float32", "model.layers.1.self_attn.?_proj": "ternary"}
    quantize(pico("mistral"), tmp_path / "q", method="rtn", symmetric=False, exceptions=exceptions,
             embeddings="float32", head="w8-block64")  # fmt: skip
    _, tensors = read_quantized(tmp_path / "q")

    def scheme(name: str) -> str:
        tensor = tensors[f"{name}.weight"]
        return tensor.scheme.name if isinstance(tensor, QTensor) else "float32"

    assert scheme("model.layers.1.mlp.down_proj") == "w8-block32"
    assert scheme("model.layers.0.mlp.down_proj") == "float32", "of two that match the longer counts"
    assert scheme("model.layers.0.mlp.up_proj") == "float32"
    assert scheme("model.layers.1.self_attn.q_proj") == "ternary"
    assert scheme("model.layers.0.self_attn.q_proj") == scheme("model.layers.3.mlp.gate_proj") == "w4-block32"
    assert (scheme("model.embed_tokens"), scheme("lm_head")) == ("float32", "w8-block64")
    plain, zeroed = tensors["model.layers.1.self_attn.q_proj.weight"], tensors["lm_head.weight"]
    assert isinstance(plain, QTensor)
    assert isinstance(zeroed, QTensor)
    assert plain.zero_point is None
    assert zeroed.zero_point is not None
    naive = load_model(pico("mistral"))
    with torch.no_grad():
        for name, parameter in naive.named_parameters():
            stored = tensors[name]
            parameter.copy_(stored.dequantize() if isinstance(stored, QTensor) else stored)
    torch.testing.assert_close(logits(load_quantized_model(tmp_path / "q")), logits(naive), rtol=1e-5, atol=1e-5)


def test_the_order_of_exceptions_does_not_matter() -> None:
    one = Quantize(exceptions={"layers.0.*": "float32", "down_proj": "w8-block32"})
    other = Quantize(exceptions={"down_proj": "w8-block32", "layers.0.*": "float32"})
    for options in (one, other):
        assert options.choice.of("model.layers.0.mlp.down_proj.weight", "projection") is None


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_static_ranges_are_shared_and_stored(ranges: str, pico: Pico, tmp_path: Path) -> None:
    quantize(pico("mistral"), tmp_path / "q", scheme="w8a8-static", ranges=ranges, reduce_range=False)
    _, tensors = read_quantized(tmp_path / "q")
    stored = {name.split(".", 2)[-1]: tensor for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    ranged = {name: tensor.input_range for name, tensor in stored.items() if tensor.scheme.static}
    assert len(ranged) == 4 * 7
    assert ranged["0.self_attn.q_proj.weight"] == ranged["0.self_attn.v_proj.weight"]
    assert ranged["0.self_attn.q_proj.weight"] != ranged["0.self_attn.o_proj.weight"]
    assert change(pico("mistral"), tmp_path / "q") < 0.01


def test_static_beside_other_schemes_of_the_same_input(pico: Pico, tmp_path: Path) -> None:
    exceptions = {"q_proj": "w8-block32", "mlp.gate_proj": "float32"}
    quantize(pico("llama"), tmp_path / "q", scheme="w8a8-static", method="rtn", exceptions=exceptions)
    _, tensors = read_quantized(tmp_path / "q")
    ranged = [name for name, t in tensors.items() if isinstance(t, QTensor) and t.input_range is not None]
    assert sorted({name.split(".")[-2] for name in ranged}) == ["down_proj", "k_proj", "o_proj", "up_proj", "v_proj"]


def test_activations_that_are_no_numbers_are_refused_by_layer(pico: Pico, tmp_path: Path) -> None:
    shutil.copytree(pico("llama"), tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0] = torch.finfo(torch.float32).max  # overflows
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.layers\.2: gives NaN or infinite activations"):
        quantize(tmp_path / "nan", tmp_path / "q")


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({}, {"train"}), ({"method": "rtn"}, set()), ({"method": "rtn", "scaling": "awq"}, {"train"}),
        ({"method": "rtn", "scheme": "w8a8-dynamic"}, {"train"}),
        ({"method": "rtn", "scheme": "w8a8-dynamic", "exceptions": {}}, set()),
        ({"method": "rtn", "scheme": "w8a8-static", "exceptions": {}}, {"train"}), ({"scheme": "bnb-nf4"}, set()),
    ],
)  # fmt: skip
def test_its_key_has_the_text_that_it_reads_and_no_other(
    options: dict[str, Any], splits: set[str], pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, blocks = set(), RandomText.blocks

    def noted(data: RandomText, split: str, *rest: Any) -> np.ndarray[Any, Any]:
        read.add(split)
        return blocks(data, split, *rest)

    monkeypatch.setattr(RandomText, "blocks", noted)
    quantize(pico("llama"), tmp_path / "q", **options)
    assert Quantize(**options).reads() == read == splits


def test_quantising_twice_names_the_stage_before(pico: Pico, tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    head = f"name: twice\nmodel: {pico('llama')}\n"
    file.write_text(f"{head}stages:\n  - quantize: {{}}\n  - quantize: {{scheme: w8a8-dynamic}}\n")
    with pytest.raises(InvalidInput, match="what 'quantize' hands on is quantized; leave out this or 'quant") as caught:
        resolve(load_pipeline(file), None)
    assert len(caught.value.problems) == 1


def test_reduced_range_is_stored_and_read(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", scheme="w8a8-dynamic", method="rtn", exceptions={}, reduce_range=True)
    config, tensors = read_quantized(tmp_path / "q")
    assert config["quantization_config"]["reduce_range"] is True
    projection = tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(projection, QTensor)
    assert projection.scheme.bits == 7
    assert projection.codes.abs().max() == 63


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",)])
def test_the_range_that_this_cpu_needs_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, flags: tuple[str]) -> None:
    from compress.quant import options

    monkeypatch.setattr(options, "this_machine", lambda: SimpleNamespace(flags=flags))
    assert Quantize(scheme="w8a8-dynamic").model_dump()["reduce_range"] is (not flags)
    assert Quantize(scheme="w8a8-dynamic", reduce_range=True).reduce_range is True
    assert Quantize().model_dump()["reduce_range"] == "auto", "4-bit weights are the same on every CPU"


def test_a_damaged_artifact_is_refused_in_words(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", method="rtn")
    weights = load_file(tmp_path / "q" / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    save_file(missing, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"missing_keys model\.norm\.weight"):
        load_quantized_model(tmp_path / "q")
    name = "model.layers.0.mlp.up_proj.weight.scales"
    save_file({**weights, name: weights[name][:, :1].contiguous()}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CompressError, match=r"up_proj\.weight: codes .* are no w4-block32"):
        read_quantized(tmp_path / "q")
    (tmp_path / "q" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CompressError, match="is no readable model"):
        read_quantized(tmp_path / "q")
    with pytest.raises(CompressError, match="names no scheme"):
        read_quantized(pico("llama"))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"reduce_range": True}, ["reduce_range"]),
        ({"ranges": "entropy"}, ["ranges"]),
        ({"exceptions": "auto"}, ["exceptions"]),
        ({"smoothing": 0.3}, ["smoothing"]),
        ({"method": "search", "act_order": True}, ["act_order"]),
        ({"method": "rtn", "tokens": 512}, ["tokens"]),
        ({"scheme": "ternary", "symmetric": False}, ["symmetric"]),
        ({"scaling": "smoothquant"}, ["scaling"]),
        ({"scheme": "w8a8-dynamic", "scaling": "awq"}, ["scaling"]),
        ({"exceptions": {"down_prj": "float32", "mlp.*": "float32"}}, ["exceptions"]),
        ({"head": "float32"}, ["head"]),
        ({"embeddings": "w4-block128"}, []),
        ({"embeddings": "w8a8-dynamic"}, ["embeddings"]),
        ({"sequence_length": 512, "tokens": 1024}, ["sequence_length"]),
        ({"tokens": 31, "sequence_length": 32}, ["tokens"]),
        ({"scheme": "w8a8-static", "tokens": 0, "method": "rtn", "exceptions": {}}, ["tokens"]),
        ({"reduce_range": True, "act_order": True, "method": "search", "tokens": 9},
         ["act_order", "reduce_range", "tokens"]),
    ],
)  # fmt: skip
def test_check_names_every_option_at_once(options: dict[str, Any], where: list[str], pico: Pico) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert [problem.where for problem in Quantize(**options).check(shape)] == where


def test_check_suggests_the_path_that_was_meant(pico: Pico) -> None:
    shape = shape_of(json.loads((pico("gpt2") / "config.json").read_text()))
    (problem,) = Quantize(exceptions={"atn.c_proj": "float32"}).check(shape)
    assert problem.fix == "did you mean 'attn.c_proj'?"


@pytest.mark.parametrize("options", [
    {}, {"exceptions": {"*": "float32"}},
    {"scheme": "w8a8-dynamic", "exceptions": {"mlp.down_proj": "w8-block32"}, **SMALL},
    {"scheme": "w8a8-static", "scaling": "smoothquant", "smoothing": 0.7, "ranges": "entropy", "reduce_range": True},
    {"scheme": "w4-block64", "scaling": "awq", "act_order": True, "symmetric": False, "embeddings": "w2-block32"},
    {"scheme": "w2-block16", "method": "rtn"},
], ids=str)  # fmt: skip
def test_check_accepts_what_fits(options: dict[str, Any], pico: Pico) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert list(Quantize(**options).check(shape)) == []


def test_a_block_size_that_does_not_run_is_told_from_a_misspelt_scheme() -> None:
    with pytest.raises(ValidationError, match="stored in blocks of 16, 32, 64, 128"):
        Quantize(scheme="w4-block48")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Input should be 'w4-block16'"):
        Quantize(exceptions={"down_proj": "w4_block32"})  # type: ignore[dict-item]


@pytest.mark.parametrize(("model_type", "options"), [
    ("mistral", {}), ("llama", {"scheme": "w8a8-dynamic", "exceptions": {}}), ("gpt2", {"scheme": "w4-block128"}),
    ("mistral", {"exceptions": {"mlp.*": "float32", "layers.0.*": "w8-block64"}, "head": "ternary"}),
    ("qwen3", {"scheme": "w2-block32", "symmetric": False, "embeddings": "float32"}),
], ids=str)  # fmt: skip
def test_the_estimate_is_the_size(model_type: str, options: dict[str, Any], pico: Pico, tmp_path: Path) -> None:
    shape = shape_of(json.loads((pico(model_type) / "config.json").read_text()))
    quantize(pico(model_type), tmp_path / "q", method="rtn", **options)
    stored = load_file(tmp_path / "q" / "model.safetensors").values()
    written = sum(tensor.nbytes for tensor in stored if tensor.dim() > 1)  # biases and norms are left out
    assert Quantize(**options).weight_bytes(shape, 0) == pytest.approx(written, rel=0.01)


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys; import compress.stages.quantize.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
