"""How much a model needs each channel, neuron and head: one score each, of whatever is cut together.

Every sum over text is taken batch by batch: nothing grows with the number of tokens. Shapes: B sequences, T tokens,
D channels, I neurons, H query and G key/value heads, V lanes of a head's values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.axes import Axis, Dimension, Place, part_sizes, sizes_of
from compress.models.narrow import weights_of
from compress.models.parts import Parts
from compress.stage import Progress
from compress.units import UNKEPT, Unit, Units

Scores = Mapping[Dimension, Tensor]
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """hidden: (D,), of the residual stream. layers: of each layer's intermediate, heads, groups and value_lanes.

    A key/value head's score has that of the query heads that read it in it. measure: what the scores are, in words.
    out_HV: by layer, what each lane of each head adds to the square of its score, where scores are made so.
    """

    hidden: Tensor
    layers: Sequence[Scores]
    measure: str
    num_tokens: int = 0
    out_HV: Sequence[Tensor] = ()
    is_of_one_loss: bool = False
    """Whether scores of different layers are of one measure."""


def activation(parts: Parts, batches: Sequence[Tensor], advance: Progress, units: Units = UNKEPT) -> Importance:
    """√Σ_sequences (mean_tokens |a|)² of what goes into each `down` and output projection and comes out of each norm.

    Minitron (arXiv 2407.14679): an L2 norm over the lanes of a head and over the heads of a group; a channel of the
    residual stream is the sum over all norms. batches: of token ids (B, T).
    """
    squares = _over(batches, partial(_squares, parts), advance, units)
    hidden = torch.stack([value.sqrt() for name, value in squares.items() if name.startswith("norm ")]).sum(0)
    layers, out_HV = [], []
    for layer in range(len(parts.layers)):
        sizes = sizes_of(parts.shape, layer)
        out_HV.append(squares[f"out {layer}"].view(sizes["heads"], sizes["value_lanes"]))
        heads_H = out_HV[-1].sum(1)
        energies: Scores = {
            "intermediate": squares[f"down {layer}"], "heads": heads_H, "value_lanes": out_HV[-1].sum(0),
            "groups": heads_H.view(sizes["groups"], -1).sum(1),
        }  # fmt: skip
        layers.append({dimension: energy.sqrt() for dimension, energy in energies.items()})
    return Importance(hidden, layers, "√Σ (mean |activation|)²", _num_tokens(batches), out_HV)


def taylor(
    parts: Parts, placed: Mapping[str, Place], batches: Sequence[Tensor], advance: Progress, units: Units = UNKEPT
) -> Importance:
    """Σ_batches |Σ ∂L/∂w·w| over all weights that go together, L the cross-entropy with the text. LLM-Pruner.

    (arXiv 2305.11627.) Of decoders: an encoder has no loss without labels.
    """

    def products(ids_BT: Tensor) -> Found:
        model: Any = parts.model
        with torch.enable_grad():
            model.zero_grad(set_to_none=True)
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        weights = {name: weight for name, weight in model.named_parameters() if weight.grad is not None}
        sums = _sums(parts, placed, {name: weight.grad * weight.detach() for name, weight in weights.items()})
        model.zero_grad(set_to_none=True)
        return {name: value.abs() for name, value in sums.items()}

    found = _over(batches, products, advance, units)
    scored = _by_layer(found, len(parts.layers), "Σ |gradient × weight|", _num_tokens(batches))
    return replace(scored, is_of_one_loss=True)


def magnitude(parts: Parts, placed: Mapping[str, Place]) -> Importance:
    """√Σ w² over all weights that go together."""
    squares = _sums(parts, placed, {name: weight.square() for name, weight in weights_of(parts.model).items()})
    return _by_layer({name: value.sqrt() for name, value in squares.items()}, len(parts.layers), "√Σ weight²")


def at_random(parts: Parts, seed: int) -> Importance:
    """Uniform numbers by `seed`: the control that every score has to beat."""
    drawn = torch.Generator().manual_seed(seed)
    layers = [
        {dimension: torch.rand(sizes_of(parts.shape, layer)[dimension], generator=drawn) for dimension in _OF_LAYERS}
        for layer in range(len(parts.layers))
    ]
    return Importance(torch.rand(parts.shape.hidden_size, generator=drawn), layers, "random")


_OF_LAYERS: tuple[Dimension, ...] = ("intermediate", "heads", "groups", "value_lanes")


def _num_tokens(batches: Sequence[Tensor]) -> int:
    return sum(ids_BT.numel() for ids_BT in batches)


def _over(
    batches: Sequence[Tensor], found_in: Callable[[Tensor], Found], advance: Progress, units: Units
) -> dict[str, Tensor]:
    """The sum over `batches`, float64, of the tensors that `found_in` finds in one."""
    total: dict[str, Tensor] = {}
    for number, ids_BT in enumerate(batches):
        name = f"batch {number}"
        unit = units.find(name)
        if unit is None:
            unit = Unit(tensors={key: value.float() for key, value in found_in(ids_BT).items()})
            units.keep(name, unit)
        total = {key: value.double() + total.get(key, 0) for key, value in unit.tensors.items()}
        advance()
    return total


@torch.no_grad()
def _squares(parts: Parts, ids_BT: Tensor) -> Found:
    """Σ_B (mean_T |a|)² of each place that `activation` looks at, by its name."""
    found: Found = {}
    with _watched(parts, lambda name, a_BTX: found.update({name: a_BTX.abs().mean(1).square().sum(0)})):
        parts.backbone(ids_BT, **({"use_cache": False} if parts.family.kind == "decoder" else {}))
    return found


@contextmanager
def _watched(parts: Parts, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it is entered, `see` gets the inputs of `down` and output projections and the outputs of norms, by name."""

    def on_input(name: str) -> Callable[..., None]:
        return lambda _, inputs: see(name, inputs[0].float())

    def on_output(name: str) -> Callable[..., None]:
        return lambda _, __, output: see(name, output.float())

    family = parts.family
    norms = {f"norm {path}": parts.backbone_module(path) for path in (family.embedding_norm, family.final_norm) if path}
    with ExitStack() as stack:
        for index, layer in enumerate(parts.layers):
            ends = {"out": f"{family.attention.path}.{family.attention.out}", "down": family.mlp.down}
            for name, path in ends.items():
                module = layer.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(on_input(f"{name} {index}")).remove)
            norms |= {f"norm {index} {path}": layer.get_submodule(path)
                      for path in (family.attention_norm, family.mlp_norm)}  # fmt: skip
        for name, norm in norms.items():
            assert isinstance(norm, nn.Module)
            stack.callback(norm.register_forward_hook(on_output(name)).remove)
        yield


def _sums(parts: Parts, placed: Mapping[str, Place], values: Mapping[str, Tensor]) -> Found:
    """Σ of `values`, one tensor for each weight, over all that go with each channel, neuron and head: (n,) by name.

    Names are `hidden` and, of a layer's dimension, `heads 3`. A tensor that is tied counts once.
    """
    total: dict[str, Tensor | float] = defaultdict(float)
    for name in dict(parts.model.named_parameters()):  # which has a tied one once
        if name not in values:
            continue
        value, place = values[name], placed[name]
        sizes = sizes_of(parts.shape, place.layer)
        for dim, axis in enumerate(place.axes):
            along = value.transpose(0, dim).flatten(1).sum(1) if value.dim() > 1 else value
            for dimension, sums in _along(axis, along.double(), sizes):
                key = dimension if dimension == "hidden" else f"{dimension} {place.layer}"
                total[key] = total[key] + sums
    for layer in range(len(parts.layers)):
        heads, groups = (total[f"{dimension} {layer}"] for dimension in ("heads", "groups"))
        assert isinstance(heads, Tensor)
        num_groups = sizes_of(parts.shape, layer)["groups"]
        total[f"groups {layer}"] = groups + heads.view(num_groups, -1).sum(1)
    return {name: value for name, value in total.items() if isinstance(value, Tensor)}


def _along(axis: Axis, values_N: Tensor, sizes: Mapping[Dimension, int]) -> Iterator[tuple[Dimension, Tensor]]:
    """Each dimension of `axis` with the sums of `values_N`, which lie along it, over the others."""
    start = 0
    for part in axis:
        lengths = part_sizes(part, sizes)
        grid = values_N[start : (start := start + torch.Size(lengths).numel())].view(lengths)
        for at, dimension in enumerate(part):
            if isinstance(dimension, str):
                others = [other for other in range(len(part)) if other != at]
                yield dimension, grid.sum(others) if others else grid


def _by_layer(found: Found, num_layers: int, measure: str, num_tokens: int = 0) -> Importance:
    layers: list[Scores] = [
        {dimension: found[f"{dimension} {layer}"] for dimension in _OF_LAYERS} for layer in range(num_layers)
    ]
    return Importance(found["hidden"], layers, measure, num_tokens)
