"""Softmax attention over the last tokens, in time and memory linear in the text's length.

It stands beside a linear attention that reads the tokens before those (LoLCATs, arXiv 2410.10254): what is near is seen
exactly, and what leaves the window enters the state. Shapes: B sequences, T new tokens, S = window + T, H query and G
key/value heads of size D, N blocks of C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64


def window_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen_BS: Tensor, segment_BS: Tensor | None = None
) -> Tensor:
    """softmax(qᵀk/√D) v over the S − T tokens that end with the query's own, (B, T, H, D).

    q: of the last T of the S tokens. seen_BS: false where a token is none: padding, or before the first one; what such
    a query itself gives means nothing. segment_BS: which document of a packed row each token is of.
    """
    length = q_BTHD.shape[1]
    window = k_BSGD.shape[1] - length
    size = min(_BLOCK, length)
    missing = -length % size
    q_NHCD = torch.unflatten(_padded(q_BTHD, missing), 1, (-1, size)).flatten(0, 1).transpose(1, 2)
    k_NGSD, v_NGSD = (_blocks(x, missing, size, window).movedim(-1, 2) for x in (k_BSGD, v_BSGD))
    query_C1 = window + torch.arange(size, device=q_BTHD.device).unsqueeze(1)
    key_S = torch.arange(window + size, device=q_BTHD.device)
    mask = (key_S > query_C1 - window) & (key_S < query_C1) & _blocks(seen_BS, missing, size, window).unsqueeze(1)
    if segment_BS is not None:
        segment_NS = _blocks(segment_BS, missing, size, window)
        mask = mask & (segment_NS.unsqueeze(1) == segment_NS[:, window:].unsqueeze(2))
    mask = mask | (key_S == query_C1)
    y_NHCD = F.scaled_dot_product_attention(q_NHCD, k_NGSD, v_NGSD, attn_mask=mask.unsqueeze(1), enable_gqa=True)
    return torch.unflatten(y_NHCD.transpose(1, 2), 0, (len(q_BTHD), -1)).flatten(1, 2)[:, :length]


def _padded(x_BT: Tensor, missing: int) -> Tensor:
    return F.pad(x_BT, [0, 0] * (x_BT.dim() - 2) + [0, missing])


def _blocks(x_BS: Tensor, missing: int, size: int, window: int) -> Tensor:
    """What each block of `size` queries can see, (B·N, …, window + size)."""
    return _padded(x_BS, missing).unfold(1, window + size, size).flatten(0, 1)
