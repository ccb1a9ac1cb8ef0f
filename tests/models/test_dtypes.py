"""A folder keeps its source's type on disk wherever that holds the values exactly, and loses nothing in any case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exporting import export
from safetensors.torch import load_file

from compress.models.dtypes import as_stored, half_types
from compress.models.load import load_model, save_model
from compress.pipeline.check import valid_pipeline
from compress.quant.store import load_quantized_model
from compress.report.figures import figures_of
from compress.runner.estimate import estimate
from compress.runner.prepare import prepare
from compress.runner.run import run_pipeline
from compress.runner.twin import write_twin
from compress.stage import Reporter

Pico = Callable[[str], Path]
TYPES = ("bfloat16", "float16")


def halved(folder: Path, out: Path, dtype: str) -> Path:
    """A copy of a model that is stored in that type, as hubs have them."""
    import transformers

    model = load_model(folder)
    save_model(model, folder, out)
    plain: Any = transformers.AutoModel if "bert" in str(model.config.model_type) else transformers.AutoModelForCausalLM
    plain.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(out)
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def run(tmp_path: Path, model: Path, stages: list[Any]) -> dict[str, Path]:
    """Each stage's folder by its id."""
    file = tmp_path / "pipeline.yaml"
    document = {"name": "p", "model": str(model), "data": {"train": "python-docs"}, "stages": stages}
    file.write_text(yaml.safe_dump(document))
    record = run_pipeline(valid_pipeline(file), runs=tmp_path / "runs", reporter=Reporter())
    return {stage.id: tmp_path / "runs/p" / stage.directory for stage in record.stages}


TEXT = {"tokens": 512, "sequence_length": 64}
TRAINED = {**TEXT, "batch_size": 2, "eval_tokens": 256}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "stage",
    [
        {"prune-layers": {"drop": 1, "by": "uniform"}},
        {"prune-groups": {"keep": {"intermediate": 64, "hidden": 48}, "by": "magnitude"}},
        {"reduce-vocab": {"keep": 400, "tokens": 16384}},
    ],
    ids=lambda stage: next(iter(stage)),
)
def test_what_is_cut_out_keeps_its_type_and_its_values(
    pico: Pico, tmp_path: Path, dtype: str, stage: dict[str, Any]
) -> None:
    source = halved(pico("llama"), tmp_path / "source", dtype)
    (name,) = stage
    out = run(tmp_path, source, [stage])[name]
    weights = stored(out)
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}
    assert config(out)["dtype"] == dtype
    size = sum(tensor.nbytes for tensor in weights.values())
    assert size < sum(tensor.nbytes for tensor in stored(source).values())
    values = dict(load_model(out).named_parameters())
    assert all(torch.equal(values[key], tensor.float()) for key, tensor in weights.items())


def test_trained_weights_stay_float32(pico: Pico, tmp_path: Path) -> None:
    """Half of what a training did would be lost by rounding them."""
    source = halved(pico("llama"), tmp_path / "source", "bfloat16")
    distil = {"distill": {"teacher": "source", **TRAINED}}
    folders = run(tmp_path, source, [{"prune-layers": {"drop": 1, "by": "uniform"}}, distil])
    trained = stored(folders["distill"])
    assert {tensor.dtype for name, tensor in trained.items() if "proj" in name} == {torch.float32}
    assert config(folders["distill"])["dtype"] == "float32"


def test_a_converted_model_has_its_mixers_in_float32_and_its_other_weights_as_they_were(
    pico: Pico, tmp_path: Path
) -> None:
    source = halved(pico("llama"), tmp_path / "source", "bfloat16")
    convert = {"convert-attention": {"to": "gated-linear", "convert": [1], "align": TEXT, "distill": None}}
    out = run(tmp_path, source, [convert])["convert-attention"]
    weights, before = stored(out), stored(source)
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.float32 in {tensor.dtype for tensor in weights.values()}
    assert config(out)["dtype"] == "float32", "in which nothing is lost"


def test_plain_transformers_loses_nothing_of_a_model_of_two_types(pico: Pico, tmp_path: Path) -> None:
    import transformers

    source, out = halved(pico("llama"), tmp_path / "source", "bfloat16"), tmp_path / "out"
    model: Any = load_model(source)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    save_model(model, source, out)
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16, torch.float32}
    assert config(out)["dtype"] == "float32"
    plain: Any = transformers.AutoModelForCausalLM
    ids_BT, theirs = torch.arange(40)[None], plain.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, theirs(input_ids=ids_BT).logits)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_quantised_keeps_its_type_and_is_computed_in_float32(
    pico: Pico, tmp_path: Path, dtype: str
) -> None:
    source = halved(pico("llama"), tmp_path / "source", dtype)
    stage = {"quantize": {"method": "rtn", "embeddings": "float32"}}
    out = run(tmp_path, source, [stage])["quantize"]
    assert stored(out)["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert stored(out)["model.layers.0.mlp.up_proj.weight.scales"].dtype == torch.float32
    assert config(out)["dtype"] == dtype
    model = load_quantized_model(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert export(out, tmp_path / "onnx", "quantized")["parity_max_error"] < 1e-4


def test_a_model_in_float32_stays_one(pico: Pico, tmp_path: Path) -> None:
    save_model(load_model(pico("llama")), pico("llama"), tmp_path / "out")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.float32}
    assert half_types(pico("llama")) == ()


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "qwen3"])
def test_a_round_trip_changes_no_byte_of_a_weight(pico: Pico, tmp_path: Path, model_type: str) -> None:
    """Tied heads among them, which are stored once."""
    source = halved(pico(model_type), tmp_path / "source", "bfloat16")
    save_model(load_model(source), source, tmp_path / "out")
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(after[name], tensor)


def test_it_is_decided_by_the_values() -> None:
    exact, trained = torch.tensor([1.5, -2.0]), torch.tensor([1.0001, 2.0])
    found = as_stored({"a": exact, "b": trained, "tied": exact, "ids": torch.tensor([1])}, ["bfloat16"])
    assert [found[name].dtype for name in ("a", "b", "ids")] == [torch.bfloat16, torch.float32, torch.int64]
    assert found["a"] is found["tied"]


def test_estimates_follow(pico: Pico, tmp_path: Path) -> None:
    source = halved(pico("llama"), tmp_path / "source", "bfloat16")
    file, prune = tmp_path / "pipeline.yaml", {"prune-layers": {"drop": 1, "by": "uniform"}}
    quantize = {"quantize": {"method": "rtn", "embeddings": "float32"}}
    stages = [prune, {"export-onnx": {"id": "floats"}}, {"evaluate": TEXT}]
    for name, chain in {"plain": stages, "int4": [prune, quantize, "export-onnx"]}.items():
        document = {"name": name, "model": str(source), "data": {"train": "python-docs"}, "stages": chain}
        file.write_text(yaml.safe_dump(document))
        prepared = prepare(valid_pipeline(file), tmp_path / "runs" / name, Reporter())
        expected = {id: each.size_mb for id, each in estimate(prepared).items() if each.size_mb}
        record = run_pipeline(valid_pipeline(file), runs=tmp_path / "runs", reporter=Reporter(), twin=False)
        figures = figures_of(record)
        for id, size_mb in expected.items():
            assert figures[id]["size_mb"] == pytest.approx(size_mb, rel=0.2), id


def test_a_twin_is_stored_as_its_model_is(pico: Pico, tmp_path: Path) -> None:
    twin = write_twin(halved(pico("llama"), tmp_path / "source", "float16"), tmp_path / "twin")
    assert {tensor.dtype for tensor in stored(twin).values()} == {torch.float16}
