"""Second moments of what reaches each projection, gathered layer by layer: one layer's are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.parts import Parts
from compress.quant.modules import weight_of
from compress.quant.schemes import Scheme, round_activations


class _Reached(Exception):
    """Unwinds a forward pass that has reached the first layer."""


class LayerWalk:
    """Hidden states of calibration text on their way through the layers of a model.

    ids_BT: token ids, all blocks of one length, without padding. Memory: B·T·hidden floats.
    """

    def __init__(self, parts: Parts, ids_BT: Tensor, batch_size: int = 4) -> None:
        self.layers = parts.layers
        self._batches = list(torch.split(ids_BT, min(batch_size, len(ids_BT))))
        if len(self._batches[-1]) < len(self._batches[0]):  # masks and positions are captured for one batch shape
            self._batches.pop()
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        self._capture(parts)

    def step(self, index: int) -> None:
        """Take the hidden states through layer `index`, which must be the next."""
        args, kwargs = self._calls[index]
        with torch.no_grad():
            outputs = [self.layers[index](hidden_BTD, *args, **kwargs) for hidden_BTD in self.hidden]
        self.hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]

    def _capture(self, parts: Parts) -> None:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args[1:], kwargs))

        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append(args[0])
            raise _Reached

        options = {"use_cache": False} if parts.family.kind == "decoder" else {}
        with torch.no_grad(), _pre_hooks(self.layers, record):
            parts.backbone(self._batches[0], **options)
        with torch.no_grad(), _pre_hooks(self.layers[:1], stop):
            for ids in self._batches:
                try:
                    parts.backbone(ids, **options)
                except _Reached:
                    continue


class Moments:
    """E[x xᵀ] (K, K) of the inputs of modules; modules that are given the very same tensor share one matrix."""

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._rows: dict[nn.Module, int] = {}
        self._owner: dict[nn.Module, nn.Module] = {}
        self._last: tuple[Tensor, nn.Module] | None = None

    def __getitem__(self, module: nn.Module) -> Tensor:
        owner = self._owner[module]
        return self._sums[owner] / self._rows[owner]

    def groups(self) -> list[list[nn.Module]]:
        """Modules by shared input, in the order in which they were called."""
        return [[m for m, owner in self._owner.items() if owner is head] for head in self._sums]

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Gather from every call of `modules` inside the block."""
        with _pre_hooks(modules, self._record):
            yield
        self._last = None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0]
        if self._last is not None and self._last[0] is x:
            self._owner[module] = self._last[1]
            return
        self._last, self._owner[module] = (x, module), module
        rows = x.detach().reshape(-1, x.shape[-1])
        self._sums[module] = self._sums.get(module, 0) + rows.T @ rows
        self._rows[module] = self._rows.get(module, 0) + len(rows)


class RoundingErrors:
    """What rounding the activations per tensor does to the outputs of modules: mean over tokens of ‖Δy‖²/‖y‖².

    Each sequence is rounded on its own. A mean over all outputs would hide it: where one token has outliers, its own
    output is the largest by far, and hardly changed.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._shares: dict[nn.Module, list[Tensor]] = {}

    def __getitem__(self, module: nn.Module) -> float:
        return torch.cat(self._shares[module]).mean().item()

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Gather from every call of `modules` inside the block."""
        with _pre_hooks(modules, self._record):
            yield

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight_NK = weight_of(module)
        for x_TK in args[0]:
            change_TN = (x_TK - round_activations(x_TK, self._scheme)) @ weight_NK.T
            share_T = change_TN.square().sum(-1) / (x_TK @ weight_NK.T).square().sum(-1)
            self._shares.setdefault(module, []).append(share_T)


@contextmanager
def _pre_hooks(modules: Sequence[nn.Module] | nn.ModuleList, hook: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
