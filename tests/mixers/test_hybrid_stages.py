"""A converted model goes through the other stages as any model does."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.artifact import Artifact
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.pipeline.file import load_pipeline
from compress.quant.qtensor import QTensor
from compress.quant.store import load_quantized_model, read_quantized
from compress.runner.record import State
from compress.runner.run import run_pipeline
from compress.stage import Reporter, StageContext, Target
from compress.stages.prune.layers import PruneLayers
from compress.stages.quantize.stage import Quantize
from pico import VOCAB_SIZE, make_hybrid, make_pico

sys.path.insert(0, str(Path(__file__).parents[1] / "stages/distill"))

from launched import distil

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.arange(1, 25).view(2, 12)


class RandomText:
    """Stands in for a pipeline's text."""

    def blocks(self, split: str, tokenizer: object, sequence_length: int, max_tokens: int) -> np.ndarray[Any, Any]:
        shape = (max_tokens // sequence_length, sequence_length)
        return np.random.default_rng(0).integers(0, VOCAB_SIZE, shape)


def run(stage: Any, folder: Path, out: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    inputs = {"input": Artifact(folder, "torch", "source", "key")}
    reporter = Reporter(logging.getLogger("test"))
    return dict(stage.run(StageContext(out, out, inputs, RandomText(), 0, Target(), reporter))["result"])  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


class Skip(nn.Module):
    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pico model with the layers mamba2, a window of 8, gated-delta and linear."""

    @cache
    def folder(model_type: str) -> Path:
        types = ("linear_attention", "sliding_attention", "linear_attention", "linear_attention")
        return make_hybrid(model_type, tmp_path_factory.mktemp("hybrid"), layer_types=types, sliding_window=8)

    return folder


@pytest.mark.parametrize(("model_type", "options"), [
    *((model_type, {"drop": [0, 2]}) for model_type in MODEL_TYPES),
    ("llama", {"drop": 2, "by": "leave-one-out"}), ("llama", {"keep": 2}),
], ids=str)  # fmt: skip
def test_dropped_layers_take_their_mixers_along(
    model_type: str, options: dict[str, Any], hybrid: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = hybrid(model_type)
    stage = PruneLayers.model_validate({"tokens": 128, "sequence_length": 32, **options})
    run(stage, folder, tmp_path)
    dropped = json.loads((tmp_path / "scores.json").read_text())["dropped"]
    full, pruned = load_model(folder), load_model(tmp_path)
    kept = [index for index in range(4) if index not in dropped]
    assert pruned.config.layer_types == [full.config.layer_types[index] for index in kept]
    assert pruned.config.mixers == [full.config.mixers[index] for index in kept]
    parts = Parts(full)
    parts.replace_layers([layer if index in kept else Skip() for index, layer in enumerate(parts.layers)])
    torch.testing.assert_close(logits(pruned), logits(full))
    shape = stage.shape(parts.shape)
    assert shape.num_hidden_layers == len(shape.mixers) == len(shape.layer_types) == 2
    assert shape.layers_guessed == isinstance(options.get("drop", options.get("keep")), int)
    assert shape.layers_guessed or shape == Parts(pruned).shape
    assert torch.equal(greedy(pruned, use_cache=True), greedy(pruned, use_cache=False))


@pytest.mark.parametrize(("model_type", "options"), [
    *((model_type, {"scheme": "w4-block32", "method": "gptq"}) for model_type in MODEL_TYPES),
    ("llama", {"scheme": "w8a8-dynamic", "method": "search", "reduce_range": False}),
], ids=str)  # fmt: skip
def test_projections_are_quantised_and_the_rest_stays_float(
    model_type: str, options: dict[str, Any], hybrid: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = hybrid(model_type)
    run(Quantize(tokens=256, sequence_length=32, **options), folder, tmp_path)
    config, tensors = read_quantized(tmp_path)
    assert "auto_map" not in config
    codes = {name for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    attention = {f"self_attn.{leaf}_proj.weight" for leaf in "qkvo"}
    mlp = {f"mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    for index, rates in enumerate((("dt", "g"), (), ("a", "b", "g"), ())):
        of_layer = {name.split(".", 3)[3] for name in codes if name.startswith(f"model.layers.{index}.")}
        assert of_layer == attention | mlp | {f"self_attn.{leaf}_proj.weight" for leaf in rates}
    new = {f"model.layers.0.self_attn.{name}" for name in ("A", "conv.weight", "dt_proj.bias", "g_proj.bias")}
    assert new < set(tensors) - codes
    quantised, naive = load_quantized_model(tmp_path), load_model(folder)
    found, before = logits(quantised), logits(naive)
    naive.load_state_dict({name: dequantised(tensor) for name, tensor in tensors.items()}, strict=False)
    change = (found - before).square().sum() / before.square().sum()
    if options["scheme"] == "w8a8-dynamic":  # rounds activations too, over all tokens at hand
        assert change < 0.05
    else:
        assert change < 0.4
        torch.testing.assert_close(found, logits(naive), rtol=0, atol=1e-4)
        assert torch.equal(greedy(quantised, use_cache=True), greedy(quantised, use_cache=False))


def greedy(model: Any, use_cache: bool) -> torch.Tensor:
    result: torch.Tensor = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=use_cache)
    return result


def dequantised(tensor: QTensor | torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QTensor) else tensor


def test_it_is_distilled_towards_the_model_that_it_was(tmp_path: Path) -> None:
    teacher = make_pico("llama", tmp_path / "teacher")
    student = make_hybrid("llama", tmp_path / "student")
    metrics = distil(tmp_path, {"input": student, "teacher": teacher}, loss={"kl": 1.0, "hidden": 0.1})
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]
    before, after = load_model(student), load_model(tmp_path / "out")
    assert type(after) is type(before)
    moved = [name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))]
    new = {"feature_map_q.weight", "conv.weight", "A", "g_proj.weight"}
    assert new <= {name.split("self_attn.")[-1] for name in moved}
    assert all(weight.isfinite().all() for weight in after.parameters())


def test_a_pipeline_takes_a_converted_folder_as_its_model(hybrid: Callable[[str], Path], tmp_path: Path) -> None:
    content = {
        "name": "hybrid", "model": str(hybrid("llama")), "data": {"train": "python-docs"},
        "stages": [{"prune-layers": {"keep": [0, 1, 3]}}, {"quantize": {"method": "rtn"}}],
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(json.dumps(content))
    record = run_pipeline(load_pipeline(tmp_path / "pipeline.yaml"), runs=tmp_path / "runs", reporter=Reporter())
    assert record.state is State.DONE
    parameters = [stage.metrics["result"]["parameters"] for stage in record.stages]
    assert parameters[0] == parameters[1] < sum(weight.numel() for weight in load_model(hybrid("llama")).parameters())
