"""Taking layers out of a model so that what is left is an ordinary, smaller model of the same class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from compress.errors import StageFailed
from compress.models.origins import Origins
from compress.models.parts import Parts
from compress.stages.prune.layers import SCALED


def drop_layers(model: PreTrainedModel, dropped: Collection[int]) -> None:
    """Remove the layers `dropped` (indices) from `model`, in its modules and in its config, in place.

    The result computes what `model` would if those layers passed their input on unchanged. Raises StageFailed for a
    GPT-2 whose attention is scaled by the layer's own number.
    """
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise StageFailed("prune-layers", SCALED.what, SCALED.fix)
    parts, before = Parts(model), Origins.of(config.to_dict())
    kept = [index for index in range(len(parts.layers)) if index not in dropped]
    parts.replace_layers([parts.layers[index] for index in kept])
    for index, layer in enumerate(parts.layers):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # an attention's place in the cache
                module.layer_idx = index
    for key in ("layer_types", "mixers", "layer_widths"):
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[index] for index in kept])
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    setattr(config, parts.family.key("num_hidden_layers"), len(kept))
    after = replace(before, layers=tuple(before.layers[i] for i in kept), heads=tuple(before.heads[i] for i in kept))
    for name, value in after.keys().items():
        setattr(config, name, value)
