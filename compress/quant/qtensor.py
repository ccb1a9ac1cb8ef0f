"""A quantised weight as what it is: codes, scales, zero points; and how it lies in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.quant.schemes import Scheme, to_blocks


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight (N, K) = (output, input) channels. codes (N, K): uint8, or int8 where the scheme is dynamic.

    scale (N, K_blocks) float32, of either sign. zero_point (N, K_blocks) uint8, or None for the scheme's midpoint.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """(code − zero_point)·scale as float32 (N, K)."""
        zero = self.scheme.midpoint if self.zero_point is None else self.zero_point.float()[..., None]
        blocks = (to_blocks(self.codes.float(), self.scheme) - zero) * self.scale[..., None]
        return blocks.flatten(1)[:, : self.shape[1]]

    def split(self, rows: Sequence[int]) -> list[QTensor]:
        """Cut into tensors of so many rows (output channels) each."""
        sizes = list(rows)
        zeros = [None] * len(rows) if self.zero_point is None else torch.split(self.zero_point, sizes)
        cut = zip(torch.split(self.codes, sizes), torch.split(self.scale, sizes), zeros, strict=True)
        return [QTensor(codes, scale, zero_point, self.scheme) for codes, scale, zero_point in cut]

    def pack(self) -> dict[str, Tensor]:
        """The tensors to store, as the operators want them: `codes`, `scales` and, where there are any, `zero_points`.

        Block-wise: codes uint8 (N, K_blocks, block·bits/8), 4-bit ones two a byte with the lower index in the low
        nibble, padding as zero weights; zero points uint8 (N, ⌈K_blocks·bits/8⌉), packed alike. Dynamic: codes int8
        (N, K), scales (N, 1).
        """
        if self.scheme.dynamic:
            return {"codes": self.codes.contiguous(), "scales": self.scale.contiguous()}
        blocks = self.scheme.num_blocks(self.shape[1])
        missing = blocks * self.scheme.block_size - self.shape[1]
        codes = pad(self.codes, (0, missing), value=self.scheme.midpoint)
        if missing and self.zero_point is not None:
            codes[:, -missing:] = self.zero_point[:, -1:]
        packed = {"codes": _pack(codes, self.scheme.bits).reshape(len(codes), blocks, -1), "scales": self.scale}
        if self.zero_point is not None:
            packed["zero_points"] = _pack(self.zero_point, self.scheme.bits)
        return {name: tensor.contiguous() for name, tensor in packed.items()}

    @classmethod
    def unpack(cls, stored: dict[str, Tensor], scheme: Scheme, k: int) -> QTensor:
        """The inverse of `pack` for rows of `k` weights. Raises ValueError where shapes do not fit."""
        codes, scale = stored["codes"], stored["scales"].float()
        zero_point = stored.get("zero_points")
        if not scheme.dynamic:
            codes = _unpack(codes.flatten(1), scheme.bits)[:, :k]
            zero_point = None if zero_point is None else _unpack(zero_point, scheme.bits)[:, : scale.shape[1]]
        if codes.shape[1] != k or scale.shape != (len(codes), scheme.num_blocks(k)):
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} are no {scheme.name} of {k}")
        return cls(codes, scale, zero_point, scheme)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    even = pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | (even[:, 1::2] << 4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(1)
