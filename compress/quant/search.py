"""Scales and codes with the least error: of the weights, of the output, and with each error fed forward (GPTQ).

All errors are tr(E H Eᵀ) with E = W − Ŵ (N, K) and H = E[x xᵀ] (K, K): the mean square of the output's error. `mse`
takes H = 1, `output` its diagonal, `gptq` (Frantar et al. 2022, arXiv:2210.17323) all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.qtensor import QTensor
from compress.quant.schemes import Scheme, quantize, round_to_nearest, to_blocks

CLIPS = torch.linspace(0.60, 1.15, 12)
"""Candidates: the block's extreme over the code that it maps to, times these."""
ROWS = 1 << 14
"""Blocks searched at a time: the working set stays in the processor's cache."""


def search_scales(weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None) -> Tensor:
    """Scales (N, K_blocks) of either sign with the least Σ importance·(w − ŵ)² in each block: never worse than
    round-to-nearest. importance_K: per input channel, E[x²]; None counts all alike.
    """
    blocks = to_blocks(weight_NK.float(), scheme)
    n, g, b = blocks.shape
    ones = torch.ones(weight_NK.shape[1]) if importance_K is None else importance_K.float()
    importance = to_blocks(ones[None], scheme).expand(n, g, b).reshape(-1, b)
    start, _ = round_to_nearest(weight_NK, scheme)
    flat = zip(blocks.reshape(-1, b).split(ROWS), importance.split(ROWS), start.flatten().split(ROWS), strict=True)
    return torch.cat([_search_blocks(*chunk, scheme) for chunk in flat]).reshape(n, g)


def _search_blocks(x_RB: Tensor, importance_RB: Tensor, start_R: Tensor, scheme: Scheme) -> Tensor:
    low, high = scheme.limits[0] - scheme.midpoint, scheme.limits[1] - scheme.midpoint
    extreme = x_RB.gather(1, x_RB.abs().argmax(1, keepdim=True)).squeeze(1)
    best = start_R
    best_error = _error(x_RB, importance_RB, best, low, high)[0]
    bounds = (high,) if scheme.dynamic else (low, high)
    for scale in (extreme * clip / bound for bound in bounds for clip in CLIPS.tolist()):
        scale = torch.where(scale == 0, 1.0, scale).abs() if scheme.dynamic else torch.where(scale == 0, 1.0, scale)
        error, codes = _error(x_RB, importance_RB, scale, low, high)
        for candidate, its_error in ((scale, error), _refit(x_RB, importance_RB, codes, low, high)):
            better = its_error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, its_error, best_error)
    return best


def _refit(x_RB: Tensor, importance_RB: Tensor, codes_RB: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The scale that fits `codes_RB` best by least squares, and its error (with codes rounded anew)."""
    weighted = importance_RB * codes_RB
    scale = (weighted * x_RB).sum(1) / (weighted * codes_RB).sum(1)
    scale = torch.where(torch.isfinite(scale) & (scale != 0), scale, 1.0)
    return scale, _error(x_RB, importance_RB, scale, low, high)[0]


def _error(x_RB: Tensor, importance_RB: Tensor, scale_R: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    codes = torch.round(x_RB / scale_R[:, None]).clamp_(low, high)
    return (importance_RB * (codes * scale_R[:, None] - x_RB).square_()).sum(1), codes


def output_error(weight_NK: Tensor, qtensor: QTensor, moment_KK: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the output's mean square error relative to the output's mean square."""
    error = weight_NK - qtensor.dequantize()
    return (((error @ moment_KK) * error).sum() / ((weight_NK @ moment_KK) * weight_NK).sum()).item()


def gptq(weight_NK: Tensor, scheme: Scheme, moment_KK: Tensor, damping: float = 0.01) -> QTensor:
    """Codes found one input channel after another, each one's error fed to those still open (GPTQ).

    A block's scales are searched when it is reached, on weights that carry the errors so far, weighted as GPTQ weights
    errors. damping: share of the mean diagonal of `moment_KK` added to it.
    """
    k = weight_NK.shape[1]
    block = scheme.block_size or k
    upper = _inverse_factor(moment_KK, damping)
    open_NK = weight_NK.float().clone()
    importance_K = upper.diagonal() ** -2
    parts: list[QTensor] = []
    scale = search_scales(weight_NK, scheme, moment_KK.diagonal()) if scheme.dynamic else None
    for start in range(0, k, block):
        stop = min(start + block, k)
        if not scheme.dynamic:
            scale = search_scales(open_NK[:, start:stop], scheme, importance_K[start:stop])
        assert scale is not None
        errors_NB = torch.empty(len(open_NK), stop - start)
        codes = torch.empty(len(open_NK), stop - start, dtype=torch.int8 if scheme.dynamic else torch.uint8)
        for j in range(start, stop):
            column = quantize(open_NK[:, j : j + 1], scheme, scale)
            codes[:, j - start] = column.codes[:, 0]
            error_N = (open_NK[:, j] - column.dequantize()[:, 0]) / upper[j, j]
            errors_NB[:, j - start] = error_N
            open_NK[:, j:stop] -= error_N[:, None] * upper[j, j:stop]
        open_NK[:, stop:] -= errors_NB @ upper[start:stop, stop:]
        parts.append(QTensor(codes, scale, None, scheme))
    return QTensor(torch.cat([p.codes for p in parts], 1), torch.cat([p.scale for p in parts], 1), None, scheme)


def _inverse_factor(moment_KK: Tensor, damping: float) -> Tensor:
    """U (upper) with H⁻¹ = Uᵀ U, of the damped moment; channels that never occur count as alone."""
    diagonal = moment_KK.diagonal()
    damped = moment_KK.double() + torch.eye(len(moment_KK)) * (damping * diagonal.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
