"""`quantize` on pico models of every family: what is stored is what computes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact import Artifact
from compress.errors import CompressError
from compress.models.anatomy import shape_of
from compress.models.load import load_model
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


@pytest.mark.parametrize("scheme", ["w4-block32", "w8-dynamic"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_reloads_to_what_was_stored(model_type: str, scheme: str, pico: Pico, tmp_path: Path) -> None:
    figures = quantize(pico(model_type), tmp_path / "q", scheme=scheme, search="output", reduce_range=False) \
        if scheme == "w8-dynamic" else quantize(pico(model_type), tmp_path / "q")  # fmt: skip
    config, tensors = read_quantized(tmp_path / "q")
    quantised = {name for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    shape = shape_of(config)
    num_projections = len([name for name in quantised if name.split(".")[-2] != "lm_head" and ".0." in name])
    num_tables = 1 if shape.tie_word_embeddings or shape.family.kind == "encoder" else 2
    assert len(quantised) == num_projections * shape.num_hidden_layers + num_tables
    assert change(pico(model_type), tmp_path / "q") < (0.3 if scheme == "w4-block32" else 0.01)
    assert figures["bits_per_weight"] == pytest.approx(5.0) or scheme == "w8-dynamic"
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


def _is_conv1d(model: torch.nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


def test_a_tied_table_is_stored_once(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", search="none")
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
    assert isinstance(tensors["model.embed_tokens.weight"], torch.Tensor)  # 80 can't be gathered by blocks of 32
    assert change(folder, tmp_path / "q") < 0.2


def test_each_search_lowers_the_error_of_the_one_before(pico: Pico, tmp_path: Path) -> None:
    def total(search: str) -> float:
        quantize(pico("gpt2"), tmp_path / search, search=search)
        errors: dict[str, float] = json.loads((tmp_path / search / "errors.json").read_text())["errors"]
        return sum(value for name, value in errors.items() if ".h." in name)

    assert total("output") < total("none")
    assert total("gptq") < 0.8 * total("output")


def outlier_model(folder: Path) -> Path:
    """A pico model with one projection whose input is a hundredfold in one channel."""
    make_pico("llama", folder, num_hidden_layers=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] *= 300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_projections_with_outliers_keep_their_activations(tmp_path: Path) -> None:
    folder = outlier_model(tmp_path / "outliers")
    name = "model.layers.1.mlp.down_proj.weight"
    quantize(folder, tmp_path / "auto", scheme="w8-dynamic", search="none")
    report = json.loads((tmp_path / "auto" / "errors.json").read_text())
    assert report["weight_only"] == [name]
    _, tensors = read_quantized(tmp_path / "auto")
    spared = tensors[name]
    assert isinstance(spared, QTensor)
    assert spared.scheme.name == "w8-block32"
    quantize(folder, tmp_path / "named", scheme="w8-dynamic", search="none", weight_only=["layers.1.mlp.down_proj"])
    assert json.loads((tmp_path / "named" / "errors.json").read_text())["weight_only"] == [name]
    quantize(folder, tmp_path / "all", scheme="w8-dynamic", search="none", weight_only=[])
    assert change(folder, tmp_path / "auto") < 0.5 * change(folder, tmp_path / "all")


def test_reduced_range_is_stored_and_read(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", scheme="w8-dynamic", search="none", weight_only=[], reduce_range=True)
    config, tensors = read_quantized(tmp_path / "q")
    assert config["quantization_config"]["reduce_range"] is True
    projection = tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(projection, QTensor)
    assert projection.scheme.bits == 7
    assert projection.codes.abs().max() == 63


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",)])
def test_the_range_that_this_cpu_needs_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, flags: tuple[str]) -> None:
    from compress.stages.quantize import stage

    monkeypatch.setattr(stage, "this_machine", lambda: SimpleNamespace(flags=flags))
    assert Quantize(scheme="w8-dynamic").model_dump()["reduce_range"] is (not flags)
    assert Quantize(scheme="w8-dynamic", reduce_range=True).reduce_range is True
    assert Quantize().model_dump()["reduce_range"] == "auto", "4-bit weights are the same on every CPU"


def test_a_damaged_artifact_is_refused_in_words(pico: Pico, tmp_path: Path) -> None:
    quantize(pico("llama"), tmp_path / "q", search="none")
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
        ({"weight_only": ["down_proj"]}, "weight_only"),
        ({"reduce_range": True}, "reduce_range"),
        ({"scheme": "w8-dynamic", "weight_only": ["up"]}, "weight_only"),
        ({"sequence_length": 512, "tokens": 1024}, "sequence_length"),
        ({"tokens": 31, "sequence_length": 32}, "tokens"),
    ],
)
def test_check_names_the_option(options: dict[str, Any], where: str, pico: Pico) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert [problem.where for problem in Quantize(**options).check(shape)] == [where]
    assert not list(Quantize().check(shape))
    assert not list(Quantize(scheme="w8-dynamic", weight_only=("mlp.down_proj",), **SMALL).check(shape))


def test_the_estimate_is_the_size(pico: Pico, tmp_path: Path) -> None:
    shape = shape_of(json.loads((pico("mistral") / "config.json").read_text()))
    for scheme in ("w4-block32", "w8-dynamic"):
        quantize(pico("mistral"), tmp_path / scheme, scheme=scheme, search="none", **(
            {"weight_only": []} if scheme == "w8-dynamic" else {}))  # fmt: skip
        written = sum(t.nbytes for t in load_file(tmp_path / scheme / "model.safetensors").values())
        assert Quantize(scheme=scheme).weight_bytes(shape, 0) == pytest.approx(written, rel=0.03)


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys; import compress.stages.quantize.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
