"""What a linear-time mixer is made of, as `config.json` says it in `mixers`. Imports no torch.

One entry a layer, null where the layer keeps its softmax attention. H query and G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

MixerType = Literal["linear", "gated-linear", "mamba2", "gated-delta"]
FeatureMap = Literal["hedgehog", "softmax", "l2"]
UpdateRule = Literal["linear", "gated", "delta", "gated_delta"]
"""ONNX's names of the four recurrences, as its `LinearAttention` has them."""
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Transformers' names in `layer_types`: softmax over all tokens, over a window, and a mixer."""
EPSILON = 1e-6
"""What is added to the normaliser's denominator where no window is, in torch and in the export alike."""


@dataclass(frozen=True)
class MixerSpec:
    """One layer's mixer.

    feature_map: `hedgehog` [softmax(Wx), softmax(−Wx)] is written softmax([Wx, −Wx]) over 2D features (Attention to
    Mamba; LoLCATs); `softmax` softmax(x) over D; `l2` x/‖x‖ over D, which may be negative. All after the rotation.
    normalised: y = num/den with the scan over [V, 1]; else y is normed per head by its root mean square.
    conv_kernel: taps of the depthwise causal convolution of q, k and v before the rotation; 0 for none.
    decay: none; scalar: log decay per key/value head, −softplus(a_proj x); dt: Mamba-2's Δ = softplus(dt_proj x) and
    A ≤ 0: log decay ΔA and the values scaled by Δ. gate: y·2σ(g_proj x), one factor a head. beta: σ(b_proj x), the
    delta rule's step. window: softmax over so many last tokens, the linear attention over those before them, and
    y = (w·softmax + num)/(w + den) with w = exp(w_proj x), one a head; 0 for none.
    """

    type: MixerType
    feature_map: FeatureMap = "hedgehog"
    normalised: bool = True
    conv_kernel: int = 0
    decay: Literal["none", "scalar", "dt"] = "none"
    gate: bool = False
    beta: bool = False
    window: int = 0

    @property
    def update_rule(self) -> UpdateRule:
        """The recurrence."""
        if self.beta:
            return "delta" if self.decay == "none" else "gated_delta"
        return "linear" if self.decay == "none" else "gated"

    def key_dim(self, head_dim: int) -> int:
        """d_k: rows of the state of one head."""
        return 2 * head_dim if self.feature_map == "hedgehog" else head_dim

    def value_dim(self, v_head_dim: int) -> int:
        """d_v: columns of the state of one head; the normaliser is the last one."""
        return v_head_dim + 1 if self.normalised else v_head_dim

    def window_dim(self, num_key_value_heads: int, head_dim: int, v_head_dim: int) -> int:
        """Numbers that the window keeps of a token: keys, and values with the normaliser's column."""
        return num_key_value_heads * (head_dim + self.value_dim(v_head_dim))

    def state_bytes(self, num_heads: int, num_key_value_heads: int, head_dim: int, v_head_dim: int) -> int:
        """Bytes that one sequence keeps in this layer, in float32, whatever its length."""
        recurrent = num_key_value_heads * self.key_dim(head_dim) * self.value_dim(v_head_dim)
        inputs = _channels(num_heads, num_key_value_heads, head_dim, v_head_dim) * max(0, self.conv_kernel - 1)
        return 4 * (recurrent + inputs + self.window * self.window_dim(num_key_value_heads, head_dim, v_head_dim))

    def rates(self, num_heads: int, num_key_value_heads: int) -> dict[str, int]:
        """What is projected from the hidden states beside q, k and v: numbers a token, by the projection's name."""
        numbers = {
            "a_proj": num_key_value_heads * (self.decay == "scalar"),
            "dt_proj": num_key_value_heads * (self.decay == "dt"),
            "b_proj": num_key_value_heads * self.beta,
            "g_proj": num_heads * self.gate,
            "w_proj": num_heads * (self.window > 0),
        }
        return {leaf: number for leaf, number in numbers.items() if number}

    def num_parameters(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, v_head_dim: int
    ) -> int:
        """Parameters beyond those of the attention that it replaces."""
        h, g, d = num_heads, num_key_value_heads, head_dim
        maps = (h + g) * d * d if self.feature_map == "hedgehog" else 0
        conv = _channels(h, g, d, v_head_dim) * self.conv_kernel
        rates = sum(self.rates(h, g).values()) * (hidden_size + 1) + g * (self.decay == "dt")
        return maps + conv + rates + (0 if self.normalised else v_head_dim)

    def to_json(self) -> dict[str, Any]:
        """The entry of `config.json`."""
        return asdict(self)


def _channels(num_heads: int, num_key_value_heads: int, head_dim: int, v_head_dim: int) -> int:
    """Channels of [q; k; v]."""
    return (num_heads + num_key_value_heads) * head_dim + num_key_value_heads * v_head_dim


SPECS: Mapping[MixerType, MixerSpec] = {
    "linear": MixerSpec("linear"),
    "gated-linear": MixerSpec("gated-linear", decay="scalar", gate=True),
    "mamba2": MixerSpec("mamba2", conv_kernel=4, decay="dt", gate=True),
    "gated-delta": MixerSpec(
        "gated-delta", feature_map="l2", normalised=False, conv_kernel=4, decay="scalar", gate=True, beta=True
    ),
}
"""What each `to:` makes, without a window."""
WINDOWED: frozenset[MixerType] = frozenset({"linear", "gated-linear"})
"""Those that can have a window."""


def read_specs(config: Mapping[str, Any]) -> tuple[MixerSpec | None, ...]:
    """The mixers that a parsed `config.json` declares, one entry a layer; empty where it declares none."""
    entries = config.get("mixers") or ()
    return tuple(None if entry is None else MixerSpec(**entry) for entry in entries)
