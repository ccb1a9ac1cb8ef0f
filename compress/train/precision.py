"""What a training computes in: float32 throughout, or its matrix products in bfloat16."""

from __future__ import annotations

import torch

from compress.hardware import has_bf16
from compress.train.options import Precision


def uses_bf16(precision: Precision) -> bool:
    """Whether `precision` means bfloat16 on this machine: for `auto`, where its GPU or CPU multiplies in it."""
    if precision == "auto":
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_bf16()
    return precision == "bf16"
