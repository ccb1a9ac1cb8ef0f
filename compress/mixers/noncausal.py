"""Linear attention that sees both sides, in the place of an encoder's self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .features import FeatureMap
from .spec import EPSILON, MixerSpec
from .widths import widths_of


class NonCausalMixer(nn.Module):
    """y_i = φ(q_i)ᵀ(Σ_j φ(k_j) v_jᵀ) / (φ(q_i)ᵀΣ_j φ(k_j) + 10⁻⁶), the sums over all tokens that are no padding.

    `query`, `key` and `value` are those of the `BertSelfAttention` that it replaces; φ is a hedgehog feature map per
    head (arXiv 2402.04347), the sums over both sides are LinFusion's (arXiv 2409.02097). Time and memory grow linearly
    with the length. There is no map of attention, so no dropout on one.
    """

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.spec = spec = MixerSpec(**config.mixers[layer_idx])
        if spec.update_rule != "linear" or spec.conv_kernel or spec.gate or not spec.normalised:
            raise ValueError(f"layer {layer_idx}: an encoder's mixer is `linear`, not {spec.type!r}")
        own, hidden = widths_of(config, layer_idx), config.hidden_size
        heads, self.head_dim, self.v_head_dim = own.num_attention_heads, own.head_dim, own.v_head_dim
        self.query, self.key = (nn.Linear(hidden, heads * self.head_dim) for _ in range(2))
        self.value = nn.Linear(hidden, heads * self.v_head_dim)
        self.feature_map_q = FeatureMap(spec.feature_map, heads, self.head_dim)
        self.feature_map_k = FeatureMap(spec.feature_map, heads, self.head_dim)

    def reset_parameters(self) -> None:
        """Start what the replaced attention did not have."""
        self.feature_map_q.reset_parameters()
        self.feature_map_k.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, T, hidden) → (B, T, heads·V), summed in float32; before the output projection, as `BertSelfAttention`.

        padding_mask (B, T): zero where a token is padding, on either side. attention_mask, which says the same in the
        shape that softmax wants, and other keywords are ignored.
        """
        q, k = (p(hidden_states).unflatten(2, (-1, self.head_dim)) for p in (self.query, self.key))
        v = self.value(hidden_states).unflatten(2, (-1, self.v_head_dim))
        q_BTHK, k_BTHK, v_BTHD = self.feature_map_q(q), self.feature_map_k(k), v.float()
        if padding_mask is not None:
            k_BTHK = k_BTHK * padding_mask[:, :, None, None]
        state_BHKD = torch.einsum("bthk,bthd->bhkd", k_BTHK, v_BTHD)
        num_BTHD = torch.einsum("bthk,bhkd->bthd", q_BTHK, state_BHKD)
        den_BTH = torch.einsum("bthk,bhk->bth", q_BTHK, k_BTHK.sum(1))
        y_BTHD = num_BTHD / (den_BTH + EPSILON).unsqueeze(-1)
        return y_BTHD.flatten(2).to(hidden_states.dtype), None
