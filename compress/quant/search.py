"""Scales and codes with the least error: of the weights, of the output, and with each error fed forward (GPTQ).

All errors are tr(E H Eᵀ) with E = W − Ŵ (N, K) and H = E[x xᵀ] (K, K): the mean square of the output's error. `mse`
takes H = 1, `output` its diagonal, `gptq` (Frantar et al. 2022, arXiv:2210.17323) all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.qtensor import QTensor
from compress.quant.schemes import Scheme, round_to_nearest, to_blocks

CLIPS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10)
"""Candidates: the block's extreme over the outermost code, times these."""
SHRINKAGE = 0.3
"""Share of each correlation between channels that is not believed: a few thousand tokens of one text do not tell them
exactly, and GPTQ fits to what they tell. Measured: benchmarks/results/int4-search_smollm2-135m.md."""
DAMPING = 1e-3
NUM_REFITS = 2
CHUNK = 1 << 17
"""Weights searched at a time: the working set stays in the processor's cache."""


def search_scales(weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None) -> Tensor:
    """Scales (N, K_blocks) of either sign with the least Σ importance·(w − ŵ)² in each block: never worse than
    round-to-nearest. importance_K: per input channel, E[x²]; None counts all alike.
    """
    blocks = to_blocks(weight_NK.float(), scheme)
    n, g, b = blocks.shape
    ones = torch.ones(weight_NK.shape[1]) if importance_K is None else importance_K.float()
    importance = to_blocks(ones[None], scheme).expand(n, g, b).reshape(-1, b)
    start, _ = round_to_nearest(weight_NK, scheme)
    rows = max(1, CHUNK // b)
    x, weights, scales = (torch.split(each, rows) for each in (blocks.reshape(-1, b), importance, start.flatten()))
    found = [_search_blocks(*part, scheme=scheme) for part in zip(x, weights, scales, strict=True)]
    return torch.cat(found).reshape(n, g)


def _search_blocks(x_RB: Tensor, importance_RB: Tensor, start_R: Tensor, scheme: Scheme) -> Tensor:
    low, high = scheme.limits[0] - scheme.midpoint, scheme.limits[1] - scheme.midpoint
    extreme = x_RB.gather(1, x_RB.abs().argmax(1, keepdim=True)).squeeze(1)
    best, best_error = start_R, _error(x_RB, importance_RB, start_R, low, high)
    bounds = (high,) if scheme.dynamic else (low, high)
    for scale in (extreme * (clip / bound) for bound in bounds for clip in CLIPS):
        best, best_error = _better(x_RB, importance_RB, scale, best, best_error, low, high)
    for _ in range(NUM_REFITS):
        codes = torch.round(x_RB / best[:, None]).clamp_(low, high)
        weighted = importance_RB * codes
        scale = (weighted * x_RB).sum(1) / (weighted * codes).sum(1)  # least squares
        best, best_error = _better(x_RB, importance_RB, scale, best, best_error, low, high)
    return best.abs() if scheme.dynamic else best


def _better(
    x_RB: Tensor, importance_RB: Tensor, scale_R: Tensor, best_R: Tensor, error_R: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    scale_R = scale_R.where(scale_R.isfinite() & (scale_R != 0), best_R)
    own_R = _error(x_RB, importance_RB, scale_R, low, high)
    return scale_R.where(own_R < error_R, best_R), torch.minimum(own_R, error_R)


def _error(x_RB: Tensor, importance_RB: Tensor, scale_R: Tensor, low: int, high: int) -> Tensor:
    rounded = torch.round(x_RB / scale_R[:, None]).clamp_(low, high).mul_(scale_R[:, None])
    return rounded.sub_(x_RB).square_().mul_(importance_RB).sum(1)


def output_error(weight_NK: Tensor, qtensor: QTensor, moment_KK: Tensor | None) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the output's mean square error relative to the output's mean square.

    Without a moment, the weight's own: H = 1.
    """
    error = weight_NK - qtensor.dequantize()
    if moment_KK is None:
        return (error.square().sum() / weight_NK.square().sum()).item()
    return (((error @ moment_KK) * error).sum() / ((weight_NK @ moment_KK) * weight_NK).sum()).item()


def gptq(weight_NK: Tensor, scheme: Scheme, moment_KK: Tensor, shrinkage: float = SHRINKAGE) -> QTensor:
    """Codes found one input channel after another, each one's error fed to those still open (GPTQ).

    A block's scales are searched when it is reached, on weights that carry the errors so far, weighted as GPTQ weights
    errors. shrinkage: from 0, `moment_KK` as it is, to 1, its diagonal alone, which feeds nothing forward.
    """
    k = weight_NK.shape[1]
    block = scheme.block_size or k
    upper_KK = _inverse_factor(moment_KK, shrinkage)
    importance_K = upper_KK.diagonal() ** -2
    low, high = scheme.limits[0] - scheme.midpoint, scheme.limits[1] - scheme.midpoint
    open_KN = weight_NK.float().T.contiguous()
    codes_KN, scales = torch.empty_like(open_KN), []
    for start in range(0, k, block):
        stop = min(start + block, k)
        scale_N = search_scales(open_KN[start:stop].T, scheme, importance_K[start:stop])[:, 0]
        errors_BN = open_KN[start:stop]  # its rows turn from open weights into errors, one after another
        for j in range(start, stop):
            row_N = errors_BN[j - start]
            codes_KN[j] = torch.round(row_N / scale_N).clamp_(low, high)
            row_N.sub_(codes_KN[j] * scale_N).div_(upper_KK[j, j])
            errors_BN[j - start + 1 :].addr_(upper_KK[j, j + 1 : stop], row_N, alpha=-1)
        open_KN[stop:].addmm_(upper_KK[start:stop, stop:].T, errors_BN, alpha=-1)
        scales.append(scale_N)
    codes_NK = (codes_KN.T + scheme.midpoint).to(torch.int8 if scheme.dynamic else torch.uint8).contiguous()
    return QTensor(codes_NK, torch.stack(scales, 1), None, scheme)


def _inverse_factor(moment_KK: Tensor, shrinkage: float) -> Tensor:
    """U (upper) with H⁻¹ = Uᵀ U, of the moment with its correlations shrunk and its diagonal damped."""
    diagonal_K = moment_KK.diagonal().double()
    damped_K = shrinkage * diagonal_K + DAMPING * diagonal_K.mean().clamp(min=1e-12)
    shrunk_KK = (1 - shrinkage) * moment_KK.double() + torch.diag(damped_K)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk_KK))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
