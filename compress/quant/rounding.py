"""How a weight becomes codes and scales, and what rounded activations are: pure functions that know no model."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.qtensor import QTensor, to_blocks
from compress.quant.schemes import Scheme

TERNARY_THRESHOLD = 0.7
"""Of a block's mean magnitude: what is below it counts as 0 when the scale of the others is found (TWN)."""


def round_to_nearest(weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales (N, K_blocks) float32 from the extremes of each block, and zero points (uint8) unless symmetric.

    A symmetric block-wise scale has the sign that maps the entry of largest magnitude to the code farthest from the
    midpoint (0), which has one more step on its side. A ternary one is TWN's (Li et al. 2016, arXiv:1605.04711).
    """
    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    low, high = blocks_NGB.amin(-1), blocks_NGB.amax(-1)
    if scheme.ternary:
        return _nonzero(_mean_of_large(blocks_NGB, weight_NK.shape[1])), None
    if scheme.symmetric:
        extreme = torch.where(high > -low, high, low)
        scale = extreme / -scheme.midpoint if scheme.blockwise else extreme.abs() / scheme.limits[1]
        return _nonzero(scale), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _nonzero((high - low) / scheme.limits[1])
    return scale, torch.round(-low / scale).clamp(*scheme.limits).to(torch.uint8)


def _mean_of_large(blocks_NGB: Tensor, k: int) -> Tensor:
    """Mean magnitude (N, K_blocks) of the entries above the threshold; the last block's padding does not count."""
    size = blocks_NGB.shape[-1]
    filled_G = (k - torch.arange(blocks_NGB.shape[1]) * size).clamp(max=size)
    magnitude_NGB = blocks_NGB.abs()
    threshold_NG = TERNARY_THRESHOLD * magnitude_NGB.sum(-1) / filled_G
    large_NGB = magnitude_NGB > threshold_NG[..., None]
    return (magnitude_NGB * large_NGB).sum(-1) / large_NGB.sum(-1).clamp(min=1)


def quantize(
    weight_NK: Tensor, scheme: Scheme, scale_NG: Tensor | None = None, zero_point_NG: Tensor | None = None
) -> QTensor:
    """The codes nearest to `weight_NK`, with the given scales (and zero points) or round-to-nearest's own.

    Raises ValueError for NaN or infinite scales, and zero points where the scheme is symmetric or none where it is not.
    """
    if scale_NG is None:
        scale_NG, zero_point_NG = round_to_nearest(weight_NK, scheme)
    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    zero = scheme.midpoint if zero_point_NG is None else zero_point_NG[..., None].float()
    codes_NGB = (torch.round(blocks_NGB / scale_NG[..., None]) + zero).clamp(*scheme.limits)
    codes_NK = codes_NGB.flatten(1)[:, : weight_NK.shape[1]].to(torch.uint8 if scheme.blockwise else torch.int8)
    return QTensor(codes_NK, scale_NG, zero_point_NG, scheme)


def activation_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale float32, zero point uint8) of uint8 activations from `low` to `high` (scalars), widened to hold 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _nonzero((high - low) / 255)
    return scale, torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)


def round_activations(
    x: Tensor, scheme: Scheme, *, accuracy_level: int = 0, input_range: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Activations as the operator of `scheme` sees them, dequantised; same shape and dtype.

    dynamic: `DynamicQuantizeLinear`, uint8 with a zero point, one range for the **whole tensor**. static:
    `QuantizeLinear` with `input_range` = (scale, zero point); raises ValueError without. Block-wise at accuracy level
    4: int8 by row and block along the last axis, ±127 at the block's largest magnitude. They stay as they are at level
    0 and, as the runtime has no integer kernel for it, where 2-bit codes lie in blocks of 16. (The runtime's kernels
    take an approximate reciprocal: one value in a million, half-way between two integers, goes the other way there.)
    """
    if not scheme.blockwise:
        if scheme.static and input_range is None:
            raise ValueError(f"{scheme.name} activations have no range")
        scale, zero = input_range if input_range and scheme.static else activation_range(x.amin(), x.amax())
        return ((torch.round(x / scale) + zero).clamp(0, 255) - zero.to(x.dtype)) * scale
    if not scheme.rounds_activations(accuracy_level):
        return x
    blocks = to_blocks(x.reshape(-1, x.shape[-1]), scheme)
    largest = blocks.abs().amax(-1, keepdim=True)
    rounded = torch.round(blocks * (127 / largest).where(largest != 0, 0.0)) * (largest / 127)
    return rounded.flatten(1)[:, : x.shape[-1]].reshape(x.shape)


def _nonzero(scale: Tensor) -> Tensor:
    return scale.where(scale != 0, 1.0)
