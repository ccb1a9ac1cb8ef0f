"""What reaches each projection on calibration text, gathered layer by layer: one layer's is in memory at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.parts import Parts
from compress.quant.modules import weight_of
from compress.quant.rounding import round_activations
from compress.quant.schemes import Scheme

Range = tuple[Tensor, Tensor]
"""Scale (float32) and zero point (uint8), both scalars."""


class _Reached(Exception):
    """Unwinds a forward pass that has reached the first layer."""


class LayerWalk:
    """Hidden states of calibration text on their way through the layers of a model.

    ids_BT: token ids, all blocks of one length, without padding. Memory: B·T·hidden floats, and what one layer makes of
    one batch.
    """

    def __init__(self, parts: Parts, ids_BT: Tensor, batch_size: int = 4) -> None:
        self.parts, self.layers = parts, parts.layers
        self._batches = torch.split(ids_BT, batch_size)
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # masks are of one number of rows
        self.hidden: list[Tensor] = []
        self._capture(parts)

    def look(self, index: int) -> None:
        """Run layer `index`, which must be the next, for what watches it. Raises as `step` does."""
        for _ in self._outputs(index):
            pass

    def step(self, index: int) -> None:
        """Take the hidden states through layer `index`, which must be the next.

        Raises CompressError where it gives NaN or infinity.
        """
        for batch, output_BTD in enumerate(self._outputs(index)):
            self.hidden[batch] = output_BTD

    @torch.no_grad()
    def _outputs(self, index: int) -> Iterator[Tensor]:
        for hidden_BTD in self.hidden:
            args, kwargs = self._calls[len(hidden_BTD)][index]
            output = self.layers[index](hidden_BTD, *args, **kwargs)
            output_BTD: Tensor = output[0] if isinstance(output, tuple) else output
            if not output_BTD.isfinite().all():
                what = "gives NaN or infinite activations on the calibration text"
                raise CompressError(self.parts.layer_path(index), what, "check the model: does it evaluate?")
            yield output_BTD

    def _capture(self, parts: Parts) -> None:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.setdefault(len(args[0]), []).append((args[1:], kwargs))

        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append(args[0])
            raise _Reached

        options = {"use_cache": False} if parts.family.kind == "decoder" else {}
        sizes = {len(ids): ids for ids in self._batches}
        with torch.no_grad(), _pre_hooks(self.layers, record):
            for ids in sizes.values():
                parts.backbone(ids, **options)
        with torch.no_grad(), _pre_hooks(self.layers[:1], stop):
            for ids in self._batches:
                try:
                    parts.backbone(ids, **options)
                except _Reached:
                    continue


class Watcher(ABC):
    """Gathers something of the inputs of modules; modules that are given the very same tensor share it."""

    def __init__(self) -> None:
        self._owner: dict[nn.Module, nn.Module] = {}
        self._last: tuple[Tensor, nn.Module] | None = None

    def groups(self) -> list[list[nn.Module]]:
        """Modules by shared input, in the order in which they were called."""
        heads = dict.fromkeys(self._owner.values())
        return [[module for module, owner in self._owner.items() if owner is head] for head in heads]

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Gather from every call of `modules` inside the block."""
        with _pre_hooks(modules, self._record):
            yield
        self._last = None

    @abstractmethod
    def add(self, owner: nn.Module, x_RK: Tensor) -> None:
        """Take in rows of `owner`'s input."""

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0]
        if self._last is not None and self._last[0] is x:
            self._owner[module] = self._last[1]
            return
        self._last, self._owner[module] = (x, module), module
        self.add(module, x.detach().reshape(-1, x.shape[-1]))


class Moments(Watcher):
    """E[x xᵀ] (K, K)."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[nn.Module, Tensor] = {}
        self._rows: dict[nn.Module, int] = {}

    def __getitem__(self, module: nn.Module) -> Tensor:
        owner = self._owner[module]
        return self._sums[owner] / self._rows[owner]

    def add(self, owner: nn.Module, x_RK: Tensor) -> None:
        self._sums[owner] = self._sums.get(owner, 0) + x_RK.T @ x_RK
        self._rows[owner] = self._rows.get(owner, 0) + len(x_RK)


class RoundingErrors:
    """What rounding the activations per tensor does to the outputs of modules: mean over tokens of ‖Δy‖²/‖y‖².

    Each sequence is rounded on its own. A mean over all outputs would hide it: where one token has outliers, its own
    output is the largest by far, and hardly changed. ranges: of the modules whose scheme is static.
    """

    def __init__(self, schemes: Mapping[nn.Module, Scheme], ranges: Mapping[nn.Module, Range]) -> None:
        self._schemes, self._ranges = schemes, ranges
        self._shares: dict[nn.Module, list[Tensor]] = {}

    def __getitem__(self, module: nn.Module) -> float:
        return torch.cat(self._shares[module]).mean().item()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Gather from every call of the modules inside the block."""
        with _pre_hooks(list(self._schemes), self._record):
            yield

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight_NK = weight_of(module)
        scheme, own_range = self._schemes[module], self._ranges.get(module)
        for x_TK in args[0]:
            change_TN = (x_TK - round_activations(x_TK, scheme, input_range=own_range)) @ weight_NK.T
            energy_T = (x_TK @ weight_NK.T).square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            self._shares.setdefault(module, []).append(change_TN.square().sum(-1) / energy_T)


@contextmanager
def _pre_hooks(modules: Sequence[nn.Module] | nn.ModuleList, hook: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
