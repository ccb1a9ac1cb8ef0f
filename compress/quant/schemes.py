"""Schemes: how a weight becomes codes and scales. Pure functions over torch tensors; nothing here knows a model.

A scheme is the arithmetic of an ONNX Runtime operator. Block-wise schemes are `MatMulNBits` (and
`GatherBlockQuantized` for embeddings): w = (code − zero_point)·scale over blocks along K, of weights (N, K) =
(output, input) channels. `w8-dynamic` is `MatMulInteger` behind `DynamicQuantizeLinear`: w = code·scale per output
channel, and activations rounded to uint8 per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from compress.quant.qtensor import QTensor

SchemeName = Literal["w4-block32", "w8-block32", "w8-dynamic"]


@dataclass(frozen=True)
class Scheme:
    """bits per code; block_size along K (0: one block is the whole row); dynamic: activations are uint8 per tensor.

    Codes of a block-wise scheme are uint8 around `midpoint`; those of a dynamic one are int8 around 0.
    """

    name: SchemeName
    bits: int
    block_size: int = 0
    dynamic: bool = False

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric tensor: what the operators assume where none is given."""
        return 0 if self.dynamic else 1 << (self.bits - 1)

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest code. Dynamic codes leave out the lowest, so that they are symmetric."""
        half = 1 << (self.bits - 1)
        return (1 - half, half - 1) if self.dynamic else (0, 2 * half - 1)

    def num_blocks(self, k: int) -> int:
        """Blocks in a row of `k` weights; the last may be part-filled."""
        return -(-k // self.block_size) if self.block_size else 1

    def bits_per_weight(self, k: int, *, symmetric: bool = True) -> float:
        """Stored bits for each weight of a row of `k`: codes (last block padded), float32 scales, zero points."""
        blocks = self.num_blocks(k)
        stored = (8 if self.dynamic else self.bits) * blocks * (self.block_size or k)
        return (stored + blocks * (32 + (0 if symmetric else self.bits))) / k

    @property
    def reduced(self) -> Scheme:
        """This dynamic scheme with 7-bit codes (`reduce_range`): no int16 overflow on processors without VNNI."""
        return replace(self, bits=7)


W4_BLOCK32 = Scheme("w4-block32", bits=4, block_size=32)
W8_BLOCK32 = Scheme("w8-block32", bits=8, block_size=32)
W8_DYNAMIC = Scheme("w8-dynamic", bits=8, dynamic=True)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (W4_BLOCK32, W8_BLOCK32, W8_DYNAMIC)}


def to_blocks(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """(N, K) → (N, K_blocks, block), the last block padded with zeros."""
    from torch.nn.functional import pad

    n, k = weight_NK.shape
    block = scheme.block_size or k
    return pad(weight_NK, (0, scheme.num_blocks(k) * block - k)).reshape(n, -1, block)


def round_to_nearest(weight_NK: Tensor, scheme: Scheme, *, symmetric: bool = True) -> tuple[Tensor, Tensor | None]:
    """Scales (N, K_blocks) float32 from the extremes of each block, and zero points (uint8) unless `symmetric`.

    A symmetric block-wise scale has the sign that maps the entry of largest magnitude to the code farthest from the
    midpoint (0), which has one more step on its side.
    """
    import torch

    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    low, high = blocks_NGB.amin(-1), blocks_NGB.amax(-1)
    if scheme.dynamic or symmetric:
        extreme = torch.where(high > -low, high, low)
        scale = extreme.abs() / scheme.limits[1] if scheme.dynamic else extreme / -scheme.midpoint
        return _nonzero(scale), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _nonzero((high - low) / scheme.limits[1])
    return scale, torch.round(-low / scale).clamp(*scheme.limits).to(torch.uint8)


def quantize(weight_NK: Tensor, scheme: Scheme, scale_NG: Tensor | None = None, zero_point_NG: Tensor | None = None,
             *, symmetric: bool = True) -> QTensor:  # fmt: skip
    """The codes nearest to `weight_NK`, with the given scales (and zero points) or round-to-nearest's own."""
    import torch

    from compress.quant.qtensor import QTensor

    if scale_NG is None:
        scale_NG, zero_point_NG = round_to_nearest(weight_NK, scheme, symmetric=symmetric)
    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    zero = scheme.midpoint if zero_point_NG is None else zero_point_NG[..., None].float()
    codes_NGB = (torch.round(blocks_NGB / scale_NG[..., None]) + zero).clamp(*scheme.limits)
    codes_NK = codes_NGB.flatten(1)[:, : weight_NK.shape[1]].to(torch.int8 if scheme.dynamic else torch.uint8)
    return QTensor(codes_NK, scale_NG, zero_point_NG, scheme)


def fake_quant(weight_NK: Tensor, scheme: Scheme, scale_NG: Tensor | None = None,
               zero_point_NG: Tensor | None = None) -> Tensor:  # fmt: skip
    """Quantised and back, with the straight-through gradient (1) to `weight_NK`; the arithmetic of `quantize`."""
    rounded = quantize(weight_NK.detach(), scheme, scale_NG, zero_point_NG).dequantize()
    return weight_NK + (rounded.to(weight_NK.dtype) - weight_NK).detach()


def round_activations(x: Tensor, scheme: Scheme, *, accuracy_level: int = 0) -> Tensor:
    """Activations as the operator of `scheme` sees them, dequantised; same shape and dtype.

    dynamic: `DynamicQuantizeLinear`, uint8 with a zero point, one range for the **whole tensor**. Block-wise at
    accuracy level 4: int8, scale = max|x|/127 per row and block along the last axis; at level 0 they stay as they are.
    """
    import torch

    if scheme.dynamic:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = _nonzero((high - low) / 255)
        zero = torch.round((-low / scale).clamp(0, 255))
        return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale
    if accuracy_level != 4:
        return x
    rows = x.reshape(-1, x.shape[-1])
    blocks = to_blocks(rows, scheme)
    scale = _nonzero(blocks.abs().amax(-1, keepdim=True) / 127)
    return (torch.round(blocks / scale) * scale).flatten(1)[:, : x.shape[-1]].reshape(x.shape)


def _nonzero(scale: Tensor) -> Tensor:
    return scale.where(scale != 0, 1.0)
