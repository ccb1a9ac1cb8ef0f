"""Which channels, neurons and heads stay, given their scores and how many of each shall stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.models.anatomy import ModelShape
from compress.models.axes import Dimension
from compress.models.narrow import Indices, Kept
from compress.stages.prune.importance import Importance
from compress.stages.prune.widths import Kind, Widths, has_mixer, layer_widths


def choose(importance: Importance, shape: ModelShape, widths: Sequence[Widths]) -> Kept:
    """The best of everything: so many of each layer's own as `widths` say, and channels by one ranking for all layers.

    Value lanes go first, by one ranking for all heads of a layer; heads are then scored by the lanes that stay. Of each
    key/value head as many query heads stay. (Group-aware SSM pruning, arXiv 2504.11409.)
    """
    layers = [_of_layer(importance, shape, layer, width) for layer, width in enumerate(widths)]
    hidden = widths[0].hidden
    return Kept(layers, None if hidden == shape.hidden_size else _best(importance.hidden, hidden))


def _of_layer(importance: Importance, shape: ModelShape, layer: int, keep: Widths) -> dict[Dimension, Indices]:
    scores, full = importance.layers[layer], Widths.of(shape, layer)
    kept: dict[Dimension, Indices] = {}
    heads_H = scores["heads"]
    if keep.value_lanes < full.value_lanes:
        kept["value_lanes"] = lanes = _best(scores["value_lanes"], keep.value_lanes)
        if importance.out_HV:
            heads_H = importance.out_HV[layer][:, list(lanes)].sum(1).sqrt()
    groups = _best(scores["groups"], keep.groups)
    if (keep.heads, keep.groups) != (full.heads, full.groups):
        kept["groups"], kept["heads"] = groups, _heads(heads_H, full, keep, groups)
    if keep.intermediate < full.intermediate:
        kept["intermediate"] = _best(scores["intermediate"], keep.intermediate)
    return kept


def _heads(heads_H: Tensor, full: Widths, keep: Widths, groups: Indices) -> list[int]:
    """The best query heads of each of the `groups` that stay, as many of each."""
    ratio = full.heads // full.groups
    return [
        group * ratio + head
        for group in groups
        for head in _best(heads_H[group * ratio : (group + 1) * ratio], keep.heads // keep.groups)
    ]


def _best(scores_N: Tensor, number: int) -> list[int]:
    """The places of the `number` largest scores, sorted; of equals the first."""
    return sorted(scores_N.sort(descending=True, stable=True).indices[:number].tolist())


def allocated(
    importance: Importance, shape: ModelShape, kept: Mapping[Kind, int], multiple_of: int
) -> list[Widths]:
    """The widths of each layer where all together keep as much of each kind as `kept` would leave each of them.

    The best of the whole model stays, in steps of `multiple_of` neurons, of one query head of every group, or of one
    group; one step stays in every layer. Scores of activations and weights are compared between layers as shares of
    their layer's √Σ score²; Taylor's are of one loss already.
    """
    widths = [layer_widths(kept, shape, layer) for layer in range(shape.num_hidden_layers)]
    if "intermediate" in kept:
        gains = [_gains(importance, scores["intermediate"], multiple_of) for scores in importance.layers]
        steps = _shared_out(gains, round(sum(width.intermediate for width in widths) / multiple_of))
        own = [Widths.of(shape, layer).intermediate for layer in range(len(widths))]
        numbers = [min(whole, number * multiple_of) for whole, number in zip(own, steps, strict=True)]
        widths = [replace(width, intermediate=number) for width, number in zip(widths, numbers, strict=True)]
    for kind in ("attention-heads", "ssm-heads", "kv-groups"):
        if kind in kept:
            mixed = kind == "ssm-heads"
            here = [layer for layer in range(len(widths)) if kind == "kv-groups" or has_mixer(shape, layer) == mixed]
            for layer, width in zip(here, _heads_shared_out(importance, shape, kind, here, widths), strict=True):
                widths[layer] = width
    return widths


def _heads_shared_out(
    importance: Importance, shape: ModelShape, kind: Kind, here: Sequence[int], widths: Sequence[Widths]
) -> list[Widths]:
    """The widths of the layers `here` after their query heads, or whole groups of them, were shared out."""
    if kind == "kv-groups" or all(widths[layer].heads == widths[layer].groups for layer in here):
        gains = [_gains(importance, importance.layers[layer]["groups"], 1) for layer in here]
        numbers = _shared_out(gains, sum(widths[layer].groups for layer in here))
        return [replace(widths[layer], heads=number * (widths[layer].heads // widths[layer].groups), groups=number)
                for layer, number in zip(here, numbers, strict=True)]  # fmt: skip
    by_group = [importance.layers[layer]["heads"].view(Widths.of(shape, layer).groups, -1) for layer in here]
    gains = [_gains(importance, heads_GR.sort(1, descending=True).values.sum(0), 1) for heads_GR in by_group]
    numbers = _shared_out(gains, sum(widths[layer].heads // widths[layer].groups for layer in here))
    return [replace(widths[layer], heads=number * widths[layer].groups)
            for layer, number in zip(here, numbers, strict=True)]  # fmt: skip


def _gains(importance: Importance, scores_N: Tensor, size: int) -> list[float]:
    """The mean score of each `size` of them, the best first."""
    values = scores_N.double().sort(descending=True).values
    if not importance.is_of_one_loss:
        values = values / values.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return [chunk.mean().item() for chunk in torch.split(values, size)]


def _shared_out(gains: Sequence[Sequence[float]], number: int) -> list[int]:
    """How many of its steps each layer keeps of `number` in all: the first of each, then whichever gains most."""
    ranked = sorted(
        (-gain, layer, place) for layer, own in enumerate(gains) for place, gain in enumerate(own) if place > 0
    )
    found = [1] * len(gains)
    for _, layer, _ in ranked[: max(0, number - len(gains))]:
        found[layer] += 1
    return found


def shares(importance: Importance, kept: Kept) -> dict[str, list[float]]:
    """What share of the sum of scores stays: of the residual stream (one number), of each layer's dimensions (L)."""
    held: dict[str, list[float]] = {}
    if kept.hidden is not None:
        held["hidden"] = [_held(importance.hidden, kept.hidden)]
    for dimension in ("heads", "groups", "intermediate", "value_lanes"):
        stay = [own.get(dimension) for own in kept.layers]
        if any(each is not None for each in stay):
            held[dimension] = [
                1.0 if each is None else _held(scores[dimension], each)
                for scores, each in zip(importance.layers, stay, strict=True)
            ]
    return held


def _held(scores_N: Tensor, kept: Indices) -> float:
    return (scores_N[list(kept)].sum() / scores_N.sum()).item()
