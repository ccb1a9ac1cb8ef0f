"""A model's forward pass taken apart: layer by layer, again from the middle, and from the last layer to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.parts import Parts


@dataclass(frozen=True)
class Trace:
    """One batch's way through the layers: x_0 … x_L, and what each layer was called with beside its x."""

    layers: nn.ModuleList
    states: Sequence[Tensor]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    @torch.no_grad()
    def of(cls, parts: Parts, ids_BT: Tensor) -> Trace:
        """Run the backbone on `ids_BT`, without a cache, and keep what its layers saw."""
        states: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0].float())
            calls.append((args[1:], kwargs))

        def leave(_: nn.Module, __: object, result: Any) -> None:
            states.append(_first(result).float())

        hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in parts.layers]
        hooks.append(parts.layers[-1].register_forward_hook(leave))
        try:
            parts.backbone(ids_BT, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(parts.layers, states, calls)

    @torch.no_grad()
    def run(self, index: int, x_BTD: Tensor) -> Tensor:
        """What layer `index` makes of another input, with the same masks and positions."""
        args, kwargs = self.calls[index]
        return _first(self.layers[index](x_BTD, *args, **kwargs))


@dataclass(frozen=True)
class Output:
    """What a model says: log-probabilities (…, V), or the last hidden state (…, D) where no head gives classes."""

    values: Tensor
    has_classes: bool

    @property
    def measure(self) -> str:
        """What `distance` is between two of these."""
        return "KL to the full model, nats" if self.has_classes else "1 − cos to the full model's last hidden state"


@torch.no_grad()
def output(parts: Parts, ids_BT: Tensor, x_BTD: Tensor) -> Output:
    """The model's output when `x_BTD` is what leaves its layers: the model's own final norm and head."""
    layers = list(parts.layers)
    parts.replace_layers([_Constant(x_BTD)])
    try:
        logits = getattr(parts.model(ids_BT, use_cache=False), "logits", None)
        if logits is not None and logits.shape[-1] > 1:
            return Output(logits.float().log_softmax(-1), True)
        return Output(parts.backbone(ids_BT, use_cache=False).last_hidden_state.float(), False)
    finally:
        parts.replace_layers(layers)


def distance(target: Output, other: Output) -> Tensor:
    """KL(target ‖ other) in nats at each position; between hidden states 1 − cos."""
    if not target.has_classes:
        return 1 - cosine(target.values, other.values)
    return (target.values.exp() * (target.values - other.values)).sum(-1)


class _Constant(nn.Module):
    """Stands for a whole stack of layers whose result is known."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.result


def _first(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def cosine(a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a_BTD, b_BTD, dim=-1)
