"""Feature maps φ, so that φ(q)ᵀφ(k) takes the place of exp(qᵀk/√D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .spec import FeatureMap as Kind


class FeatureMap(nn.Module):
    """(B, T, heads, D) → (B, T, heads, K) in float32.

    hedgehog: softmax([Wx, −Wx]), K = 2D, with `weight` (heads, D, D) that starts as the identity (arXiv 2402.04347, in
    the form of LoLCATs, arXiv 2410.10254: one softmax over both halves). softmax: softmax(x), K = D. l2: x/‖x‖, K = D.
    """

    def __init__(self, kind: Kind, heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "hedgehog":
            self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W of each head is the identity."""
        if self.kind == "hedgehog":
            eye = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
            init.copy_(self.weight, eye.expand_as(self.weight))

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """Features in float32."""
        if self.kind == "l2":
            x = x_BTHD.float()
            return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        if self.kind == "hedgehog":
            x_BTHD = torch.einsum("hed,bthd->bthe", self.weight, x_BTHD)
            x_BTHD = torch.cat([x_BTHD, -x_BTHD], -1)
        return torch.softmax(x_BTHD, -1, dtype=torch.float32)
