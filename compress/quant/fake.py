"""Fake quantisation: the values that an operator will compute with, and the gradients to train them by.

The forward pass is `quantize(...).dequantize()` to the bit, so that what is trained is what is exported. Gradients: a
weight's goes straight through where its code is not clipped; a scale's is LSQ's (Esser et al. 2020, arXiv:1902.08153),
a zero point's LSQ+'s (Bhalgat et al. 2020, arXiv:2004.09576), of the integer that it is rounded to. Levels are those
that the operators hold: ParetoQ's stretched ones, (code − 1.5)·scale in 2 bits, would need a zero point of 1.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.quant.qtensor import QTensor, to_blocks
from compress.quant.rounding import quantize
from compress.quant.schemes import Scheme

_CHUNK = 1 << 17
"""Values done at a time on the CPU, so that every step finds them in the processor's cache."""
_MARGIN = 0.05
"""How far inside its cell, in codes, a weight starts that was put there by another method than rounding."""

Limit = Tensor | int


def fake_quant(
    weight_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, scheme: Scheme,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`weight_NK` quantised and back (N, K), computed in float32 and returned as `dtype`; differentiable in all three.

    weight_NK: float32; or codes, which stay as they are. scale_NG: float32 of either sign. zero_point_NG: floats, each
    standing for the nearest code; None where the scheme is symmetric.
    """
    result: Tensor = cast(Any, _FakeQuant).apply(weight_NK, scale_NG, zero_point_NG, scheme, dtype)
    return result


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to `x` unchanged."""
    result: Tensor = cast(Any, _StraightThrough).apply(x, rounded)
    return result


def whole_codes(zero_point_NG: Tensor, scheme: Scheme) -> Tensor:
    """The codes, as floats, that learned zero points stand for."""
    return zero_point_NG.detach().round().clamp(*scheme.limits)


def inside_cells(weight_NK: Tensor, qtensor: QTensor) -> Tensor:
    """The weights nearest to `weight_NK` whose nearest codes are `qtensor`'s: what a training goes on from.

    Another method than rounding (GPTQ) gives some weights another code than the nearest; they start at that one's edge.
    """
    scheme, scale_NG1 = qtensor.scheme, qtensor.scale[..., None]
    centre_NGB = to_blocks(qtensor.dequantize(), scheme)
    offset_NGB = (to_blocks(weight_NK.float(), scheme) - centre_NGB) / scale_NG1
    offset_NGB = offset_NGB.clamp_(_MARGIN - 0.5, 0.5 - _MARGIN).mul_(scale_NG1)
    moved_NK = (centre_NGB + offset_NGB).flatten(1)[:, : weight_NK.shape[1]]
    kept = quantize(weight_NK, scheme, qtensor.scale, qtensor.zero_point).codes == qtensor.codes
    return torch.where(kept, weight_NK.float(), moved_NK)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight_NK, scale_NG, zero_point_NG)
        ctx.scheme = scheme
        x_NGB = _blocks(weight_NK, scheme)
        result_NGB = torch.empty(x_NGB.shape, dtype=dtype, device=x_NGB.device)
        for rows, scale, zero in _chunks(x_NGB, scale_NG, zero_point_NG, scheme):
            levels, _ = _levels(x_NGB[rows], scale, zero, scheme)
            result_NGB[rows] = levels.mul_(scale)
        return result_NGB.flatten(1)[:, : weight_NK.shape[1]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight_NK, scale_NG, zero_point_NG = ctx.saved_tensors
        for_weight, for_scale, for_zero = ctx.needs_input_grad[:3]
        x_NGB, given_NGB = _blocks(weight_NK, ctx.scheme), _blocks(gradients[0], ctx.scheme)
        of_weight = torch.empty_like(x_NGB) if for_weight else None
        of_scale = torch.zeros_like(scale_NG) if for_scale else None
        of_zero = torch.zeros_like(scale_NG) if for_zero else None
        for rows, scale, zero in _chunks(x_NGB, scale_NG, zero_point_NG, ctx.scheme):
            levels, ratio = _levels(x_NGB[rows], scale, zero, ctx.scheme)
            given = given_NGB[rows].float()
            through = given if ratio is None else _inside(given, ratio, zero, ctx.scheme)
            if of_weight is not None:
                of_weight[rows] = through
            if of_scale is not None:
                error = levels.mul_(given) if ratio is None else levels.mul_(given).addcmul_(through, ratio, value=-1)
                of_scale[rows] = error.sum(-1)
            if of_zero is not None:
                of_zero[rows] = (through - given).mul_(scale).sum(-1)
        lsq = (x_NGB.shape[-1] * _greatest_level(ctx.scheme)) ** -0.5
        for gradient in (of_scale, of_zero):
            if gradient is not None:
                gradient.mul_(lsq)
        if of_weight is not None:
            of_weight = of_weight.flatten(1)[:, : weight_NK.shape[1]]
        return of_weight, of_scale, of_zero, None, None


def _levels(x: Tensor, scale: Tensor, zero: Limit, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """(code − zero point, x / scale), the latter None where `x` is codes."""
    if not x.is_floating_point():
        return x.float() - zero, None
    low, high = scheme.limits
    ratio = x / scale
    return torch.round(ratio).clamp_(low - zero, high - zero), ratio  # type: ignore[arg-type]


def _inside(given: Tensor, ratio: Tensor, zero: Limit, scheme: Scheme) -> Tensor:
    """`given` where codes are not clipped, else 0. Comparisons and masks of torch are ten times as slow on a CPU."""
    low, high = scheme.limits
    if isinstance(zero, int):
        low, high = low - zero, high - zero
    else:
        ratio = ratio + zero
    result: Tensor = torch.ops.aten.hardtanh_backward(given, ratio, low - 0.5, high + 0.5)
    return result


def _chunks(
    x_NGB: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, scheme: Scheme
) -> Iterator[tuple[slice, Tensor, Limit]]:
    """Rows that fit the cache, with their scales (rows, K_blocks, 1) and zero points likewise."""
    num_rows = len(x_NGB) if x_NGB.is_cuda else max(1, _CHUNK // x_NGB[0].numel())
    zero_NG = None if zero_point_NG is None else whole_codes(zero_point_NG, scheme)
    for start in range(0, len(x_NGB), num_rows):
        rows = slice(start, start + num_rows)
        yield rows, scale_NG[rows, :, None], scheme.midpoint if zero_NG is None else zero_NG[rows, :, None]


def _blocks(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """(N, K_blocks, block): a view where the blocks fill the rows."""
    block = scheme.block_size or weight_NK.shape[1]
    missing = -weight_NK.shape[1] % block
    return (pad(weight_NK, (0, missing)) if missing else weight_NK).reshape(len(weight_NK), -1, block)


def _greatest_level(scheme: Scheme) -> int:
    """LSQ's Q_p: the greatest distance of a code from the zero point (from the lowest code, where they vary)."""
    low, high = scheme.limits
    return max(scheme.midpoint - low, high - scheme.midpoint) if scheme.symmetric else high - low


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
