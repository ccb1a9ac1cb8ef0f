"""What a training computes in: float32 throughout, or its matrix products in bfloat16. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.hardware import multiplies_bf16

if TYPE_CHECKING:
    from compress.train.options import Precision


def uses_bf16(precision: Precision) -> bool:
    """Whether `precision` means bfloat16 on this machine: for `auto`, where its GPU or CPU multiplies in it."""
    return multiplies_bf16() if precision == "auto" else precision == "bf16"
