"""The narrower model: its config, its weights, and what its folder says of where its parts come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from compress.artifact import write_json
from compress.errors import StageFailed
from compress.models.anatomy import ModelShape
from compress.models.axes import Place, length, sizes_of
from compress.models.convert import narrowed
from compress.models.folder import config_of, module_folders
from compress.models.narrow import Indices, Kept
from compress.models.origins import Origins
from compress.models.parts import Parts
from compress.stages.prune.widths import Widths, has_mixer, narrower, widest

POOLED = ("word_embedding_dimension", "embedding_dimension")
"""Keys of a sentence-transformers module that say how wide what it reads is."""


def num_parameters(parts: Parts, placed: Mapping[str, Place], layers: Sequence[Widths]) -> int:
    """Parameters of the model with these widths, tied ones once."""
    shape, found = narrower(parts.shape, layers), 0
    for name, tensor in parts.model.named_parameters():
        sizes, axes = sizes_of(shape, placed[name].layer), placed[name].axes
        found += math.prod(length(axis, sizes) if axis else n for axis, n in zip(axes, tensor.shape, strict=True))
    return found


def rebuilt(parts: Parts, weights: Mapping[str, Any], layers: Sequence[Widths]) -> PreTrainedModel:
    """A model of these weights, whose layers have these widths: of the same class where its config can say them."""
    shape, key = parts.shape, parts.family.key
    main, alike = widest(shape, layers)
    changes: dict[str, Any] = {
        key("hidden_size"): main.hidden, key("intermediate_size"): main.intermediate,
        key("num_attention_heads"): main.heads,
    }  # fmt: skip
    if parts.family.tied_heads:
        changes |= {} if main.hidden == main.heads * shape.head_dim else {"head_dim": shape.head_dim}
    else:
        changes |= {"num_key_value_heads": main.groups, "head_dim": shape.head_dim}
    own = None if alike else [_entry(shape, width, layer) for layer, width in enumerate(layers)]
    return narrowed(cast(PreTrainedModel, parts.model), changes, weights, own)


def _entry(shape: ModelShape, width: Widths, layer: int) -> dict[str, int]:
    """One layer's of `layer_widths`."""
    entry = {"num_attention_heads": width.heads, "intermediate_size": width.intermediate}
    if not shape.family.tied_heads:
        entry["num_key_value_heads"] = width.groups
    return entry | ({"v_head_dim": width.value_lanes} if has_mixer(shape, layer) else {})


def note_origins(smaller: PreTrainedModel, parts: Parts, kept: Kept) -> None:
    """Say in the config which channels and heads of the source are left."""
    before = Origins.of(cast(Any, parts.model).config.to_dict())
    heads = [_of(before.heads[layer], own.get("heads")) for layer, own in enumerate(kept.layers)]
    after = replace(before, channels=_of(before.channels, kept.hidden), heads=tuple(heads))
    for name, value in after.keys().items():
        setattr(smaller.config, name, value)


def _of(origins: tuple[int, ...], kept: Indices | None) -> tuple[int, ...]:
    return origins if kept is None else tuple(origins[index] for index in kept)


def saved_modules(origin: Path, out: Path, hidden: Indices | None) -> None:
    """Make the modules that sentence-transformers puts behind the backbone as narrow as what they read now is.

    Raises StageFailed for a module whose weights are not a matrix that reads the last hidden state.
    """
    if hidden is None:
        return
    for name in module_folders(out):
        config = config_of(out / name) or {}
        narrower = {key: len(hidden) for key in POOLED if key in config}
        weights = out / name / "model.safetensors"
        if weights.is_file():
            narrower["in_features"] = len(hidden)
            _narrow_columns(weights, hidden)
        if narrower:
            write_json(out / name / "config.json", json.loads(json.dumps(config)) | narrower)


def _narrow_columns(weights: Path, hidden: Indices) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    if set(tensors) - {"linear.bias"} != {"linear.weight"}:
        what = f"{weights.parent.name} has weights that are not a Dense module's"
        raise StageFailed("prune-groups.keep.hidden", what, "leave hidden out")
    tensors["linear.weight"] = tensors["linear.weight"][:, list(hidden)].contiguous()
    save_file(tensors, weights)
