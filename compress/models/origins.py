"""Where the parts of a pruned model come from, as its `config.json` says, so that a teacher is compared part by part.

`origin_layers`: which layer of the source each one was, of `origin_num_hidden_layers`. `origin_channels`: which channel
of the source's residual stream each one was, of `origin_hidden_size`. `origin_heads`: for each layer, which query head
of the source's layer each one was, of `origin_num_attention_heads`. A model without these keys is its own source.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.models.anatomy import shape_of

LAYERS, CHANNELS, HEADS = "origin_layers", "origin_channels", "origin_heads"
NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS = "origin_num_hidden_layers", "origin_hidden_size", "origin_num_attention_heads"


@dataclass(frozen=True)
class Origins:
    """layers, channels, heads: indices into the source's, of which there are num_layers, hidden_size and num_heads."""

    num_layers: int
    hidden_size: int
    num_heads: int
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Origins:
        """What a parsed `config.json` says; a list that does not fit the model counts for nothing."""
        shape = shape_of(config)
        own_heads = [shape.of_layer(layer).num_attention_heads for layer in range(shape.num_hidden_layers)]
        layers = _indices(config.get(LAYERS), shape.num_hidden_layers)
        channels = _indices(config.get(CHANNELS), shape.hidden_size)
        said = config.get(HEADS)
        listed = said if isinstance(said, list) and len(said) == len(own_heads) else [None] * len(own_heads)
        heads = [_indices(each, number) for each, number in zip(listed, own_heads, strict=True)]
        has_heads = all(heads)
        return cls(
            int(config.get(NUM_LAYERS) or 0) if layers else shape.num_hidden_layers,
            int(config.get(HIDDEN_SIZE) or 0) if channels else shape.hidden_size,
            int(config.get(NUM_HEADS) or 0) if has_heads else shape.num_attention_heads,
            layers or tuple(range(shape.num_hidden_layers)), channels or tuple(range(shape.hidden_size)),
            tuple(heads if has_heads else (tuple(range(number)) for number in own_heads)),
        )  # fmt: skip

    def keys(self) -> dict[str, Any]:
        """What of it `config.json` has to say."""
        said: dict[str, Any] = {}
        if len(self.layers) < self.num_layers:
            said |= {LAYERS: list(self.layers), NUM_LAYERS: self.num_layers}
        if len(self.channels) < self.hidden_size:
            said |= {CHANNELS: list(self.channels), HIDDEN_SIZE: self.hidden_size}
        if any(list(own) != list(range(self.num_heads)) for own in self.heads):
            said |= {HEADS: [list(own) for own in self.heads], NUM_HEADS: self.num_heads}
        return said


def _indices(value: object, number: int) -> tuple[int, ...]:
    fits = isinstance(value, list) and len(value) == number and all(isinstance(each, int) for each in value)
    return tuple(value) if fits and isinstance(value, list) else ()


def answering_channels(ours: Origins, theirs: Origins) -> list[int] | None:
    """Which channel of one model's residual stream each of ours is; None where that is not known."""
    return places_in(ours.channels, theirs.channels) if ours.hidden_size == theirs.hidden_size else None


def answering_heads(ours: Origins, theirs: Origins, layer: int, their: int) -> list[int] | None:
    """The same of the query heads of our layer `layer`, which was their layer `their`."""
    alike = (ours.num_layers, ours.num_heads) == (theirs.num_layers, theirs.num_heads)
    return places_in(ours.heads[layer], theirs.heads[their]) if alike else None


def places_in(ours: Sequence[int], theirs: Sequence[int]) -> list[int] | None:
    """Where each of our origins stands among theirs; None where one does not."""
    place = {origin: index for index, origin in enumerate(theirs)}
    return [place[origin] for origin in ours] if all(origin in place for origin in ours) else None
