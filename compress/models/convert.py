"""A model as the same model with other mixers in some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import InvalidInput
from compress.mixers import hybrid, hybrid_bert, hybrid_gpt
from compress.mixers.mixer import Mixer
from compress.mixers.noncausal import NonCausalMixer
from compress.mixers.spec import FULL, LINEAR, SLIDING, MixerSpec
from compress.models.anatomy import family_of
from compress.models.load import left_out
from compress.models.parts import Parts
from compress.models.pretrained import with_weights

PREFIX = "Hybrid"


def to_hybrid(
    model: PreTrainedModel,
    mixers: Sequence[MixerSpec | None],
    layer_types: Sequence[str] | None = None,
    sliding_window: int | None = None,
    *,
    own_weights: bool = True,
) -> PreTrainedModel:
    """A hybrid model, in eval mode, with copies of those of `model`'s weights that its layers have a place for.

    model: llama, mistral, qwen2, qwen3 or bert, or a hybrid one, which is converted further. mixers: one entry a layer,
    None where softmax attention stays (or comes back). layer_types: of a decoder; by default `linear_attention` where
    there is a mixer, elsewhere what the layer is in `model`. sliding_window: by default the model's own. What a mixer
    has and the layer had not starts as the mixer's class says. own_weights: False for those of `model` themselves, of
    which one is left. Raises InvalidInput for any other model.
    """
    hybrid_class, config = _described(model, mixers, layer_types, sliding_window)
    weights = _weights(model, _empty(hybrid_class, config), config)
    if own_weights:
        weights = {name: weight.clone() for name, weight in weights.items()}
    converted = with_weights(
        hybrid_class, config, weights, dtype=model.dtype, attn_implementation=model.config._attn_implementation,
        **left_out(_named(hybrid_class, config.to_dict()), weights),
    )  # fmt: skip
    if converted.can_generate():
        converted.generation_config = copy.deepcopy(model.generation_config)
    return cast(PreTrainedModel, converted.to(model.device).eval())


def new_attention(
    model: PreTrainedModel, layers: Collection[int], mixers: Sequence[MixerSpec | None],
    layer_types: Sequence[str] | None = None, sliding_window: int | None = None,
) -> dict[int, nn.Module]:  # fmt: skip
    """The attention blocks that `layers` of the hybrid model would have, with weights of their own, by index.

    Nothing else of that model is made; the other arguments are `to_hybrid`'s.
    """
    hybrid_class, config = _described(model, mixers, layer_types, sliding_window)
    config._attn_implementation = model.config._attn_implementation
    parts = Parts(_empty(hybrid_class, config))
    found = {}
    for index in sorted(layers):
        module = parts.attention(parts.layers[index])
        path = f"{parts.layer_path(index)}.{parts.family.attention.path}."
        weights = _weights(model, module, config, path)
        own = {name.removeprefix(path): weight.to(model.device).clone() for name, weight in weights.items()}
        module.load_state_dict(own, assign=True)
        found[index] = module.requires_grad_(True).train(False)
    return found


def _described(
    model: PreTrainedModel, mixers: Sequence[MixerSpec | None], layer_types: Sequence[str] | None,
    sliding_window: int | None,
) -> tuple[Any, PreTrainedConfig]:  # fmt: skip
    """The class and the config of a hybrid model. Raises InvalidInput where there is none."""
    hybrid_class = _hybrid_class(model)
    if not family_of(model.config.model_type).takes_mixers:
        raise InvalidInput("model", f"{type(model).__name__} has no layers with mixers", "convert a llama or bert")
    config_class = hybrid_class.config_class
    keys = model.config.to_dict() | {
        "model_type": config_class.model_type,
        "mixers": [None if spec is None else spec.to_json() for spec in mixers],
    }
    if issubclass(config_class, hybrid.HybridConfig):
        keys["layer_types"] = list(layer_types or _layer_types(model.config, mixers))
        keys["sliding_window"] = sliding_window or getattr(model.config, "sliding_window", None)
    return hybrid_class, config_class.from_dict(keys)


def _named(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a model of that class, whatever class it was before."""
    return {**config, "architectures": [model_class.__name__]}


def _hybrid_class(model: PreTrainedModel) -> Any:
    """Our own class of a model's family and head. Raises InvalidInput where there is none."""
    classes = {cls.__name__: cls for module in (hybrid, hybrid_bert, hybrid_gpt) for cls in module.AUTO_CLASSES}
    found = classes.get(PREFIX + type(model).__name__.removeprefix(PREFIX))
    if found is None:
        known = ", ".join(name.removeprefix(PREFIX) for name in classes)
        raise InvalidInput("model", f"{type(model).__name__} has no hybrid form", f"these have: {known}")
    return found


def _empty(hybrid_class: Any, config: PreTrainedConfig) -> Any:
    """A hybrid without weights."""
    with torch.device("meta"):
        return hybrid_class(config)


def _weights(
    model: PreTrainedModel, empty: nn.Module, config: PreTrainedConfig, path: str = ""
) -> dict[str, Tensor]:
    """The weights of `empty`, a hybrid or what it has at `path`: the model's own, a new mixer's for what that lacks."""
    needed = {path + name for name in empty.state_dict()}
    weights = {name: weight.detach() for name, weight in model.state_dict().items() if name in needed}
    for name, module in empty.named_modules():
        if isinstance(module, Mixer | NonCausalMixer):
            prefix = path + (f"{name}." if name else "")
            with torch.random.fork_rng(devices=[]):  # its projections' own weights are drawn, and left out
                own = type(module)(config, module.layer_idx).state_dict()
            weights = {prefix + leaf: weight for leaf, weight in own.items()} | weights
    return weights


def _layer_types(config: PreTrainedConfig, mixers: Sequence[MixerSpec | None]) -> list[str]:
    window = getattr(config, "sliding_window", None)
    before = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * len(mixers)
    softmax = [FULL if layer_type == LINEAR else layer_type for layer_type in before]
    return [kept if spec is None else LINEAR for kept, spec in zip(softmax, mixers, strict=True)]


def narrowed(
    model: PreTrainedModel, changes: Mapping[str, Any], weights: Mapping[str, Tensor],
    layer_widths: Sequence[Mapping[str, int]] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A model of other widths with `weights`, in eval mode, whose config is `model`'s but for `changes`.

    It is of the same class where the config can say the widths; else, where layers differ (`layer_widths`) or a head's
    size is no longer hidden_size / num_attention_heads in a family that ties them, of our own.
    """
    config = model.config.to_dict() | dict(changes)
    model_class: Any = type(model)
    tied = family_of(str(config["model_type"])).tied_heads
    if layer_widths is not None or (tied and "head_dim" in changes):
        model_class = _hybrid_class(model)
        config |= {"model_type": model_class.config_class.model_type}
        config |= {"layer_widths": list(layer_widths)} if layer_widths is not None else {}
        if "sliding_window" in config and not config.get("layer_types"):
            config["layer_types"] = _layer_types(model.config, [None] * model.config.num_hidden_layers)
    config.pop("auto_map", None)
    smaller = with_weights(
        model_class, model_class.config_class.from_dict(config), weights, dtype=model.dtype,
        attn_implementation=model.config._attn_implementation, **left_out(_named(model_class, config), weights),
    )  # fmt: skip
    if smaller.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return cast(PreTrainedModel, smaller.eval())
