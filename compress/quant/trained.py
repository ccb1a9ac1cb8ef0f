"""A model whose weights are fake-quantised in place, to be trained; and back into a model with codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import StageFailed
from compress.quant.fake import fake_quant, inside_cells, straight_through, whole_codes
from compress.quant.modules import exchange, let_go_of_weight, output_head, set_weight
from compress.quant.qtensor import QTensor
from compress.quant.rounding import quantize, round_activations
from compress.quant.schemes import Scheme

Learn = Literal["weights", "scales", "both"]
ACTIVATIONS = Scheme("uint8", bits=8, symmetric=False)
"""What `QuantizeLinear` makes of a tensor of activations, taken as one row."""
_LEAST_INPUT_SCALE = 1e-20
"""What is divided by it stays finite."""


@dataclass(frozen=True)
class Trained:
    """What is trained of one quantised weight (N, K): shared by an embedding and a head that is tied to it.

    weight: the float weight, or the codes where only scales are learnt. scale, zero_point: of the blocks, flat, so that
    no optimiser takes them for a matrix, which decays; input_scale, input_zero_point: of static activations, (1,).
    """

    scheme: Scheme
    weight: nn.Parameter
    scale: nn.Parameter
    zero_point: nn.Parameter | None = None
    input_scale: nn.Parameter | None = None
    input_zero_point: nn.Parameter | None = None

    @classmethod
    def of(cls, qtensor: QTensor, weight_NK: Tensor, learn: Learn) -> Trained:
        """Starts where the codes are `qtensor`'s and, as far as they allow, the weights `weight_NK`."""

        def flat(tensor: Tensor | None, learnt: bool) -> nn.Parameter | None:
            return None if tensor is None else nn.Parameter(tensor.detach().float().flatten().clone(), learnt)

        ranges = learn != "weights"
        codes = qtensor.codes.contiguous()  # a part-filled last block leaves a view, which no checkpoint can hold
        weight = codes if learn == "scales" else inside_cells(weight_NK, qtensor)
        return cls(
            qtensor.scheme, nn.Parameter(weight, learn != "scales"), cast(nn.Parameter, flat(qtensor.scale, ranges)),
            flat(qtensor.zero_point, learn == "both"),
            flat(qtensor.input_scale, ranges), flat(qtensor.input_zero_point, ranges),
        )  # fmt: skip


class FakeQuantised(nn.Module):
    """A module that computes with the quantised values of `trained.weight`, whose parameters it has by their names."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.scheme = trained.scheme
        self.weight, self.scale, self.zero_point = trained.weight, trained.scale, trained.zero_point
        self.input_scale, self.input_zero_point = trained.input_scale, trained.input_zero_point

    def blocks(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points (N, K_blocks)."""
        zero = self.zero_point
        return self.scale.view(len(self.weight), -1), None if zero is None else zero.view(len(self.weight), -1)

    def input_range(self) -> tuple[Tensor, Tensor] | None:
        """Scale, which is positive wherever training moves `input_scale`, and zero point (1,) of static activations."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return self.input_scale.abs().clamp(min=_LEAST_INPUT_SCALE), self.input_zero_point

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The codes and scales that the forward pass computes with, to the bit. Raises ValueError for NaN scales."""
        scale_NG, zero_NG = self.blocks()
        zero = None if zero_NG is None else whole_codes(zero_NG, self.scheme).to(torch.uint8)
        codes = self.weight.detach()
        if codes.is_floating_point():
            codes = quantize(codes, self.scheme, scale_NG, zero).codes
        result = QTensor(codes, scale_NG.detach().clone(), zero, self.scheme)
        if (given := self.input_range()) is None:
            return result
        input_zero = whole_codes(given[1], ACTIVATIONS).to(torch.uint8)[0]
        return replace(result, input_scale=given[0][0], input_zero_point=input_zero)

    def rates(self, share: float) -> dict[str, float]:
        """Learning rates by parameter: `share` of the median scale a step, and of all codes for zero points."""
        codes = self.scheme.limits[1] - self.scheme.limits[0]
        rates = {"scale": self.scale.detach().abs().median().item(), "zero_point": codes, "input_zero_point": 255}
        if self.input_scale is not None:
            rates["input_scale"] = self.input_scale.item()
        return {name: share * rate for name, rate in rates.items() if getattr(self, name) is not None}


class FakeQuantLinear(FakeQuantised):
    """What `QuantLinear` computes, x (…, K) → (…, N), differentiable. accuracy_level: of steps, and of evaluations."""

    def __init__(
        self, trained: Trained, bias: nn.Parameter | None, accuracy_level: int = 0, evaluated: int | None = None
    ) -> None:
        super().__init__(trained)
        self.bias = bias
        self._levels = {True: accuracy_level, False: accuracy_level if evaluated is None else evaluated}

    @property
    def accuracy_level(self) -> int:
        """That of what it computes now."""
        return self._levels[self.training]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        weight_NK = fake_quant(self.weight, *self.blocks(), self.scheme, dtype)
        return functional.linear(self._rounded(x), weight_NK, self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        if (given := self.input_range()) is not None:
            scale, zero = given
            return fake_quant(x.float().reshape(1, -1), scale[None], zero[None], ACTIVATIONS).view(x.shape)
        if self.scheme.blockwise and self.accuracy_level != 4:
            return x
        with torch.no_grad():
            rounded = round_activations(x.float(), self.scheme, accuracy_level=self.accuracy_level)
        return straight_through(x, rounded)


class FakeQuantEmbedding(FakeQuantised):
    """What `QuantEmbedding` computes, ids (…) → (…, hidden), differentiable. Rounds only the rows that are read."""

    def forward(self, ids: Tensor) -> Tensor:
        scale_NG, zero_NG = self.blocks()
        weight, scale = functional.embedding(ids.flatten(), self.weight), functional.embedding(ids.flatten(), scale_NG)
        zero = None if zero_NG is None else functional.embedding(ids.flatten(), zero_NG)
        return fake_quant(weight, scale, zero, self.scheme).view(*ids.shape, -1)


class FakeQuantisation:
    """Puts fake-quantised modules in place of a model's own, which have no weights meanwhile, until `remove`.

    tensors: the codes and scales to start from, by weight name. weights: float weights (N, K) by the same names.
    accuracy_level: `MatMulNBits`' of training steps; evaluated: and that out of training mode, where it is another.
    A head that is tied to a quantised embedding trains the embedding's weight, scales and zero points.
    """

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, QTensor], weights: Mapping[str, Tensor], learn: Learn,
        accuracy_level: int = 0, evaluated: int | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._own: dict[str, nn.Module] = {}
        self._fakes: dict[str, FakeQuantised] = {}
        head = output_head(model)
        for name, qtensor in tensors.items():
            trained, path = Trained.of(qtensor, weights[name], learn), name.removesuffix(".weight")
            module: Any = model.get_submodule(path)
            if not isinstance(module, nn.Embedding):
                self._put(path, FakeQuantLinear(trained, module.bias, accuracy_level, evaluated))
                continue
            if head and cast(Any, head[1]).weight is module.weight:
                bias = cast(Any, head[1]).bias
                self._put(head[0], FakeQuantLinear(trained, bias, accuracy_level, evaluated))
            self._put(path, FakeQuantEmbedding(trained))
        self._names = list(tensors)
        for own in self._own.values():
            let_go_of_weight(own)

    def rates(self, share: float) -> dict[str, float]:
        """The learning rates of scales and zero points by their names in the model: see FakeQuantised.rates."""
        return {
            f"{path}.{name}": rate for path, fake in self._fakes.items() for name, rate in fake.rates(share).items()
        }

    def remove(self, *, rounded: bool = True) -> dict[str, QTensor]:
        """Give the model its own modules back and return their codes and scales by weight name.

        rounded: they get the weights that the codes stand for; else the float ones, to go on from. Raises StageFailed
        where training has left a scale that is no number.
        """
        tensors = {name: self._qtensor(name) for name in self._names}
        for path, own in self._own.items():
            if f"{path}.weight" in tensors:
                weight_NK = self._fakes[path].weight.detach()
                set_weight(own, tensors[f"{path}.weight"].dequantize() if rounded else weight_NK)
            exchange(self._model, path, own)
        return tensors

    def _qtensor(self, name: str) -> QTensor:
        try:
            return self._fakes[name.removesuffix(".weight")].qtensor()
        except ValueError as error:
            raise StageFailed(name, f"training diverged: {error}", "lower scale_learning_rate") from error

    def _put(self, path: str, fake: FakeQuantised) -> None:
        self._own[path] = self._model.get_submodule(path)
        self._fakes[path] = fake
        exchange(self._model, path, fake)
