"""Which layers a model misses least, each score a function of the model and batches of token ids.

x_l is the residual stream on its way into layer l of L, (B, T, D), and x_L what leaves the last one, before any final
norm. Everything is computed batch by batch: nothing grows with the number of tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from compress.models.load import load_tokenizer
from compress.models.parts import Parts
from compress.models.replay import Trace, cosine, distance, output
from compress.stage import Progress, StageContext
from compress.units import UNKEPT, Units

Score = Literal["block-influence", "angular", "leave-one-out"]


@dataclass(frozen=True)
class Choice:
    """The layers to drop, sorted, and why: one round of scores for each decision, none where nothing was measured.

    The scores are of single layers; those of `angular` are of runs of layers, by the first.
    """

    dropped: Sequence[int]
    measure: str = ""
    rounds: Sequence[Mapping[int, float]] = ()
    num_tokens: int = 0


def choose(
    by: Score, parts: Parts, batches: Sequence[Tensor], num_dropped: int, advance: Progress, units: Units = UNKEPT
) -> Choice:
    """The `num_dropped` layers that score `by` says to drop, over all tokens of `batches` of ids (B, T).

    units: batches that they hold, of that score, are not run again.
    """
    num_tokens = sum(ids_BT.numel() for ids_BT in batches)
    if by == "leave-one-out":
        one = batches[0][:1]
        says = output(parts, one, Trace.of(parts, one).states[-1])
        rounds = leave_one_out(parts, batches, num_dropped, advance, units)
        dropped = sorted(lowest(scores) for scores in rounds)
        return Choice(dropped, f"{says.measure}, without the layer", rounds, num_tokens)
    if by == "angular":
        runs = angular(parts, batches, num_dropped, advance, units)
        first = lowest(runs)
        dropped = list(range(first, first + num_dropped))
        return Choice(dropped, f"angular distance over {num_dropped} layers from this one, ÷ π", [runs], num_tokens)
    scores = block_influence(parts, batches, advance, units)
    dropped = sorted(sorted(scores, key=scores.__getitem__)[:num_dropped])
    return Choice(dropped, "block influence, 1 − E cos(in, out)", [scores], num_tokens)


def blocks_to_score(context: StageContext, sequence_length: int, max_tokens: int) -> Tensor:
    """The calibration text of the stage's input as token ids (N, sequence_length)."""
    tokenizer = load_tokenizer(context.input.path)
    return torch.from_numpy(context.data.blocks("train", tokenizer, sequence_length, max_tokens))


def batches_of(ids_NT: Tensor, num_tokens: int = 1024) -> list[Tensor]:
    """Blocks of text in batches (B, T) of about `num_tokens`: few enough that logits over a vocabulary fit."""
    num_rows = max(1, num_tokens // ids_NT.shape[1])
    return [ids_NT[start : start + num_rows] for start in range(0, len(ids_NT), num_rows)]


def block_influence(
    parts: Parts, batches: Sequence[Tensor], advance: Progress, units: Units = UNKEPT
) -> dict[int, float]:
    """BI_l = 1 − E cos(x_l, x_{l+1}) of each layer, over all tokens of `batches` of ids (B, T). ShortGPT."""

    def cosines(ids_BT: Tensor) -> list[float]:
        x = Trace.of(parts, ids_BT).states
        return [cosine(x[i], x[i + 1]).double().sum().item() for i in range(len(parts.layers))]

    return dict(enumerate((1 - _mean(cosines, batches, advance, units)).tolist()))


def angular(
    parts: Parts, batches: Sequence[Tensor], length: int, advance: Progress, units: Units = UNKEPT
) -> dict[int, float]:
    """E arccos cos(x_l, x_{l+length}) / π of each block of `length` layers, by its first layer l = 0 … L − length.

    The angular distance of Gromov et al., "The unreasonable ineffectiveness of the deeper layers", over all tokens.
    """

    def angles(ids_BT: Tensor) -> list[float]:
        x, num_runs = Trace.of(parts, ids_BT).states, len(parts.layers) - length + 1
        cosines = [cosine(x[i], x[i + length]).double() for i in range(num_runs)]
        return [each.clamp(-1, 1).arccos().sum().item() / math.pi for each in cosines]

    return dict(enumerate(_mean(angles, batches, advance, units).tolist()))


def _mean(
    sums_of: Callable[[Tensor], list[float]], batches: Sequence[Tensor], advance: Progress, units: Units
) -> Tensor:
    """The mean over tokens, float64, of what `sums_of` sums over those of one batch."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for number, ids_BT in enumerate(batches):
        total = total + torch.tensor(units.once(f"batch {number}", partial(sums_of, ids_BT)), dtype=torch.float64)
        advance()
    return total / sum(ids_BT.numel() for ids_BT in batches)


def leave_one_out(
    parts: Parts, batches: Sequence[Tensor], num_dropped: int, advance: Progress, units: Units = UNKEPT
) -> list[dict[int, float]]:
    """For each removal in turn, how far the output moves from the full model's when a remaining layer goes too.

    The layer with the smallest figure is removed before the next round. The figure is the mean of `distance` over
    positions. A layer's removal leaves the layers before it as they were, so their output
    is computed once, which halves the cost.
    """
    kept = list(range(len(parts.layers)))
    rounds: list[dict[int, float]] = []
    for number in range(num_dropped):
        total, num_positions = dict.fromkeys(kept, 0.0), 0
        for batch, ids_BT in enumerate(batches):
            found = units.once(f"round {number} batch {batch}", partial(_without_each, parts, ids_BT, kept))
            for index, moved in zip(kept, found["moved"], strict=True):
                total[index] += moved
            num_positions += found["positions"]
            advance()
        rounds.append({index: value / num_positions for index, value in total.items()})
        kept.remove(lowest(rounds[-1]))
    return rounds


def _without_each(parts: Parts, ids_BT: Tensor, kept: Sequence[int]) -> dict[str, Any]:
    """How far the output of one batch moves without each of the layers `kept`, over its positions, and their number."""
    trace = Trace.of(parts, ids_BT)
    target = output(parts, ids_BT, trace.states[-1])
    x_BTD, moved = trace.states[0], []
    for position, index in enumerate(kept):
        y_BTD = x_BTD
        for later in kept[position + 1 :]:
            y_BTD = trace.run(later, y_BTD)
        moved.append(distance(target, output(parts, ids_BT, y_BTD)).double().sum().item())
        x_BTD = trace.run(index, x_BTD)
    return {"moved": moved, "positions": target.values[..., 0].numel()}


def uniform(num_layers: int, num_dropped: int) -> list[int]:
    """The layers left out when the kept ones are spread evenly from the first to the last."""
    gaps = num_layers - num_dropped - 1
    kept = {(2 * i * (num_layers - 1) + gaps) // (2 * gaps) for i in range(gaps + 1)} if gaps else {0}
    return [index for index in range(num_layers) if index not in kept]


def at_random(num_layers: int, num_dropped: int, seed: int) -> list[int]:
    """`num_dropped` layers drawn without replacement: the control that every score has to beat."""
    return sorted(random.Random(seed).sample(range(num_layers), num_dropped))


def lowest(scores: Mapping[int, float]) -> int:
    """The layer (or run of layers) with the smallest score."""
    return min(scores, key=scores.__getitem__)
