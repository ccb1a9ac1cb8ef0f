"""Scales and codes with the least error: of the weights, of the output, and with each error fed forward (GPTQ).

All errors are tr(E H Eᵀ) with E = W − Ŵ (N, K) and H = E[x xᵀ] (K, K): the mean square of the output's error. `search`
takes its diagonal, `gptq` (Frantar et al. 2022, arXiv:2210.17323) all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.grid import search_grid
from compress.quant.qtensor import ROWS, QTensor
from compress.quant.rounding import quantize
from compress.quant.schemes import Scheme

SHRINKAGE = 0.3
"""Share of each correlation between channels that is not believed: a few thousand tokens of one text do not tell them
exactly, and GPTQ fits to what they tell. Measured: benchmarks/results/int4-search_smollm2-135m.md."""
DAMPING = 1e-3
LAZY = 128
"""Columns whose errors reach the columns far behind in one product (a multiple of every block size)."""


def search_scales(weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None) -> QTensor:
    """The codes nearest to the weights on the grid that `search_grid` finds for the same importance."""
    rows = torch.split(weight_NK, ROWS)
    return QTensor.joined([quantize(each, scheme, *search_grid(each, scheme, importance_K)) for each in rows])


def output_error(weight_NK: Tensor, rounded_NK: Tensor, moment_KK: Tensor | None) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the output's mean square error relative to the output's mean square.

    Without a moment, the weight's own: H = 1. 0 where there is no output, and none after rounding.
    """
    rows = list(zip(torch.split(weight_NK, ROWS), torch.split(rounded_NK, ROWS), strict=True))
    energy = torch.stack([_energy(whole, moment_KK) for whole, _ in rows]).sum()
    error = torch.stack([_energy(whole - rounded, moment_KK) for whole, rounded in rows]).sum()
    return (error / energy.clamp(min=torch.finfo(torch.float32).tiny)).item()


def gptq(
    weight_NK: Tensor, scheme: Scheme, moment_KK: Tensor, *, act_order: bool = False, shrinkage: float = SHRINKAGE
) -> QTensor:
    """Codes found one input channel after another, each one's error fed to those still open (GPTQ).

    A block's scale is searched when it is reached, on weights that carry the errors so far, weighted as GPTQ weights
    errors. act_order: channels of large activations come first, while many are open to make good for them. Blocks must
    stay where `MatMulNBits` has them, and the channels of one are reached at different times: so all scales are
    searched beforehand, on the weights as they are ("static groups"). shrinkage: from 0, `moment_KK` as it is, to 1,
    its diagonal alone, which feeds nothing forward.
    """
    order_K = torch.arange(len(moment_KK))
    if act_order:
        order_K = moment_KK.diagonal().argsort(descending=True, stable=True)
    upper_KK = _inverse_factor(moment_KK[order_K][:, order_K], shrinkage)
    rows = torch.split(weight_NK, ROWS)
    parts = [_Rows(rows_NK, scheme, upper_KK, order_K, act_order).quantise() for rows_NK in rows]
    return QTensor.joined(parts)


class _Rows:
    """Some rows of a weight on their way through GPTQ. `upper_KK` and `open_KN` are in the order of `order_K`."""

    def __init__(self, weight_NK: Tensor, scheme: Scheme, upper_KK: Tensor, order_K: Tensor, act_order: bool) -> None:
        n, k = weight_NK.shape
        self.scheme, self.upper_KK, self.order_K = scheme, upper_KK, order_K
        self.block = scheme.block_size or k
        self.open_KN = weight_NK.float().T[order_K].contiguous()
        self.importance_K = upper_KK.diagonal() ** -2
        self.scale_GN = torch.ones(scheme.num_blocks(k), n)
        self.zero_GN = torch.full((len(self.scale_GN), n), float(scheme.midpoint))
        self.searched = act_order
        if act_order:
            importance_K = torch.empty_like(self.importance_K)
            importance_K[order_K] = self.importance_K
            scale_NG, zero_NG = search_grid(weight_NK, scheme, importance_K)
            self.scale_GN = scale_NG.T.contiguous()
            self.zero_GN = self.zero_GN if zero_NG is None else zero_NG.T.float()

    def quantise(self) -> QTensor:
        k, n = self.open_KN.shape
        codes_KN = torch.empty(k, n, dtype=torch.uint8 if self.scheme.blockwise else torch.int8)
        for start in range(0, k, LAZY):
            stop = min(start + LAZY, k)
            errors_BN = self.open_KN[start:stop]  # its rows turn from open weights into errors, one after another
            for j in range(start, stop):
                if not self.searched and j % self.block == 0:
                    self._search(j)
                row_N = errors_BN[j - start]
                codes_KN[self.order_K[j]] = self._round(row_N, int(self.order_K[j]) // self.block)
                row_N.div_(self.upper_KK[j, j])
                errors_BN[j - start + 1 :].addr_(self.upper_KK[j, j + 1 : stop], row_N, alpha=-1)
            self.open_KN[stop:].addmm_(self.upper_KK[start:stop, stop:].T, errors_BN, alpha=-1)
        zero_NG = None if self.scheme.symmetric else self.zero_GN.T.to(torch.uint8).contiguous()
        return QTensor(codes_KN.T.contiguous(), self.scale_GN.T.contiguous(), zero_NG, self.scheme)

    def _search(self, start: int) -> None:
        """The grid of the block that begins at `start`, from its open weights."""
        stop = start + self.block
        scale_N1, zero_N1 = search_grid(self.open_KN[start:stop].T, self.scheme, self.importance_K[start:stop])
        self.scale_GN[start // self.block] = scale_N1[:, 0]
        if zero_N1 is not None:
            self.zero_GN[start // self.block] = zero_N1[:, 0].float()

    def _round(self, row_N: Tensor, block: int) -> Tensor:
        """The codes of an open channel; the channel becomes its error."""
        scale_N, zero_N = self.scale_GN[block], self.zero_GN[block]
        codes_N = (torch.round(row_N / scale_N) + zero_N).clamp_(*self.scheme.limits)
        row_N.sub_((codes_N - zero_N) * scale_N)
        return codes_N.to(torch.uint8 if self.scheme.blockwise else torch.int8)


def _energy(weight_NK: Tensor, moment_KK: Tensor | None) -> Tensor:
    """tr(W H Wᵀ)."""
    if moment_KK is None:
        return weight_NK.square().sum()
    return ((weight_NK @ moment_KK) * weight_NK).sum()


def _inverse_factor(moment_KK: Tensor, shrinkage: float) -> Tensor:
    """U (upper) with H⁻¹ = Uᵀ U, of the moment with its correlations shrunk and its diagonal damped."""
    shrunk_KK = moment_KK.to(torch.float64, copy=True)
    diagonal_K = shrunk_KK.diagonal().clone()
    shrunk_KK *= 1 - shrinkage
    shrunk_KK.diagonal().add_(shrinkage * diagonal_K + DAMPING * diagonal_K.mean().clamp(min=1e-12))
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(shrunk_KK))
    del shrunk_KK  # of double the bytes of the moment
    upper_KK: Tensor = torch.linalg.cholesky(inverse_KK, upper=True)
    return upper_KK.float()
