"""The linear-time mixer that takes the place of a decoder layer's `self_attn`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from .cache_name import one_cache
from .conv import CausalConv, last_valid
from .features import FeatureMap
from .scan import chunked, step
from .spec import EPSILON, MixerSpec
from .widths import widths_of
from .window import window_attention

HORIZONS = (512.0, 16.0)
"""Tokens after which a head starts to forget a 1/e-th: the first head's and the last one's, geometric in between."""


class Mixer(nn.Module):
    """Causal linear attention, gated linear attention, Mamba-2's SSD or the gated delta rule, as `config.mixers` says.

    Its projections (and Qwen3's q/k norms) have the names, shapes and biases of the attention that it replaces; what is
    new starts as the identity where it can. H query and G key/value heads of size D; query head h reads key/value head
    h // (H/G); a head's values may have another size, V (`v_head_dim`). Per sequence it keeps a float32 state
    (G, d_k, d_v) and, with a convolution, the last inputs of it ((H + G)·D + G·V, kernel − 1), or, with a window, in
    the same place, its last keys and values (window, G, D + d_v): in transformers' own linear-attention cache layer.
    """

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.spec = spec = MixerSpec(**config.mixers[layer_idx])
        own, hidden = widths_of(config, layer_idx), config.hidden_size
        self.heads, self.groups = heads, groups = own.num_attention_heads, own.num_key_value_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim = own.head_dim, own.v_head_dim
        family = config.model_type.removeprefix("hybrid_")
        biased = bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=biased or family == "qwen2")
        self.k_proj = nn.Linear(hidden, groups * head_dim, bias=biased or family == "qwen2")
        self.v_proj = nn.Linear(hidden, groups * v_head_dim, bias=biased or family == "qwen2")
        self.o_proj = nn.Linear(heads * v_head_dim, hidden, bias=biased and family != "qwen2")
        if family == "qwen3":
            self.q_norm = LlamaRMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(head_dim, eps=config.rms_norm_eps)
        self.feature_map_q = FeatureMap(spec.feature_map, heads, head_dim)
        self.feature_map_k = FeatureMap(spec.feature_map, groups, head_dim)
        if spec.conv_kernel:
            self.conv = CausalConv((heads + groups) * head_dim + groups * v_head_dim, spec.conv_kernel)
        if spec.decay == "scalar":
            self.a_proj = nn.Linear(hidden, groups)
        if spec.decay == "dt":
            self.dt_proj = nn.Linear(hidden, groups)
            self.A = nn.Parameter(torch.empty(groups))
        if spec.beta:
            self.b_proj = nn.Linear(hidden, groups)
        if spec.gate:
            self.g_proj = nn.Linear(hidden, heads)
        if spec.window:
            self.w_proj = nn.Linear(hidden, heads)
        if not spec.normalised:
            self.norm = LlamaRMSNorm(v_head_dim, eps=config.rms_norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start what the replaced attention did not have; loaded weights stay (transformers flags them)."""
        self.feature_map_q.reset_parameters()
        self.feature_map_k.reset_parameters()
        if self.spec.conv_kernel:
            self.conv.reset_parameters()
        if self.spec.decay == "scalar":
            first, last = (math.log(tokens) for tokens in HORIZONS)
            rate_G = torch.exp(-torch.linspace(first, last, self.groups))
            _constant(self.a_proj, rate_G.expm1().log())  # softplus⁻¹
        if self.spec.decay == "dt":
            _constant(self.dt_proj, torch.full((self.groups,), math.log(math.expm1(1.0))))
            init.zeros_(self.A)
        if self.spec.beta:
            _constant(self.b_proj, torch.zeros(self.groups))
        if self.spec.gate:
            _constant(self.g_proj, torch.zeros(self.heads))
        if self.spec.window:
            _constant(self.w_proj, torch.zeros(self.heads))
        if not self.spec.normalised:
            init.ones_(self.norm.weight)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        padding_mask: Tensor | None = None,
        segment_start_BT: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, T, hidden) → (B, T, hidden). Other keywords of the attention's are ignored.

        position_embeddings: RoPE's cosine and sine. cache, or past_key_values: read and written at `layer_idx`.
        padding_mask (B, S ≥ T): its last T columns are zero where these tokens are padding, on either side.
        segment_start_BT: true where a packed row starts a new document.
        """
        cache = one_cache(cache, past_key_values)
        valid_BT = None if padding_mask is None else padding_mask[:, -hidden_states.shape[1] :].bool()
        q, k, v = self._project(hidden_states, cache, valid_BT, segment_start_BT)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        if self.spec.normalised:
            v = F.pad(v, (0, 1), value=1.0)
        if valid_BT is not None:
            v = v * valid_BT[:, :, None, None]
        near_BTHD = None
        if self.spec.window:
            near_BTHD, k, v = self._look_near(q, k, v, cache, valid_BT, segment_start_BT)
        q, k = self.feature_map_q(q), self.feature_map_k(k)
        v, log_decay_BTG, beta_BTG = self._rates(hidden_states, v.float())
        if valid_BT is not None:
            log_decay_BTG = None if log_decay_BTG is None else log_decay_BTG * valid_BT.unsqueeze(-1)
            beta_BTG = None if beta_BTG is None else beta_BTG * valid_BT.unsqueeze(-1)
        y_BTHV = self._scan(q, k, v, log_decay_BTG, beta_BTG, cache, segment_start_BT)
        if near_BTHD is not None:
            w_BTH1 = self.w_proj(hidden_states).float().exp().unsqueeze(-1)
            y_BTHD = (w_BTH1 * near_BTHD + y_BTHV[..., :-1]) / (w_BTH1 + y_BTHV[..., -1:])
        elif self.spec.normalised:
            y_BTHD = y_BTHV[..., :-1] / (y_BTHV[..., -1:] + EPSILON)
        else:
            y_BTHD = self.norm(y_BTHV)
        if self.spec.gate:
            y_BTHD = y_BTHD * 2 * torch.sigmoid(self.g_proj(hidden_states).float()).unsqueeze(-1)
        return self.o_proj(y_BTHD.flatten(2).to(hidden_states.dtype)), None

    def _project(
        self, x: Tensor, cache: Cache | None, valid_BT: Tensor | None, segment_start_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) and v (B, T, G, V): normed, zero at padding, convolved."""
        q, k = (p(x).unflatten(2, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(2, (-1, self.v_head_dim))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.spec.conv_kernel:
            return q, k, v
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], 2)
        if valid_BT is not None:
            qkv = qkv * valid_BT.unsqueeze(-1)
        past = self._cached(cache, "conv_states")
        qkv, state = self.conv(qkv, past, segment_start_BT, valid_BT)
        if cache is not None:
            cache.update_conv_state(state, self.layer_idx)
        qk_width = (self.heads + self.groups) * self.head_dim
        qk, v = qkv.split([qk_width, qkv.shape[2] - qk_width], 2)
        q, k = qk.unflatten(2, (-1, self.head_dim)).split([self.heads, self.groups], 2)
        return q, k, v.unflatten(2, (-1, self.v_head_dim))

    def _look_near(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, valid_BT: Tensor | None,
        segment_start_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Softmax over the window (B, T, H, D), and the keys and values that leave it as these tokens come.

        v's last column is 0 where a token is none.
        """
        batch, length, window = *q.shape[:2], self.spec.window
        past = self._cached(cache, "conv_states")
        new_BTGX = torch.cat([k, v], -1)
        before = new_BTGX.new_zeros(batch, window, *new_BTGX.shape[2:]) if past is None else past.to(new_BTGX.dtype)
        all_BSGX = torch.cat([before, new_BTGX], 1)
        if cache is not None:
            cache.update_conv_state(last_valid(all_BSGX, window, valid_BT), self.layer_idx)
        k_BSGD, v_BSGV = torch.split(all_BSGX, [self.head_dim, v.shape[-1]], -1)
        segment_BS = None if segment_start_BT is None else F.pad(segment_start_BT.cumsum(1), (window, 0), value=-1)
        seen_BS = v_BSGV[:, :, 0, -1] != 0
        near_BTHD = window_attention(q, k_BSGD, v_BSGV[..., :-1], seen_BS, segment_BS).float()
        k_left, v_left = k_BSGD[:, :length], v_BSGV[:, :length]
        if segment_BS is not None:
            v_left = v_left * (segment_BS[:, :length] == segment_BS[:, window:])[:, :, None, None]
        if valid_BT is not None:  # padding on the right pushes nothing out
            v_left = v_left * valid_BT.flip(1).cummax(1).values.flip(1)[:, :, None, None]
        return near_BTHD, k_left, v_left

    def _rates(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The values as the scan takes them (B, T, G, d_v), log decay and beta (B, T, G), all float32."""
        log_decay_BTG = beta_BTG = None
        if self.spec.decay == "scalar":
            log_decay_BTG = -F.softplus(self.a_proj(x).float())
        if self.spec.decay == "dt":
            delta_BTG = F.softplus(self.dt_proj(x).float())
            A = self.A.float()
            # relu with a straight-through gradient: A starts at 0, and must be able to leave it
            log_decay_BTG = -delta_BTG * (F.relu(A).detach() + A - A.detach())
            v = v * delta_BTG.unsqueeze(-1)
        if self.spec.beta:
            beta_BTG = torch.sigmoid(self.b_proj(x).float())
        return v, log_decay_BTG, beta_BTG

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay_BTG: Tensor | None,
        beta_BTG: Tensor | None,
        cache: Cache | None,
        segment_start_BT: Tensor | None,
    ) -> Tensor:
        """The recurrence from the cache's state to the cache's next state."""
        scanned = (q, k, v, log_decay_BTG, beta_BTG, self._cached(cache, "recurrent_states"))
        rule = self.spec.update_rule
        if q.shape[1] == 1:
            y_BTHV, state = step(*scanned, rule=rule, segment_start_B1=segment_start_BT)
        else:
            y_BTHV, state = chunked(*scanned, rule=rule, segment_start_BT=segment_start_BT)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return y_BTHV

    def _cached(self, cache: Cache | None, states: str) -> Tensor | None:
        """This layer's state, None before the first token."""
        cached: Tensor | None = None if cache is None else getattr(cache.layers[self.layer_idx], states)[0]
        return cached


def _constant(linear: nn.Linear, bias: Tensor) -> None:
    """Make the layer give `bias`, whatever its input."""
    init.zeros_(linear.weight)
    init.copy_(linear.bias, bias.to(linear.bias))
