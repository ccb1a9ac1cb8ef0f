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
        layers = _indices(config.get(LAYERS), shape.num_hidden_layers)
        channels = _indices(config.get(CHANNELS), shape.hidden_size)
        every_head = [range(shape.num_attention_heads)] * shape.num_hidden_layers
        heads = config.get(HEADS)
        fits = isinstance(heads, list) and len(heads) == shape.num_hidden_layers
        return cls(
            int(config.get(NUM_LAYERS) or 0) if layers else shape.num_hidden_layers,
            int(config.get(HIDDEN_SIZE) or 0) if channels else shape.hidden_size,
            int(config.get(NUM_HEADS) or 0) if fits else shape.num_attention_heads,
            layers or tuple(range(shape.num_hidden_layers)), channels or tuple(range(shape.hidden_size)),
            tuple(map(tuple, heads if fits and heads is not None else every_head)),
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


def answering_channels(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[int] | None:
    """Which channel of one model's residual stream each of another's is, by their configs; None: that is not known."""
    own, other = Origins.of(ours), Origins.of(theirs)
    return places_in(own.channels, other.channels) if own.hidden_size == other.hidden_size else None


def places_in(ours: Sequence[int], theirs: Sequence[int]) -> list[int] | None:
    """Where each of our origins stands among theirs; None where one does not."""
    place = {origin: index for index, origin in enumerate(theirs)}
    return [place[origin] for origin in ours] if all(origin in place for origin in ours) else None
