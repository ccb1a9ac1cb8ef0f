"""Schemes: how a weight becomes codes and scales. Pure functions over torch tensors; nothing here knows a model.

A scheme is the arithmetic of an ONNX Runtime operator, for weights (N, K) = (output, input) channels:

- `w{2,4,8}-block{16,32,64,128}` and `ternary`: `MatMulNBits` (`GatherBlockQuantized` for embeddings),
  w = (code − zero_point)·scale over blocks along K.
- `w8a8-dynamic`: `MatMulInteger` behind `DynamicQuantizeLinear`, w = code·scale per output channel, activations rounded
  to uint8 over the range that they happen to have.
- `w8a8-static`: the same weights, activations rounded to uint8 over a range that is stored (QDQ).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from compress.quant.qtensor import QTensor

SchemeName = Literal[
    "w4-block16", "w4-block32", "w4-block64", "w4-block128",
    "w8-block16", "w8-block32", "w8-block64", "w8-block128",
    "w2-block16", "w2-block32", "w2-block64", "w2-block128",
    "ternary", "w8a8-dynamic", "w8a8-static",
]  # fmt: skip
Role = Literal["projection", "embedding", "head"]
Activations = Literal["block", "dynamic", "static"]
BLOCK_SIZES = (16, 32, 64, 128)
TERNARY_THRESHOLD = 0.7
"""Of a block's mean magnitude: what is below it counts as 0 when the scale of the others is found (TWN)."""


@dataclass(frozen=True)
class Scheme:
    """bits per code; block_size along K (0: one block is the whole row); symmetric: no zero points are stored.

    activations: `block` as they are, or as `MatMulNBits` rounds them; `dynamic`, `static`: uint8 per tensor. Codes of a
    block-wise scheme are uint8 around `midpoint`; the others' are int8 around 0.
    """

    name: str
    bits: int
    block_size: int = 0
    symmetric: bool = True
    activations: Activations = "block"
    ternary: bool = False

    @property
    def blockwise(self) -> bool:
        """Whether a scale serves one block of a row, not the row."""
        return self.activations == "block"

    @property
    def dynamic(self) -> bool:
        """Whether activations are rounded over the range that each tensor happens to have."""
        return self.activations == "dynamic"

    @property
    def static(self) -> bool:
        """Whether activations are rounded over a stored range."""
        return self.activations == "static"

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric tensor: what the operators assume where none is given."""
        return 1 << (self.bits - 1) if self.blockwise else 0

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest code. Codes around 0 leave out the lowest, so that they are symmetric."""
        half = 1 << (self.bits - 1)
        if self.ternary:
            return half - 1, half + 1
        return (0, 2 * half - 1) if self.blockwise else (1 - half, half - 1)

    def rounds_activations(self, accuracy_level: int = 0) -> bool:
        """Whether the operator rounds its activations, to uint8 per tensor or, at `accuracy_level` 4, by blocks."""
        return not self.blockwise or (accuracy_level == 4 and (self.bits, self.block_size) != (2, 16))

    def num_blocks(self, k: int) -> int:
        """Blocks in a row of `k` weights; the last may be part-filled."""
        return -(-k // self.block_size) if self.block_size else 1

    def bits_per_weight(self, k: int) -> float:
        """Stored bits for each weight of a row of `k`: codes (last block padded), float32 scales, zero points."""
        blocks = self.num_blocks(k)
        codes = self.bits * blocks * self.block_size if self.blockwise else 8 * k
        zero_points = 0 if self.symmetric else 8 * -(-blocks * self.bits // 8)
        return (codes + 32 * blocks + zero_points) / k

    @property
    def asymmetric(self) -> Scheme:
        """This scheme with a zero point for each block. Raises ValueError where there can't be any."""
        if self.ternary or not self.blockwise:
            raise ValueError(f"{self.name} weights have no zero points")
        return replace(self, symmetric=False)

    @property
    def reduced(self) -> Scheme:
        """With 7-bit codes (`reduce_range`): no int16 overflow on processors without VNNI.

        Raises ValueError where no uint8 activations are multiplied.
        """
        if self.blockwise:
            raise ValueError(f"{self.name} has no reduced range")
        return replace(self, bits=7)

    @property
    def table(self) -> Scheme:
        """What an embedding, and the head tied to it, get beside this scheme: gathered block-wise, of 4 bits or 8."""
        if not self.blockwise:
            return W8_BLOCK32
        return replace(SCHEMES[f"w4-block{self.block_size}"], symmetric=self.symmetric) if self.bits == 2 else self

    def filling(self, k: int) -> Scheme | None:
        """This block-wise scheme with the largest blocks, up to its own, that fill a row of `k`; None where none do."""
        if self.ternary:
            return None if k % self.block_size else self
        for size in (size for size in BLOCK_SIZES[::-1] if size <= self.block_size and k % size == 0):
            return replace(SCHEMES[f"w{self.bits}-block{size}"], symmetric=self.symmetric)
        return None

    def of(self, name: str, role: Role) -> Scheme:
        """What the weight `name` gets where this scheme is meant for a whole model."""
        return self if role == "projection" else self.table


W4_BLOCK32 = Scheme("w4-block32", bits=4, block_size=32)
W8_BLOCK32 = Scheme("w8-block32", bits=8, block_size=32)
TERNARY = Scheme("ternary", bits=2, block_size=64, ternary=True)
W8A8_DYNAMIC = Scheme("w8a8-dynamic", bits=8, activations="dynamic")
W8A8_STATIC = Scheme("w8a8-static", bits=8, activations="static")
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(Scheme(f"w{bits}-block{size}", bits, size) for bits in (4, 8, 2) for size in BLOCK_SIZES),
        TERNARY, W8A8_DYNAMIC, W8A8_STATIC,
    )
}  # fmt: skip


def unsupported(scheme: Scheme, role: Role, k: int) -> str | None:
    """Why ONNX Runtime can't run `scheme` for a weight of `k` input channels in that role; None where it can."""
    if role != "embedding":
        return None
    if not scheme.blockwise:
        return f"GatherBlockQuantized has no per-channel weights, which {scheme.name} makes"
    if k % scheme.block_size:
        return f"GatherBlockQuantized needs rows of a multiple of {scheme.block_size}, these have {k}"
    return None


def to_blocks(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """(N, K) → (N, K_blocks, block), the last block padded with zeros."""
    from torch.nn.functional import pad

    n, k = weight_NK.shape
    block = scheme.block_size or k
    return pad(weight_NK, (0, scheme.num_blocks(k) * block - k)).reshape(n, -1, block)


def round_to_nearest(weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales (N, K_blocks) float32 from the extremes of each block, and zero points (uint8) unless symmetric.

    A symmetric block-wise scale has the sign that maps the entry of largest magnitude to the code farthest from the
    midpoint (0), which has one more step on its side. A ternary one is TWN's (Li et al. 2016, arXiv:1605.04711).
    """
    import torch

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
    import torch

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
    import torch

    from compress.quant.qtensor import QTensor

    if scale_NG is None:
        scale_NG, zero_point_NG = round_to_nearest(weight_NK, scheme)
    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    zero = scheme.midpoint if zero_point_NG is None else zero_point_NG[..., None].float()
    codes_NGB = (torch.round(blocks_NGB / scale_NG[..., None]) + zero).clamp(*scheme.limits)
    codes_NK = codes_NGB.flatten(1)[:, : weight_NK.shape[1]].to(torch.uint8 if scheme.blockwise else torch.int8)
    return QTensor(codes_NK, scale_NG, zero_point_NG, scheme)


def activation_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale float32, zero point uint8) of uint8 activations from `low` to `high` (scalars), widened to hold 0."""
    import torch

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
    import torch

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
