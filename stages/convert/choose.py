"""Which layers lose least by a conversion: the two scores that are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.parts import Parts
from compress.models.replay import Trace, distance, output
from compress.stage import Progress
from compress.units import UNKEPT, Unit, Units


@dataclass(frozen=True)
class Choice:
    """The layers to convert, sorted, and why: a score for each candidate, none where nothing was measured."""

    converted: Sequence[int]
    measure: str = ""
    scores: Mapping[int, float] = field(default_factory=dict)
    num_tokens: int = 0


def least_moved(scores: Mapping[int, float], number: int, num_tokens: int, *, has_logits: bool) -> Choice:
    """The `number` layers with the lowest of `proxy_scores`."""
    distance_to = "KL to the teacher in nats" if has_logits else "1 − cos to the teacher's last hidden state"
    measure = f"{distance_to}, this layer alone converted"
    return Choice(sorted(sorted(scores, key=scores.__getitem__)[:number]), measure, scores, num_tokens)


def best_restored(losses: Mapping[int, float], number: int, num_tokens: int) -> Choice:
    """The `number` layers that miss their softmax least.

    losses: of the converted model, trained a little, with that layer's softmax restored: the lower, the more that
    layer's softmax matters. Li et al., "Distilling to hybrid attention models via KL-guided layer selection".
    """
    converted = sorted(sorted(losses, key=losses.__getitem__, reverse=True)[:number])
    return Choice(converted, "loss with this layer's softmax restored, nats", losses, num_tokens)


def proxy_scores(
    teacher: Parts, mixers: Mapping[int, nn.Module], batches: Sequence[Tensor], advance: Progress,
    units: Units = UNKEPT,
) -> dict[int, float]:  # fmt: skip
    """Mean KL(teacher ‖ teacher with one layer's mixer) over all positions, by layer. The model is left as it was.

    Of a backbone without logits, an encoder's, it is 1 − cos between the last hidden states.
    A mixer leaves the layers before it as they are, so that only those behind it are run again. units: batches that
    they hold are not run again.
    """
    total, num_positions = dict.fromkeys(mixers, 0.0), 0
    for number, ids_BT in enumerate(batches):
        if (unit := units.find(name := f"batch {number}")) is None:
            unit = Unit(_with_each(teacher, mixers, ids_BT, advance))
            units.keep(name, unit)
        else:
            advance(len(mixers))
        for index, moved in zip(mixers, unit.figures["moved"], strict=True):
            total[index] += moved
        num_positions += unit.figures["positions"]
    return {index: value / num_positions for index, value in total.items()}


@torch.no_grad()
def _with_each(
    teacher: Parts, mixers: Mapping[int, nn.Module], ids_BT: Tensor, advance: Progress
) -> dict[str, Any]:
    """How far the output of one batch moves with each of `mixers` alone, over its positions, and their number."""
    trace, path = Trace.of(teacher, ids_BT), teacher.family.attention.path
    target, moved = output(teacher, ids_BT, trace.states[-1]), []
    for index, mixer in mixers.items():
        layer, attention = trace.layers[index], teacher.attention(trace.layers[index])
        layer.set_submodule(path, mixer)
        try:
            y_BTD = trace.run(index, trace.states[index])
        finally:
            layer.set_submodule(path, attention)
        for later in range(index + 1, len(trace.layers)):
            y_BTD = trace.run(later, y_BTD)
        moved.append(distance(target, output(teacher, ids_BT, y_BTD)).double().sum().item())
        advance()
    return {"moved": moved, "positions": target.values[..., 0].numel()}
