"""`prune-groups`: the narrower model is the full one with what it lost masked, whatever the family and the group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compress.errors import Problem
from compress.models.anatomy import shape_of
from compress.models.axes import indices, sizes_of
from compress.models.load import load_model
from compress.models.narrow import Kept, explained, narrow, weights_of
from compress.models.parts import Parts
from compress.stages.prune.groups import PruneGroups
from compress.stages.prune.importance import at_random
from compress.stages.prune.narrowing import num_parameters, rebuilt
from compress.stages.prune.selection import choose
from compress.stages.prune.widths import layer_widths
from pico import MODEL_TYPES, VOCAB_SIZE, make_pico

IDS = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
GROUPED = ("llama", "mistral", "qwen2", "qwen3")
KEEP: dict[str, dict[str, int]] = {
    "intermediate": {"intermediate": 40},
    "hidden": {"hidden": 48},
    "attention-heads": {"attention-heads": 2},
    "kv-groups": {"kv-groups": 1},
    "all": {"intermediate": 72, "hidden": 32, "attention-heads": 2},
}


class OverKept(nn.Module):
    """A norm over the channels that stay, given all of them."""

    def __init__(self, norm: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept
        for parameter in norm.parameters():
            parameter.data = parameter.data[kept]
        if isinstance(norm, nn.LayerNorm):
            norm.normalized_shape = (len(kept),)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., self.kept] = self.norm(x[..., self.kept])
        return out


def masked(model: Any, kept: Kept) -> Any:
    """`model` with every weight zero that goes, and its norms over the channels that stay."""
    parts = Parts(model)
    for name, place in explained(parts, "test").items():
        tensor = weights_of(model)[name]
        for dim, axis in enumerate(place.axes):
            index = indices(axis, sizes_of(parts.shape, place.layer), kept.of(place.layer))
            if index is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[index] = False
                tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    if kept.hidden is not None:
        for path, module in [*model.named_modules()]:
            if type(module).__name__.endswith(("Norm", "RMSNorm")) and _width(module) == parts.shape.hidden_size:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, OverKept(module, list(kept.hidden)))
    return model


def _width(norm: nn.Module) -> int:
    return cast(Tensor, norm.weight).shape[0]


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(IDS)
    return cast(Tensor, result.logits if "logits" in result else result.last_hidden_state)


def cut(model: Any, keep: Mapping[str, int]) -> tuple[Any, Kept]:
    parts = Parts(model)
    widths = [layer_widths(keep, parts.shape, layer) for layer in range(parts.shape.num_hidden_layers)]  # type: ignore
    kept = choose(at_random(parts, 0), parts.shape, widths)
    placed = explained(parts, "test")
    smaller = rebuilt(parts, narrow(parts, placed, kept), widths)
    assert sum(parameter.numel() for parameter in smaller.parameters()) == num_parameters(parts, placed, widths)
    return smaller, kept


@pytest.mark.parametrize("kind", KEEP)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_narrower_model_is_the_masked_one(model_type: str, kind: str, tmp_path: Path) -> None:
    make_pico(model_type, tmp_path)
    keep = KEEP[kind]
    smaller, kept = cut(load_model(tmp_path), keep)
    full = outputs(load_model(tmp_path))
    ours, theirs = outputs(smaller), outputs(masked(load_model(tmp_path), kept))
    if theirs.shape != ours.shape:
        theirs = theirs[..., list(kept.hidden or ())]
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())
    assert ours.shape != full.shape or (ours - full).abs().max() > 0.01
