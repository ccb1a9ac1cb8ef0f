"""A conversion holds one copy of what it does not need twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.mixers.spec import SPECS
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stages.convert import init
from compress.stages.convert.init import new_mixers, with_mixers


def places(module: nn.Module) -> set[int]:
    """Where in memory its weights lie."""
    return {weight.data_ptr() for weight in module.parameters()}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "bert"])
def test_new_mixers_are_all_that_is_made(
    model_type: str, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have weights of their own, which are those of the whole hybrid; that is not made for them."""
    model = load_model(pico(model_type))
    whole = Parts(init.converted(model, [1, 3], SPECS["linear"]))
    monkeypatch.setattr(init, "to_hybrid", None)
    mixers = new_mixers(model, [1, 3], SPECS["linear"])
    assert list(mixers) == [1, 3]
    for index, mixer in mixers.items():
        expected = whole.attention(whole.layers[index]).state_dict()
        assert expected.keys() == mixer.state_dict().keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in mixer.state_dict().items())
        assert not places(mixer) & places(model)
        assert not any(weight.is_meta for weight in (*mixer.parameters(), *mixer.buffers()))
        assert all(weight.requires_grad for weight in mixer.parameters())


@pytest.mark.parametrize("own_weights", [True, False])
def test_a_model_that_does_not_teach_hands_its_weights_on(own_weights: bool, pico: Callable[[str], Path]) -> None:
    model = load_model(pico("llama"))
    mixers = new_mixers(model, [1], SPECS["linear"])
    hybrid = with_mixers(model, mixers, [1], SPECS["linear"], own_weights=own_weights)
    shared = places(model.model.layers[0].mlp) & places(hybrid)
    assert shared == (set() if own_weights else places(model.model.layers[0].mlp))
