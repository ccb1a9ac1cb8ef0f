"""Mixers made from a model's own attention, and the model with some of them in their places."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.mixers.spec import MixerSpec
from compress.models.convert import new_attention, to_hybrid
from compress.models.parts import Parts
from compress.stages.convert.layers import converted_shape


def converted(
    model: PreTrainedModel, layers: Collection[int], mixer: MixerSpec | None, sliding_window: int | None = None,
    *, own_weights: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A copy of `model` in which `layers` (indices) mix as `mixer` says, from the weights that the model has there.

    mixer: None for softmax over the last `sliding_window` tokens. own_weights: False to take over those of `model`.
    """
    shape = converted_shape(Parts(model).shape, sorted(layers), mixer, guessed=False)
    return to_hybrid(model, shape.mixers, shape.layer_types, sliding_window, own_weights=own_weights)


def new_mixers(
    model: PreTrainedModel, layers: Collection[int], mixer: MixerSpec | None, sliding_window: int | None = None
) -> dict[int, nn.Module]:
    """The mixer that each of `layers` would get, by index; arguments as `converted`'s."""
    shape = converted_shape(Parts(model).shape, sorted(layers), mixer, guessed=False)
    return new_attention(model, layers, shape.mixers, shape.layer_types, sliding_window)


def with_mixers(
    model: PreTrainedModel, mixers: Mapping[int, nn.Module], layers: Collection[int], mixer: MixerSpec | None,
    sliding_window: int | None = None, *, own_weights: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A copy of `model` in which `layers` have copies of their `mixers`; the other arguments as `converted`'s."""
    hybrid = converted(model, layers, mixer, sliding_window, own_weights=own_weights)
    parts = Parts(hybrid)
    for index in layers:
        parts.attention(parts.layers[index]).load_state_dict(mixers[index].state_dict())
    return hybrid


def new_parameters(model: PreTrainedModel) -> Iterator[str]:
    """The names of all that the mixers in `model` have and the attention that they replaced had not."""
    parts = Parts(model)
    names = parts.family.attention
    copied = [f"{leaf}." for leaf in (names.q, names.k, names.v, names.out, names.q_norm, names.k_norm) if leaf]
    for index, spec in enumerate(parts.shape.mixers):
        if spec is not None:
            for name, _ in parts.attention(parts.layers[index]).named_parameters():
                if not name.startswith(tuple(copied)):
                    yield f"{parts.layer_path(index)}.{names.path}.{name}"


def forget_attention(mixers: Mapping[int, nn.Module], model: PreTrainedModel, seed: int) -> None:
    """Draw anew, as for a new model, every matrix that `mixers` have from the attention: the control without it."""
    parts, generator = Parts(model), torch.Generator().manual_seed(seed)
    for index, mixer in mixers.items():
        theirs = dict(parts.attention(parts.layers[index]).named_parameters())
        for name, parameter in mixer.named_parameters():
            if name in theirs and parameter.dim() == 2:
                std = cast(Any, model.config).initializer_range
                with torch.no_grad():
                    parameter.normal_(0.0, std, generator=generator)


@contextlib.contextmanager
def windowed(mixers: Mapping[int, nn.Module], window: int) -> Iterator[None]:
    """Have `mixers` that are softmax attention see their last `window` tokens, in a model that masks no more than the
    future."""

    def mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_BTD = kwargs["hidden_states"]
        ones_TT = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device)
        return args, kwargs | {"attention_mask": ones_TT.tril().triu(1 - window)[None, None]}

    hooks = [mixer.register_forward_pre_hook(mask, with_kwargs=True) for mixer in mixers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
