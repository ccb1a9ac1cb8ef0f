"""A quantised weight as what it is: codes, scales, zero points; and how it lies in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.quant.schemes import Scheme

PARTS = ("codes", "scales", "zero_points", "input_scale", "input_zero_point")
"""What `pack` may give."""


ROWS = 8192
"""Rows at a time: they do not touch each other, and a vocabulary of them would not fit in memory several times."""


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight (N, K) = (output, input) channels. codes (N, K): uint8, or int8 where the scheme is not block-wise.

    scale (N, K_blocks) float32, of either sign. zero_point (N, K_blocks) uint8, None where the scheme is symmetric.
    input_scale, input_zero_point: float32 and uint8 scalars, the range of a static scheme's activations,
    x ≈ (code − zero_point)·scale. Raises ValueError for NaN or infinite scales and for zero points that the scheme
    does not have or misses.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        if not torch.isfinite(self.scale).all():
            raise ValueError(f"{int((~torch.isfinite(self.scale)).sum())} scales are NaN or infinite")
        if self.input_scale is not None and not (torch.isfinite(self.input_scale) and self.input_scale > 0):
            raise ValueError(f"the input's scale is {self.input_scale.item()}")
        if (self.zero_point is None) != self.scheme.symmetric:
            expected = "no zero points" if self.scheme.symmetric else "zero points"
            raise ValueError(f"{expected} expected of {self.scheme.name}, symmetric={self.scheme.symmetric}")

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.codes.shape

    @property
    def input_range(self) -> tuple[Tensor, Tensor] | None:
        """(scale, zero point) of the activations; None where none is stored."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return self.input_scale, self.input_zero_point

    def dequantize(self) -> Tensor:
        """(code − zero_point)·scale as float32 (N, K)."""
        weight_NK = torch.empty(self.shape)
        sizes = [len(rows) for rows in torch.split(self.codes, ROWS)]
        for rows, part in zip(torch.split(weight_NK, ROWS), self.split(sizes), strict=True):
            zero = part.scheme.midpoint if part.zero_point is None else part.zero_point.float()[..., None]
            blocks = (to_blocks(part.codes.float(), part.scheme) - zero) * part.scale[..., None]
            rows.copy_(blocks.flatten(1)[:, : self.shape[1]])
        return weight_NK

    def split(self, rows: Sequence[int]) -> list[QTensor]:
        """Cut into tensors of so many rows (output channels) each."""
        sizes = list(rows)
        zeros = [None] * len(rows) if self.zero_point is None else torch.split(self.zero_point, sizes)
        cut = zip(torch.split(self.codes, sizes), torch.split(self.scale, sizes), zeros, strict=True)
        return [replace(self, codes=codes, scale=scale, zero_point=zero_point) for codes, scale, zero_point in cut]

    @classmethod
    def joined(cls, parts: Sequence[QTensor]) -> QTensor:
        """The inverse of `split`."""
        codes_NK, scale_NG = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        return replace(
            parts[0], codes=codes_NK, scale=scale_NG, zero_point=torch.cat(zero_points) if zero_points else None
        )

    def pack(self) -> dict[str, Tensor]:
        """The tensors to store, as the operators want them: `codes`, `scales` and what there is of the other PARTS.

        Block-wise: codes uint8 (N, K_blocks, block·bits/8), those of less than 8 bits several a byte with the lowest
        index in the lowest bits, padding as zero weights; zero points uint8 (N, ⌈K_blocks·bits/8⌉), packed alike.
        Otherwise: codes int8 (N, K), scales (N, 1). Raises ValueError where a static scheme has no input range.
        """
        if self.scheme.static and self.input_range is None:
            raise ValueError(f"{self.scheme.name} activations have no range")
        packed = {"codes": self._packed_codes(), "scales": self.scale}
        if self.zero_point is not None:
            packed["zero_points"] = _pack(self.zero_point, self.scheme.bits)
        if self.input_scale is not None and self.input_zero_point is not None:
            shared = {"input_scale": self.input_scale, "input_zero_point": self.input_zero_point}
            packed |= {name: tensor.clone() for name, tensor in shared.items()}  # a file can't hold one for several
        return {name: tensor.contiguous() for name, tensor in packed.items()}

    def _packed_codes(self) -> Tensor:
        if not self.scheme.blockwise:
            return self.codes
        blocks = self.scheme.num_blocks(self.shape[1])
        missing = blocks * self.scheme.block_size - self.shape[1]
        codes = pad(self.codes, (0, missing), value=self.scheme.midpoint)
        if missing and self.zero_point is not None:
            codes[:, -missing:] = self.zero_point[:, -1:]
        return _pack(codes, self.scheme.bits).reshape(len(codes), blocks, -1)

    @classmethod
    def unpack(cls, stored: Mapping[str, Tensor], scheme: Scheme, k: int) -> QTensor:
        """The inverse of `pack` for rows of `k` weights. Raises ValueError where shapes or values do not fit."""
        if missing := {"codes", "scales"} - stored.keys():
            raise ValueError(f"has no {' and no '.join(sorted(missing))}")
        codes, scale, zero_point = stored["codes"], stored["scales"].float(), stored.get("zero_points")
        wanted = torch.uint8 if scheme.blockwise else torch.int8
        for part, dtype in (codes, wanted), (zero_point, torch.uint8):
            if part is not None and part.dtype != dtype:
                raise ValueError(f"codes are stored as {part.dtype}, and those of {scheme.name} are {dtype}")
        if scheme.blockwise:
            codes = _unpack(codes.flatten(1), scheme.bits)[:, :k]
            zero_point = None if zero_point is None else _unpack(zero_point, scheme.bits)[:, : scale.shape[1]]
        if zero_point is not None and zero_point.shape != scale.shape:
            raise ValueError(f"{tuple(zero_point.shape)} zero points do not go with {tuple(scale.shape)} scales")
        if codes.shape[1] != k or scale.shape != (len(codes), scheme.num_blocks(k)):
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} are no {scheme.name} of {k}")
        if scheme.static and not stored.keys() >= {"input_scale", "input_zero_point"}:
            raise ValueError(f"{scheme.name} activations have no range")
        return cls(codes, scale, zero_point, scheme, stored.get("input_scale"), stored.get("input_zero_point"))


def to_blocks(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """(N, K) → (N, K_blocks, block), the last block padded with zeros."""
    n, k = weight_NK.shape
    block = scheme.block_size or k
    return pad(weight_NK, (0, scheme.num_blocks(k) * block - k)).reshape(n, -1, block)


def _pack(codes: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    filled = pad(codes, (0, -codes.shape[1] % each))
    packed = filled[:, ::each]
    for i in range(1, each):
        packed = packed | (filled[:, i::each] << bits * i)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(1)
