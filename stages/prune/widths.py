"""What widths `prune-groups` is asked for, and what that makes of a model's shape. Imports no torch.

H query and G key/value heads; R = H/G query heads read each key/value head. A layer has softmax attention or a mixer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from compress.errors import Problem
from compress.mixers.widths import LayerWidths
from compress.models.anatomy import ModelShape

Kind = Literal["attention-heads", "kv-groups", "intermediate", "hidden", "ssm-heads", "ssm-channels"]
Ask = int | float
"""A number that stays, or a share."""
_GRID = 256
"""A budget is met by a share that is a multiple of one over this."""


@dataclass(frozen=True)
class Widths:
    """What a layer keeps of each dimension, and how wide the residual stream stays."""

    hidden: int
    intermediate: int
    heads: int
    groups: int
    value_lanes: int

    @classmethod
    def of(cls, shape: ModelShape, layer: int) -> Widths:
        """All that a layer has."""
        own = shape.of_layer(layer)
        return cls(
            own.hidden_size, own.intermediate_size, own.num_attention_heads, own.num_key_value_heads, own.v_head_dim
        )


def total(kind: Kind, shape: ModelShape) -> int:
    """How many there are of a kind in each layer that has it; where layers differ, in the widest."""
    layers = range(shape.num_hidden_layers)
    here = [layer for layer in layers if kind[:3] != "ssm" or has_mixer(shape, layer)] or layers
    field = {
        "attention-heads": "heads", "ssm-heads": "heads", "kv-groups": "groups", "hidden": "hidden",
        "intermediate": "intermediate", "ssm-channels": "value_lanes",
    }[kind]  # fmt: skip
    return max(int(getattr(Widths.of(shape, layer), field)) for layer in here)


def has_mixer(shape: ModelShape, layer: int) -> bool:
    """Whether a layer's attention is linear."""
    return bool(shape.mixers) and shape.mixers[layer] is not None


def step(kind: Kind, shape: ModelShape, groups: int, multiple_of: int) -> int:
    """What a number of a kind has to be a multiple of, in a model that keeps so many `groups`; not of `hidden`.

    Query heads go from every group alike.
    """
    if kind in ("attention-heads", "ssm-heads"):
        return groups if total(kind, shape) > total("kv-groups", shape) else 1
    return {"kv-groups": 1, "ssm-channels": math.gcd(multiple_of, 8)}.get(kind, multiple_of)


def counts(keep: Mapping[Kind, Ask], shape: ModelShape, multiple_of: int) -> dict[Kind, int]:
    """The numbers that stay of each kind in `keep`: those asked for, shares to the nearest step and at least one."""
    found: dict[Kind, int] = {}
    all_groups = total("kv-groups", shape)
    for kind in sorted(keep, key=lambda kind: (kind == "hidden", kind != "kv-groups")):  # each after what binds it
        asked, whole = keep[kind], total(kind, shape)
        if isinstance(asked, int):
            found[kind] = asked
        elif kind == "hidden":
            found[kind] = _hidden_near(asked * whole, shape, found, multiple_of)
        else:
            groups = found.get("kv-groups", all_groups)
            by = step(kind, shape, groups, multiple_of)
            grouped = kind.endswith("heads") and by > 1
            most = groups * (whole // all_groups) if grouped else whole
            found[kind] = min(most, max(by, by * round(asked * whole / by)))
    return found


def divisor(shape: ModelShape, kept: Mapping[Kind, int]) -> int:
    """What the width of the residual stream must be a multiple of: the heads, where the config's class wants that."""
    heads = softmax_heads(shape, kept)
    return heads if shape.family.tied_heads or shape.model_type.removeprefix("hybrid_") == "llama" else 1


def softmax_heads(shape: ModelShape, kept: Mapping[Kind, int]) -> int:
    """Query heads that the widest layer with softmax attention keeps."""
    layers = range(shape.num_hidden_layers)
    softmax = [layer for layer in layers if not has_mixer(shape, layer)] or layers
    return max(_heads("attention-heads", shape, layer, kept)[0] for layer in softmax)


def _heads(kind: Kind, shape: ModelShape, layer: int, kept: Mapping[Kind, int]) -> tuple[int, int]:
    """(query heads, key/value heads) that stay in a layer where query heads are cut as `kind`."""
    own = Widths.of(shape, layer)
    groups = min(own.groups, kept.get("kv-groups", own.groups))
    if own.heads == own.groups:
        left = min(groups, kept.get(kind, own.heads))
        return left, left
    ratio = own.heads // own.groups
    if kind in kept:
        ratio = min(ratio, kept[kind] // kept.get("kv-groups", total("kv-groups", shape)))
    return groups * ratio, groups


def _hidden_near(wanted: float, shape: ModelShape, kept: Mapping[Kind, int], multiple_of: int) -> int:
    """The width nearest to `wanted` that the architecture can have.

    Its step is made coarser for the heads' sake (see `divisor`) no further than an eighth of the width.
    """
    whole, heads = shape.hidden_size, divisor(shape, kept)
    if shape.family.tied_heads and "attention-heads" in kept:
        return heads * shape.head_dim
    by = multiple_of
    while by > 1 and math.lcm(by, heads) > whole // 8:
        by //= 2
    by = math.lcm(max(by, 1), heads)
    return min(whole, max(by, by * round(wanted / by)))


def layer_widths(kept: Mapping[Kind, int], shape: ModelShape, layer: int) -> Widths:
    """What one layer keeps where every layer keeps at most so many of each kind."""
    full, mixed = Widths.of(shape, layer), has_mixer(shape, layer)
    heads, groups = _heads("ssm-heads" if mixed else "attention-heads", shape, layer, kept)
    lanes = min(full.value_lanes, kept.get("ssm-channels", full.value_lanes)) if mixed else full.value_lanes
    intermediate = min(full.intermediate, kept.get("intermediate", full.intermediate))
    return Widths(kept.get("hidden", full.hidden), intermediate, heads, groups, lanes)


def problems(keep: Mapping[Kind, Ask], shape: ModelShape, multiple_of: int, explicit_step: bool) -> Iterator[Problem]:
    """What of `keep` this model can't have; `where` is `keep.KIND`."""
    kept = counts(keep, shape, multiple_of)
    groups = kept.get("kv-groups", total("kv-groups", shape))
    for kind, number in kept.items():
        whole = total(kind, shape)
        if kind.startswith("ssm") and not any(shape.mixers):
            what = "no layer has a mixer: every attention is softmax"
            yield Problem(f"keep.{kind}", what, "put convert-attention before it, or leave it out")
        elif kind == "attention-heads" and shape.mixers and all(shape.mixers):
            yield Problem(f"keep.{kind}", "every layer has a mixer in its attention's place", "use ssm-heads")
        elif not 0 < number <= whole:
            yield Problem(f"keep.{kind}", f"{number} of {whole}", f"choose 1 to {whole}, or a share from 0 to 1")
        elif kind not in ("kv-groups", "hidden"):
            by = step(kind, shape, groups, multiple_of if explicit_step else 1)
            yield from _no_multiple(kind, number, by, whole, f"each of {groups} key/value heads keeps as many"
                                    if kind.endswith("heads") else f"multiple_of is {by}")  # fmt: skip
            ratio = total(kind, shape) // total("kv-groups", shape)
            if kind.endswith("heads") and ratio > 1 and number > groups * ratio:
                what = f"{number} query heads, where {groups} key/value heads are read by {groups * ratio}"
                yield Problem(f"keep.{kind}", what, f"at most {groups * ratio}")
    if "hidden" in kept and 0 < kept["hidden"] <= shape.hidden_size:
        by = divisor(shape, kept)
        reason = f"{shape.model_type} wants a multiple of its {by} heads"
        yield from _no_multiple("hidden", kept["hidden"], by, shape.hidden_size, reason)


def _no_multiple(kind: Kind, number: int, by: int, whole: int, reason: str) -> Iterator[Problem]:
    if number % by:
        near = sorted({number // by * by, min(whole // by * by, -(-number // by) * by)} - {0})
        yield Problem(f"keep.{kind}", f"{number} is not possible: {reason}", f"nearest: {' or '.join(map(str, near))}")


def narrower(shape: ModelShape, widths: Sequence[Widths]) -> ModelShape:
    """The shape of the model whose layers have these widths."""
    main, alike = widest(shape, widths)
    own = () if alike else tuple(
        LayerWidths(w.heads, w.groups, w.intermediate, shape.head_dim, w.value_lanes) for w in widths
    )  # fmt: skip
    return replace(
        shape, hidden_size=main.hidden, intermediate_size=main.intermediate, num_attention_heads=main.heads,
        num_key_value_heads=main.groups, head_dim=shape.head_dim, layer_widths=own,
    )  # fmt: skip


def widest(shape: ModelShape, widths: Sequence[Widths]) -> tuple[Widths, bool]:
    """The widths of the widest layer with softmax attention, if there is one, and whether all layers have the same.

    value_lanes: the model's head_dim, which a layer's may differ from.
    """
    softmax = [width for layer, width in enumerate(widths) if not has_mixer(shape, layer)] or list(widths)
    heads, groups = max((width.heads, width.groups) for width in softmax)
    main = Widths(widths[0].hidden, max(w.intermediate for w in widths), heads, groups, shape.head_dim)
    return main, all(width == main for width in widths)


Cost = Callable[[Mapping[Kind, int]], int]


def within(
    kinds: Sequence[Kind], shape: ModelShape, multiple_of: int, budget: float, cost: Cost
) -> tuple[dict[Kind, int], float]:
    """The widest numbers of `kinds`, by one share of each, of which `cost` is within `budget`, and their cost.

    Where nothing is, those that come closest.
    """
    best: tuple[dict[Kind, int], float] | None = None
    for share in range(_GRID, 0, -1):
        kept = counts(dict.fromkeys(kinds, share / _GRID), shape, multiple_of)
        found = cost(kept)
        if found <= budget:
            return kept, found
        if best is None or found < best[1]:
            best = kept, found
    assert best is not None
    return best
