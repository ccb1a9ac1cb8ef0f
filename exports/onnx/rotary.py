"""Rotary tables: by the model's own module, and as `GroupQueryAttention` wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.exports.onnx import padded_width

if TYPE_CHECKING:
    from compress.models.parts import Parts


Table = NDArray[np.float32]


def rotary_tables(parts: Parts) -> tuple[Table, Table] | None:
    """cos and sin `(max_position_embeddings, rotary_dim / 2)`; None where positions are learned."""
    if parts.family.position != "rotary":
        return None
    import torch

    rotary: Any = parts.backbone.get_submodule("rotary_emb")
    positions = torch.arange(parts.shape.max_position_embeddings)[None]
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()


def padded_rotary(cos: Table, sin: Table, head_dim: int) -> tuple[Table, Table, NDArray[np.int64] | None]:
    """Tables of a width that the operator takes, and the order of a head's lanes they are for (None: unchanged).

    Lane i turns with lane i + width. Wider tables turn the lanes that do not rotate by nothing, and the halves of the
    others move apart; q·k does not see the order of lanes. The head must have lanes to spare: 2 · `padded_width`.
    """
    half = cos.shape[1]
    width = padded_width(half)
    if width == half:
        return cos, sin, None
    turning = np.concatenate([np.arange(half), width + np.arange(half)])
    lanes_D = np.empty(head_dim, np.int64)
    lanes_D[turning] = np.arange(2 * half)
    lanes_D[np.setdiff1d(np.arange(head_dim), turning)] = np.arange(2 * half, head_dim)
    missing = ((0, 0), (0, width - half))
    return np.pad(cos, missing, constant_values=1), np.pad(sin, missing), lanes_D
