"""What calibration sees is what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.calibrate import LayerWalk, Moments
from compress.quant.options import QuantizeOptions
from pico import MODEL_TYPES, VOCAB_SIZE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_walking_the_layers_is_running_the_model(model_type: str, pico: Callable[[str], Path]) -> None:
    parts = Parts(load_model(pico(model_type)))
    ids_BT = torch.randint(0, VOCAB_SIZE, (5, 16), generator=torch.Generator().manual_seed(0))
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def record(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen[module] = args[0].reshape(-1, args[0].shape[-1])

    last = [module for _, module in parts.projections(parts.layers[-1])]
    handles = [module.register_forward_pre_hook(record) for module in last]
    with torch.no_grad():
        parts.model(ids_BT)
    for handle in handles:
        handle.remove()

    walk, moments = LayerWalk(parts, ids_BT, batch_size=2), Moments()  # the fifth row is a batch of its own
    for index in range(len(parts.layers) - 1):
        walk.step(index)
    with moments.watching(last):
        walk.step(len(parts.layers) - 1)
    for module, x_RK in seen.items():
        torch.testing.assert_close(moments[module], x_RK.T @ x_RK / len(x_RK), rtol=1e-4, atol=1e-5)


def test_projections_of_one_input_share_a_moment(pico: Callable[[str], Path]) -> None:
    parts = Parts(load_model(pico("llama")))
    named = {module: path.rpartition(".")[2] for path, module in parts.projections(parts.layers[0])}
    moments = Moments()
    with moments.watching(list(named)):
        LayerWalk(parts, torch.zeros(1, 8, dtype=torch.int64)).step(0)
    groups = [[named[module] for module in group] for group in moments.groups()]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_looking_at_a_layer_leaves_the_text_before_it(pico: Callable[[str], Path]) -> None:
    walk = LayerWalk(Parts(load_model(pico("llama"))), torch.arange(32).reshape(2, 16))
    before = [hidden_BTD.clone() for hidden_BTD in walk.hidden]
    walk.look(0)
    assert all(map(torch.equal, walk.hidden, before))
    walk.step(0)
    assert not any(map(torch.equal, walk.hidden, before))


def test_infinite_activations_are_refused_by_layer(pico: Callable[[str], Path]) -> None:
    parts = Parts(load_model(pico("gpt2")))
    with torch.no_grad():
        parts.layers[1].get_submodule("mlp.c_proj").bias[3] = float("inf")
    walk = LayerWalk(parts, torch.arange(32).reshape(2, 16))
    walk.step(0)
    with pytest.raises(CompressError, match=r"transformer\.h\.1: gives NaN or infinite activations"):
        walk.step(1)


def test_text_is_asked_for_where_the_options_need_it(pico: Callable[[str], Path]) -> None:
    parts = Parts(load_model(pico("llama")))
    with pytest.raises(CompressError, match="w8a8-static by these options is fitted on text"):
        quantize_model(parts, QuantizeOptions(scheme="w8a8-static", method="rtn", exceptions={}))
