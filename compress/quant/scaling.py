"""Factors of input channels, folded into what is before them: AWQ's and SmoothQuant's.

y = (x / s)·(W·s)ᵀ is the same for every s. W·s is stored; the division goes into the norm or the projection that made
x, where nothing else reads that. AWQ (Lin et al. 2023, arXiv:2306.00978) gives channels with large activations large
factors: their weights are rounded finer. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) gives them to channels with
outliers: x / s has a smaller range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.models.anatomy import ModelShape
from compress.models.parts import Parts
from compress.quant.calibrate import Watcher
from compress.quant.modules import set_weight, weight_of
from compress.quant.rounding import quantize
from compress.quant.schemes import Scheme
from compress.quant.search import output_error

ALPHAS = tuple(step / 10 for step in range(11))
"""Exponents that AWQ compares; 0 leaves the weights as they are."""
LEAST = 1e-4
"""A factor is at least this, and at most its inverse."""


@dataclass(frozen=True)
class Fold:
    """Inputs of `readers` that can be divided where `writer` (a norm or a projection) makes them.

    source_K: the output of `writer` that each of their K input channels is. Several channels may be one output: value
    heads that query heads share.
    """

    writer: nn.Module
    source_K: Tensor
    readers: tuple[nn.Module, ...]

    def tied(self, statistic_K: Tensor, reduce: str) -> Tensor:
        """`statistic_K` with its `mean` or `amax` over the channels that are one output."""
        own_N = torch.zeros(int(self.source_K.max()) + 1)
        own_N.scatter_reduce_(0, self.source_K, statistic_K, reduce, include_self=False)
        return own_N[self.source_K]

    def apply(self, factor_K: Tensor) -> None:
        """Multiply the readers' weights by `factor_K` and divide the writer; factors of one output must be equal."""
        writer = cast(Any, self.writer)
        weight_NK = writer.weight.detach() if writer.weight.dim() == 1 else weight_of(writer)
        factor_N = torch.ones(len(weight_NK))
        factor_N[self.source_K] = factor_K
        with torch.no_grad():
            if writer.weight.dim() == 1:
                writer.weight.div_(factor_N)
            else:
                set_weight(writer, weight_NK / factor_N[:, None])
            if getattr(writer, "bias", None) is not None:
                writer.bias.div_(factor_N)
        for reader in self.readers:
            set_weight(reader, weight_of(reader) * factor_K)


def folds(parts: Parts, index: int) -> Iterator[Fold]:
    """Every place in layer `index` where factors leave its function as it is.

    Not behind the norms of a post-norm layer, whose output is the residual too; not through an activation function
    (an MLP without a gate); and not where a mixer reads the norm's output or the values by its own ways.
    """
    layer, family, softmax = parts.layers[index], parts.family, _is_softmax(parts, index)
    attention, mlp = family.attention, family.mlp
    inputs = [f"{attention.path}.{leaf}" for leaf in (attention.q, attention.k, attention.v, attention.qkv) if leaf]
    every_K = torch.arange(parts.shape.hidden_size)
    if parts.shape.residual != "post":
        readers = [*(inputs if softmax else ())], [path for path in (mlp.gate, mlp.up) if path]
        for norm, paths in zip((family.attention_norm, family.mlp_norm), readers, strict=True):
            if paths:
                yield Fold(layer.get_submodule(norm), every_K, tuple(map(layer.get_submodule, paths)))
    if softmax:
        values = layer.get_submodule(f"{attention.path}.{attention.v or attention.qkv}")
        out = layer.get_submodule(f"{attention.path}.{attention.out}")
        yield Fold(values, _value_rows(parts.shape.of_layer(index)), (out,))
    if mlp.gate:
        every_I = torch.arange(parts.shape.of_layer(index).intermediate_size)
        yield Fold(layer.get_submodule(mlp.up), every_I, (layer.get_submodule(mlp.down),))


def unfolded(parts: Parts) -> list[str]:
    """Paths of the projections whose inputs no factor can be folded into: `layers.0.mlp.down_proj`."""
    found = []
    for index, layer in enumerate(parts.layers):
        reached = {reader for fold in folds(parts, index) for reader in fold.readers}
        missed = (path for path, module in parts.projections(layer) if module not in reached)
        found += [f"{parts.layer_path(index)}.{path}" for path in missed]
    return found


def _is_softmax(parts: Parts, index: int) -> bool:
    mixers = parts.shape.mixers
    return not mixers or mixers[index] is None


def _value_rows(shape: ModelShape) -> Tensor:
    """The row of the value projection, or of the fused one, that each input channel of a layer's output one is."""
    attention = shape.family.attention
    heads = torch.arange(shape.num_attention_heads)[:, None] // (shape.num_attention_heads // shape.num_key_value_heads)
    within = torch.arange(shape.head_dim)
    if attention.qkv_layout == "per_head":
        return ((3 * heads + 2) * shape.head_dim + within).flatten()
    before = 2 * shape.num_attention_heads * shape.head_dim if attention.qkv_layout == "stacked" else 0
    return (before + heads * shape.head_dim + within).flatten()


class Magnitudes(Watcher):
    """Mean and largest |x| of each input channel."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[nn.Module, Tensor] = {}
        self._rows: dict[nn.Module, int] = {}
        self._largest: dict[nn.Module, Tensor] = {}

    def mean(self, module: nn.Module) -> Tensor:
        """(K,)"""
        owner = self._owner[module]
        return self._sums[owner] / self._rows[owner]

    def largest(self, module: nn.Module) -> Tensor:
        """(K,)"""
        return self._largest[self._owner[module]]

    def add(self, owner: nn.Module, x_RK: Tensor) -> None:
        magnitude_RK = x_RK.abs()
        self._sums[owner] = self._sums.get(owner, 0) + magnitude_RK.sum(0)
        self._rows[owner] = self._rows.get(owner, 0) + len(x_RK)
        self._largest[owner] = torch.maximum(self._largest.get(owner, magnitude_RK[0]), magnitude_RK.amax(0))


def smoothquant_factors(largest_K: Tensor, weights: Sequence[Tensor], smoothing: float) -> Tensor:
    """max|x|^α / max|w|^(1−α) of each channel. weights: (N, K) each."""
    weight_K = torch.cat(list(weights)).abs().amax(0)
    return _centred(largest_K**smoothing / weight_K ** (1 - smoothing))


def awq_factors(
    mean_K: Tensor, weights: Sequence[Tensor], schemes: Sequence[Scheme], moment_KK: Tensor
) -> tuple[Tensor, float]:
    """mean|x|^α with the α in ALPHAS whose rounded weights change the outputs least, and that α."""
    factors = {alpha: _centred(mean_K**alpha) for alpha in ALPHAS}

    def error(alpha: float) -> float:
        factor_K, total = factors[alpha], 0.0
        for weight_NK, scheme in zip(weights, schemes, strict=True):
            rounded_NK = quantize(weight_NK * factor_K, scheme).dequantize() / factor_K
            total += output_error(weight_NK, rounded_NK, moment_KK)
        return total

    best = min(ALPHAS, key=error)
    return factors[best], best


def _centred(factor_K: Tensor) -> Tensor:
    """Factors around 1, within bounds; 1 for a channel that has none, because it is always zero."""
    log_K = factor_K.log()
    known_K = log_K.isfinite()
    centre = log_K[known_K].mean() if known_K.any() else log_K.new_zeros(())
    return (log_K - centre).where(known_K, 0.0).exp().clamp(LEAST, 1 / LEAST)
