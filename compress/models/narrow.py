"""Cutting widths: the tensors of a model with only some of its channels, neurons and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import StageFailed
from compress.models.anatomy import is_buffer
from compress.models.axes import Dimension, Place, indices, places, sizes_of
from compress.models.parts import Parts

Indices = Sequence[int]


@dataclass(frozen=True)
class Kept:
    """What stays, sorted; a dimension that is not named stays whole.

    hidden: channels of the residual stream. layers: one mapping a layer, of its own dimensions.
    """

    layers: Sequence[Mapping[Dimension, Indices]]
    hidden: Indices | None = None

    def of(self, layer: int | None) -> dict[Dimension, Indices]:
        """What stays in a layer, or outside of any."""
        everywhere: dict[Dimension, Indices] = {} if self.hidden is None else {"hidden": self.hidden}
        return everywhere if layer is None else {**everywhere, **self.layers[layer]}


def explained(parts: Parts, where: str) -> dict[str, Place]:
    """The place of every tensor of a model. Raises StageFailed, naming them, where some have none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(parts.model).items()}
    known, unknown = places(parts.shape, parts.prefix, shapes)
    if unknown:
        some = "; ".join(f"{name} {why}" for name, why in sorted(unknown.items())[:3])
        raise StageFailed(where, f"{len(unknown)} tensors can't be cut along: {some}", "nothing was cut: widths stay")
    return known


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name, tied ones under each of their names."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_buffer(name)}


def narrow(parts: Parts, placed: Mapping[str, Place], kept: Kept) -> dict[str, Tensor]:
    """Copies of the model's weights with only what is `kept`."""
    return {
        name: _narrow(tensor.detach(), placed[name], parts, kept) for name, tensor in weights_of(parts.model).items()
    }


def _narrow(tensor: Tensor, place: Place, parts: Parts, kept: Kept) -> Tensor:
    sizes, stay = sizes_of(parts.shape, place.layer), kept.of(place.layer)
    for dim, axis in enumerate(place.axes):
        index = indices(axis, sizes, stay)
        if index is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(index))
    return tensor.clone()
