"""The short depthwise causal convolution before a mixer's rotation, with its state (ONNX's CausalConvWithState)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    state_BCJ: Tensor | None = None,
    *,
    segment_start_BT: Tensor | None = None,
    valid_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_j w_j x_{t−K+1+j} per channel, no activation and no bias; and the last J = K−1 inputs (B, C, J).

    Taps never reach across a token where `segment_start_BT` is true. `valid_BT` is false at padding, where the caller
    has zeroed x: the state then ends at each row's last valid token, so that right padding leaves it as it was.
    Sums are float32; y and the state have x's dtype.
    """
    batch, length, channels = x_BTC.shape
    taps = weight_CK.shape[1]
    past_BJC = x_BTC.new_zeros(batch, taps - 1, channels) if state_BCJ is None else state_BCJ.mT.to(x_BTC.dtype)
    padded = torch.cat([past_BJC, x_BTC], 1)
    if segment_start_BT is not None:
        segment = F.pad(segment_start_BT.cumsum(1), (taps - 1, 0))
    y_BTC = padded[:, taps - 1 :] * weight_CK[:, -1].float()
    for j in range(taps - 1):
        shifted = padded[:, j : j + length]
        if segment_start_BT is not None:
            reached = segment[:, j : j + length] == segment[:, taps - 1 :]
            shifted = shifted * reached.unsqueeze(-1)
        y_BTC = y_BTC + shifted * weight_CK[:, j].float()
    return y_BTC.to(x_BTC.dtype), last_valid(padded, taps - 1, valid_BT).mT


def last_valid(x_BS: Tensor, count: int, valid_BT: Tensor | None) -> Tensor:
    """(B, count, …) of (B, S = count + T, …): those that end with the last of the T tokens that is no padding."""
    if valid_BT is None:
        return x_BS[:, x_BS.shape[1] - count :]
    kept_B = (valid_BT * torch.arange(1, valid_BT.shape[1] + 1, device=valid_BT.device)).amax(1)
    index_BJ = kept_B.unsqueeze(1) + torch.arange(count, device=valid_BT.device)
    return x_BS[torch.arange(len(x_BS), device=valid_BT.device).unsqueeze(1), index_BJ]


class CausalConv(nn.Module):
    """`weight` (channels, kernel); it starts as the identity."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The last tap 1, the others 0."""
        last = torch.zeros_like(self.weight)
        last[:, -1] = 1
        init.copy_(self.weight, last)

    def forward(
        self,
        x_BTC: Tensor,
        state_BCJ: Tensor | None = None,
        segment_start_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `causal_conv`."""
        return causal_conv(x_BTC, self.weight, state_BCJ, segment_start_BT=segment_start_BT, valid_BT=valid_BT)
