"""What the axes of a model's tensors are: which rows and columns belong to which channel, neuron or head.

Told once, from the family's anatomy, for whatever cuts widths. A tensor is named as in the state dict; each of its axes
lies as parts one behind the other, and each part is a product of dimensions, the last one fastest: the rows of a fused
[q; k; v] are heads × lanes, three times. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.models.anatomy import Attention, Family, ModelShape

Dimension = Literal["hidden", "intermediate", "heads", "groups", "lanes", "value_lanes"]
"""hidden: the residual stream's channels. intermediate: an MLP's neurons. heads, groups: query and key/value heads.
lanes: the size of a head, value_lanes: of its values."""
Part = tuple[Dimension | int, ...]
Axis = tuple[Part, ...]
Axes = tuple[Axis, ...]

_HIDDEN: Axis = (("hidden",),)
_Q: Part = ("heads", "lanes")
_K: Part = ("groups", "lanes")
_V: Part = ("groups", "value_lanes")
_OUT: Axis = (("heads", "value_lanes"),)
_TABLE: Axes = ((), _HIDDEN)
"""(rows, columns) of a matrix whose rows are of no dimension here: tokens, positions, classes."""
_LEAVES = (("weight", 2), ("bias", 1))
"""A module's tensors, with how many of its axes they have."""
_BEHIND: Mapping[str, Axes] = {
    "score": _TABLE, "classifier": _TABLE, "cls.predictions.decoder": _TABLE,
    "cls.predictions.transform.dense": (_HIDDEN, _HIDDEN), "cls.predictions.transform.LayerNorm": (_HIDDEN,),
}
"""The modules that may stand behind a backbone."""


@dataclass(frozen=True)
class Place:
    """One tensor: the layer that it is in, None for those outside, and what its axes are."""

    layer: int | None
    axes: Axes


def sizes_of(shape: ModelShape, layer: int | None) -> dict[Dimension, int]:
    """How many there are of each dimension in a layer; outside of one, of the residual stream alone."""
    if layer is None:
        return {"hidden": shape.hidden_size}
    own = shape.of_layer(layer)
    return {
        "hidden": own.hidden_size, "intermediate": own.intermediate_size, "heads": own.num_attention_heads,
        "groups": own.num_key_value_heads, "lanes": own.head_dim, "value_lanes": own.v_head_dim,
    }  # fmt: skip


def places(
    shape: ModelShape, prefix: str, tensors: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Place], dict[str, str]]:
    """The place of every tensor by its name, and of those that the anatomy does not explain why not.

    prefix: the backbone's within the names (`model.`). tensors: the shape of each.
    """
    known, unknown = {}, {}
    outside, inside = _outside(shape.family, prefix), _in_layer(shape.family)
    in_layer = re.compile(rf"{re.escape(prefix + shape.family.layers)}\.(\d+)\.(.+)")
    for name, size in tensors.items():
        layer = in_layer.fullmatch(name)
        axes = inside.get(layer[2]) if layer else outside.get(name)
        place = None if axes is None else Place(int(layer[1]) if layer else None, axes)
        if place is None:
            unknown[name] = "is of no part that is known"
            continue
        sizes = sizes_of(shape, place.layer)
        expected = [length(axis, sizes) if axis else each for axis, each in zip(place.axes, size, strict=False)]
        if len(place.axes) != len(size) or expected != list(size):
            unknown[name] = f"has the shape {tuple(size)}, where {tuple(expected)} is expected"
        known[name] = place
    return known, unknown


def length(axis: Axis, sizes: Mapping[Dimension, int]) -> int:
    """How long an axis is."""
    return sum(math.prod(part_sizes(part, sizes)) for part in axis)


def part_sizes(part: Part, sizes: Mapping[Dimension, int]) -> list[int]:
    """How long each dimension of a part is."""
    return [each if isinstance(each, int) else sizes[each] for each in part]


def indices(
    axis: Axis, sizes: Mapping[Dimension, int], kept: Mapping[Dimension, Sequence[int]]
) -> NDArray[np.int64] | None:
    """Which places of an axis stay where of each dimension only `kept` do, in order; None where all of them do."""
    if not any(each in kept for part in axis for each in part):
        return None
    found, start = [], 0
    for part in axis:
        lengths = part_sizes(part, sizes)
        grid = start + np.arange(math.prod(lengths)).reshape(lengths)
        stay = [kept.get(each, range(n)) if isinstance(each, str) else range(n)
                for each, n in zip(part, lengths, strict=True)]  # fmt: skip
        found.append(grid[np.ix_(*stay)].ravel())
        start += grid.size
    return np.concatenate(found)


def _outside(family: Family, prefix: str) -> dict[str, Axes]:
    """The axes of the tensors outside the layers by their name."""
    tables = (family.token_embedding, family.position_embedding, family.type_embedding)
    norms = (family.embedding_norm, family.final_norm)
    own = dict.fromkeys(tables, _TABLE) | dict.fromkeys(norms, (_HIDDEN,)) | {"pooler.dense": (_HIDDEN, _HIDDEN)}
    modules = {**{prefix + path: axes for path, axes in own.items() if path}, **_BEHIND}
    if family.lm_head:
        modules[family.lm_head] = _TABLE
    weights, biases = ({f"{path}.{leaf}": axes[:n] for path, axes in modules.items()} for leaf, n in _LEAVES)
    return {**weights, **biases, "cls.predictions.bias": ((),)}


def _in_layer(family: Family) -> dict[str, Axes]:
    """The axes of a layer's tensors by their name within it: of all that a layer may have."""
    neurons: Axis = (("intermediate",),)
    matrices = _attention(family.attention) | {family.mlp.up: (neurons, _HIDDEN), family.mlp.down: (_HIDDEN, neurons)}
    if family.mlp.gate:
        matrices[family.mlp.gate] = (neurons, _HIDDEN)
    norms = [f"{norm}.{leaf}" for norm in (family.attention_norm, family.mlp_norm) for leaf in ("weight", "bias")]
    return {
        **_mixer(family.attention), **dict.fromkeys(norms, (_HIDDEN,)),
        **{f"{path}.weight": axes[::-1] if family.conv1d else axes for path, axes in matrices.items()},
        **{f"{path}.bias": axes[:1] for path, axes in matrices.items()},
    }  # fmt: skip


def _attention(anatomy: Attention) -> dict[str, Axes]:
    """(rows, columns) of the attention's matrices by their path."""
    rows: dict[str, Axis] = {anatomy.q: (_Q,), anatomy.k: (_K,), anatomy.v: (_V,)}
    if anatomy.qkv:
        rows = {anatomy.qkv: (("heads", 3, "lanes"),) if anatomy.qkv_layout == "per_head" else (_Q,) * 3}
    found: dict[str, Axes] = {f"{anatomy.path}.{leaf}": (axis, _HIDDEN) for leaf, axis in rows.items()}
    return found | {f"{anatomy.path}.{anatomy.out}": (_HIDDEN, _OUT)}


def _mixer(anatomy: Attention) -> dict[str, Axes]:
    """What a mixer has beyond the projections of the attention that it replaces, and the norms of queries and keys."""
    inner = ".".join(filter(None, (anatomy.path, anatomy.q.rpartition(".")[0])))
    heads: Axis = (("heads",),)
    groups: Axis = (("groups",),)
    lanes: Axis = (("lanes",),)
    per_group: dict[str, Axes] = {f"{leaf}.weight": (groups, _HIDDEN) for leaf in ("a_proj", "dt_proj", "b_proj")}
    per_head: dict[str, Axes] = {f"{leaf}.weight": (heads, _HIDDEN) for leaf in ("g_proj", "w_proj")}
    found: dict[str, Axes] = {
        **per_group, **{name.replace("weight", "bias"): (groups,) for name in per_group},
        **per_head, **{name.replace("weight", "bias"): (heads,) for name in per_head},
        "A": (groups,), "feature_map_q.weight": (heads, lanes, lanes), "feature_map_k.weight": (groups, lanes, lanes),
        "conv.weight": ((_Q, _K, _V), ()), "norm.weight": ((("value_lanes",),),),
    }  # fmt: skip
    norms: dict[str, Axes] = {f"{leaf}.weight": (lanes,) for leaf in (anatomy.q_norm, anatomy.k_norm) if leaf}
    return {f"{inner}.{name}": axes for name, axes in (found | norms).items()}
