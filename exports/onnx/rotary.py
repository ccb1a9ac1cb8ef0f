"""Rotary tables: by the model's own module, and as `GroupQueryAttention` wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed

if TYPE_CHECKING:
    from compress.models.parts import Parts

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the text."""
_MULTIPLE = 8
"""`GroupQueryAttention` takes tables of multiples of 8 columns."""

Table = NDArray[np.float32]


def rotary_tables(parts: Parts) -> tuple[Table, Table] | None:
    """cos and sin `(max_position_embeddings, rotary_dim / 2)`; None where positions are learned.

    Raises StageFailed for rotary embeddings that no table can hold.
    """
    if parts.family.position != "rotary":
        return None
    import torch

    rope = getattr(parts.model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        what = f"rotary embeddings of type {kind!r} depend on the text's length, which a table can't"
        raise StageFailed("export-onnx", what, f"supported: {', '.join(ROPE_TYPES)}")
    rotary: Any = parts.backbone.get_submodule("rotary_emb")
    positions = torch.arange(parts.shape.max_position_embeddings)[None]
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()


def padded_rotary(cos: Table, sin: Table, head_dim: int) -> tuple[Table, Table, NDArray[np.int64] | None]:
    """Tables of a width that the operator takes, and the order of a head's lanes they are for (None: unchanged).

    Lane i turns with lane i + width. Wider tables turn the lanes that do not rotate by nothing, and the halves of the
    others move apart; q·k does not see the order of lanes. Raises StageFailed where the head has no lanes to spare.
    """
    half = cos.shape[1]
    width = -(-half // _MULTIPLE) * _MULTIPLE
    if width == half:
        return cos, sin, None
    if 2 * width > head_dim:
        what = f"GroupQueryAttention can't rotate {2 * half} of {head_dim} lanes"
        raise StageFailed("export-onnx.fused", what, "set fused: false")
    turning = np.concatenate([np.arange(half), width + np.arange(half)])
    lanes_D = np.empty(head_dim, np.int64)
    lanes_D[turning] = np.arange(2 * half)
    lanes_D[np.setdiff1d(np.arange(head_dim), turning)] = np.arange(2 * half, head_dim)
    missing = ((0, 0), (0, width - half))
    return np.pad(cos, missing, constant_values=1), np.pad(sin, missing), lanes_D
