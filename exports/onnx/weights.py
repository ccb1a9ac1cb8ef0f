"""A model as the exporter sees it: shape, config and tensors by name, plain or quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.mixers.spec import MixerSpec
from compress.models.anatomy import ModelShape
from compress.quant.qtensor import QTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CacheScales:
    """What a code of the int8 cache stands for: a scale for each channel `(G, D)` of keys, rotated, and of values."""

    keys_GD: NDArray[np.float32]
    values_GD: NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """shape and config: what `config.json` says. tensors: by state-dict name. prefix: the backbone's (`model.`).

    rotary: cos and sin `(max_position_embeddings, rotary_dim / 2)` where positions are rotary. cache_scales: by layer,
    where keys and values are cached as int8. prompt: the weights that read prompts, of those that have others for it.
    """

    shape: ModelShape
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor | QTensor]
    prefix: str
    rotary: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    cache_scales: Mapping[int, CacheScales] = field(default_factory=dict)
    prompt: Mapping[str, QTensor] = field(default_factory=dict)

    @property
    def reading(self) -> Model:
        """As it reads prompts."""
        return replace(self, tensors={**self.tensors, **self.prompt})

    @property
    def mixers(self) -> tuple[MixerSpec | None, ...]:
        """What stands in place of each layer's softmax attention; None where that stays."""
        return self.shape.mixers or (None,) * self.shape.num_hidden_layers

    def key(self, common: str, default: Any = None) -> Any:
        """A value of the config by Hugging Face's common key."""
        return self.config.get(self.shape.family.key(common), default)

    def layer(self, index: int, path: str) -> str:
        """The state-dict name of a layer's module."""
        return f"{self.prefix}{self.shape.family.layers}.{index}.{path}"

    def has(self, path: str) -> bool:
        """Whether there is a module with a weight at `path`."""
        return f"{path}.weight" in self.tensors

    def matrix(self, path: str) -> Tensor | QTensor:
        """A module's weight as `(N, K)` = (output, input) channels."""
        weight = self.tensors[f"{path}.weight"]
        is_conv1d = self.shape.family.conv1d and path.startswith(f"{self.prefix}{self.shape.family.layers}.")
        return weight.T if is_conv1d and not isinstance(weight, QTensor) else weight

    def bias(self, path: str) -> NDArray[np.float32] | None:
        """A module's bias, or None."""
        bias = self.tensors.get(f"{path}.bias")
        return None if bias is None else array(cast("Tensor", bias))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A plain tensor by its full name."""
        return array(cast("Tensor", self.tensors[name]))


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A float32 array that shares the tensor's memory where it can."""
    values: NDArray[np.float32] = tensor.detach().float().numpy()
    return values


def stack_rows(matrices: Sequence[Tensor | QTensor], rows: NDArray[np.int64] | None = None) -> Tensor | QTensor:
    """Matrices of one kind one below the other, their output channels then reordered by `rows` (−1: all zeros)."""
    import torch

    if rows is not None and (rows < 0).any():
        matrices = [*matrices, _zero_row(matrices[0])]
    if isinstance(matrices[0], QTensor):
        quantised = cast("Sequence[QTensor]", matrices)
        zeros = [matrix.zero_point for matrix in quantised if matrix.zero_point is not None]
        codes = torch.cat([matrix.codes for matrix in quantised])
        scale = torch.cat([matrix.scale for matrix in quantised])
        zero = torch.cat(zeros) if zeros else None
        if rows is not None:
            codes, scale, zero = codes[rows], scale[rows], None if zero is None else zero[rows]
        return replace(quantised[0], codes=codes, scale=scale, zero_point=zero)
    plain = cast("Sequence[Tensor]", matrices)
    whole = plain[0] if len(plain) == 1 else torch.cat(list(plain))
    return whole if rows is None else whole[torch.from_numpy(rows)]


def _zero_row(like: Tensor | QTensor) -> Tensor | QTensor:
    """One more output channel, whose weights are all zero."""
    if not isinstance(like, QTensor):
        return like.new_zeros(1, like.shape[1])
    codes, scale = like.codes[:1].clone(), like.scale[:1].clone()
    zero = None if like.zero_point is None else like.zero_point[:1].clone().fill_(like.scheme.midpoint)
    return replace(like, codes=codes.fill_(like.scheme.midpoint), scale=scale.fill_(1), zero_point=zero)


def stackable(matrices: Sequence[Tensor | QTensor]) -> bool:
    """Whether matrices are of one kind, so that one operator can do all of them."""
    return len({_kind(matrix) for matrix in matrices}) == 1


def _kind(matrix: Tensor | QTensor) -> tuple[Any, ...]:
    """What matrices side by side must have in common: the scheme, and the range of their input where one is stored."""
    if not isinstance(matrix, QTensor):
        return ()
    return matrix.scheme, *(value.item() for value in matrix.input_range or ())
