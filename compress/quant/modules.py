"""Torch modules that compute what the exported operators compute, and their exchange for a model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.quant.qtensor import QTensor
from compress.quant.rounding import round_activations


class QuantLinear(nn.Module):
    """`MatMulNBits`, or `MatMulInteger` behind `DynamicQuantizeLinear` or `QuantizeLinear`: x (…, K) → (…, N)."""

    weight: Tensor

    def __init__(self, qtensor: QTensor, bias: Tensor | None, accuracy_level: int = 0) -> None:
        super().__init__()
        self.qtensor, self.accuracy_level = qtensor, accuracy_level
        self.register_buffer("weight", qtensor.dequantize(), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        own = self.qtensor
        rounded = round_activations(x, own.scheme, accuracy_level=self.accuracy_level, input_range=own.input_range)
        return functional.linear(rounded, self.weight, self.bias)


class QuantEmbedding(nn.Module):
    """`GatherBlockQuantized`: token ids (…) → (…, hidden)."""

    weight: Tensor

    def __init__(self, qtensor: QTensor) -> None:
        super().__init__()
        self.qtensor = qtensor
        self.register_buffer("weight", qtensor.dequantize(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)


def replace_modules(model: nn.Module, tensors: Mapping[str, QTensor], accuracy_level: int = 0) -> None:
    """Put quantised modules in place of those whose weights `tensors` names (`X.weight`).

    A head that is tied to a quantised embedding gets the embedding's codes.
    """
    head = output_head(model)
    for name, qtensor in tensors.items():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            if head and cast(Any, head[1]).weight is module.weight:
                exchange(model, head[0], QuantLinear(qtensor, cast(Any, head[1]).bias, accuracy_level))
            exchange(model, path, QuantEmbedding(qtensor))
        else:
            exchange(model, path, QuantLinear(qtensor, cast(Any, module).bias, accuracy_level))


def output_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(path, module) of a language model's output head; None where there is none."""
    head = cast(Any, model).get_output_embeddings()
    return next(((path, module) for path, module in model.named_modules() if module is head), None) if head else None


def exchange(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in place of the one at `path`, in the same mode (training or not) as the model."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.train(model.training))


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear, Embedding or GPT-2 Conv1D as (N, K) = (output, input) float32; may share memory."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = cast(Any, module).weight.detach().float()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def set_weight(module: nn.Module, weight_NK: Tensor) -> None:
    """Overwrite a module's weight by (N, K) values: the inverse of `weight_of`."""
    from transformers.pytorch_utils import Conv1D

    own, values = cast(Any, module).weight, weight_NK.T if isinstance(module, Conv1D) else weight_NK
    with torch.no_grad():
        if own.shape != values.shape:  # of one that was let go
            own.data = own.new_empty(values.shape)
        own.copy_(values)


def let_go_of_weight(module: nn.Module) -> None:
    """Free the memory of a module's weight, also where another module has it, until `set_weight` gives it another."""
    weight = cast(Any, module).weight
    weight.data = weight.new_empty(0)
