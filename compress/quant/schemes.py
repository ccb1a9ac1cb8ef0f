"""Schemes: what a weight is stored as, and what rounds the activations that it is multiplied with. Imports no torch.

A scheme is the arithmetic of an ONNX Runtime operator, for weights (N, K) = (output, input) channels:

- `w{2,4,8}-block{16,32,64,128}` and `ternary`: `MatMulNBits` (`GatherBlockQuantized` for embeddings),
  w = (code − zero_point)·scale over blocks along K.
- `w8a8-dynamic`: `MatMulInteger` behind `DynamicQuantizeLinear`, w = code·scale per output channel, activations rounded
  to uint8 over the range that they happen to have.
- `w8a8-static`: the same weights, activations rounded to uint8 over a range that is stored (QDQ).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

SchemeName = Literal[
    "w4-block16", "w4-block32", "w4-block64", "w4-block128",
    "w8-block16", "w8-block32", "w8-block64", "w8-block128",
    "w2-block16", "w2-block32", "w2-block64", "w2-block128",
    "ternary", "w8a8-dynamic", "w8a8-static",
]  # fmt: skip
Role = Literal["projection", "embedding", "head"]
Activations = Literal["block", "dynamic", "static"]
BLOCK_SIZES = (16, 32, 64, 128)
ACCURACY_LEVEL = 4
"""`MatMulNBits` as it is exported: activations rounded to int8, row by row and block by block."""


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

    def filling(self, k: int) -> Scheme:
        """This block-wise scheme with the largest blocks, up to its own, that fill a row of `k`.

        Itself where none do: the last block of each row is filled up then.
        """
        fitting = (size for size in BLOCK_SIZES[::-1] if size <= self.block_size and k % size == 0)
        if self.ternary or not (size := next(fitting, 0)):
            return self
        return replace(SCHEMES[f"w{self.bits}-block{size}"], symmetric=self.symmetric)

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


def not_gathered(scheme: Scheme) -> str | None:
    """Why ONNX Runtime can't gather rows of weights of `scheme`, as it does of an embedding; None where it can."""
    if not scheme.blockwise:
        return f"GatherBlockQuantized has no per-channel weights, which {scheme.name} makes"
    return None
