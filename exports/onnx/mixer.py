"""A linear-time mixer (`compress.mixers`) as ONNX nodes.

Shapes: B rows, T new tokens, H query and G key/value heads of D channels, N = H + G; K features of a head, V columns of
its state: those of a head's values, E, and where it is normalised one more for the denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.features import Rotary, features, rotated
from compress.exports.onnx.graph import Attribute
from compress.exports.onnx.recurrence import causal_conv, linear_attention
from compress.exports.onnx.states import keeps_tokens
from compress.exports.onnx.window import WindowInputs, look_near
from compress.mixers.spec import EPSILON, MixerSpec
from compress.models.anatomy import ModelShape


@dataclass(frozen=True)
class MixerInputs:
    """What all mixers of a graph read beside the hidden states.

    rotary, packed: as `rotated` and `features` take them. mask_BT1: 1 for a token, 0 for padding; `""` where there is
    none. native: whether ONNX Runtime has the recurrences as operators. windows: by their width.
    """

    rotary: Rotary
    mask_BT1: str
    packed: str
    native: bool
    windows: Mapping[int, WindowInputs]


def mixer(blocks: Blocks, x: str, layer: int, spec: MixerSpec, inputs: MixerInputs) -> tuple[str, dict[str, str]]:
    """(mixed `(B, T, H·E)`, the states after it by name)."""
    return _Mixer(blocks, layer, spec, inputs).emit(x)


@dataclass(frozen=True)
class _Mixer:
    blocks: Blocks
    layer: int
    spec: MixerSpec
    inputs: MixerInputs

    def emit(self, x: str) -> tuple[str, dict[str, str]]:
        graph, mask, near = self.blocks.graph, self.inputs.mask_BT1, ""
        qk, v, conv, projected = self._project(x)
        qk = rotated(self.blocks, qk, self._num_heads + self._num_kv, self.inputs.rotary)
        if self.spec.window:
            window = self.inputs.windows[self.spec.window]
            near, qk, v, conv = look_near(self.blocks, qk, v, self._past("conv"), self._shape, self.spec, window)
        elif mask:
            v = graph.op("Mul", v, mask)
        q, k = self._features(qk)
        v, decay, beta, gate, weight = self._rates(projected, v)
        out, recurrent = linear_attention(
            graph, q, k, v, self._past("recurrent"), decay, beta,
            rule=self.spec.update_rule, heads=(self._num_heads, self._num_kv), native=self.inputs.native,
        )  # fmt: skip
        return self._finish(out, near, weight, gate), {"recurrent": recurrent, "conv": conv}

    @property
    def _shape(self) -> ModelShape:
        """The model's, with this layer's widths."""
        return self.blocks.model.shape.of_layer(self.layer)

    @property
    def _num_heads(self) -> int:
        return self._shape.num_attention_heads

    @property
    def _num_kv(self) -> int:
        return self._shape.num_key_value_heads

    @property
    def _head_dim(self) -> int:
        return self._shape.head_dim

    @property
    def _value_dim(self) -> int:
        return self.spec.value_dim(self._shape.v_head_dim)

    @property
    def _widths(self) -> tuple[int, int]:
        """Channels of [q; k] and of v, whose heads end with the denominator's column."""
        return (self._num_heads + self._num_kv) * self._head_dim, self._num_kv * self._value_dim

    @property
    def _factor(self) -> float:
        """The gate's constant factor, which is taken into a weight."""
        return 2.0 if self.spec.gate else 1.0

    def _path(self, leaf: str) -> str:
        return self.blocks.model.layer(self.layer, f"{self.blocks.model.shape.family.attention.path}.{leaf}")

    def _past(self, state: str) -> str:
        return f"past.{self.layer}.{state}"

    def _project(self, x: str) -> tuple[str, str, str, dict[str, str]]:
        """([q; k] `(B, T, N·D)`, v `(B, T, G·V)`: normed and convolved; the convolution's state; the rates by name)."""
        graph, anatomy, spec = self.blocks.graph, self.blocks.model.shape.family.attention, self.spec
        has_norms = bool(anatomy.q_norm) and self.blocks.model.has(self._path(anatomy.q_norm))
        rates = spec.rates(self._num_heads, self._num_kv)
        if spec.conv_kernel and not has_norms:
            whole, *projected = self._side_by_side(x, (sum(self._widths),), rates)
        else:
            qk, v, *projected = self._side_by_side(x, self._widths, rates)
            qk = self._norm_heads(qk) if has_norms else qk
        by_name = dict(zip(rates, projected, strict=True))
        if not spec.conv_kernel:
            return qk, v, self._pass_on(), by_name
        if has_norms:
            whole = graph.op("Concat", qk, v, axis=-1)
        whole, state = self._convolve(whole)
        qk, v = graph.split(whole, *self._widths)
        return qk, v, state, by_name

    def _side_by_side(self, x: str, widths: Sequence[int], rates: Mapping[str, int]) -> tuple[str, ...]:
        """[q; k; v] of `x` in parts of `widths`, then each of `rates`: by one operator where it can hold them all."""
        blocks, graph, anatomy = self.blocks, self.blocks.graph, self.blocks.model.shape.family.attention
        paths = [self._path(leaf) for leaf in (anatomy.q, anatomy.k, anatomy.v)]
        rate_paths = [*map(self._path, rates)]
        qk_width, one = self._widths[0], 1 / self._factor if self.spec.normalised else 0.0
        if blocks.can_stack(*paths, *rate_paths):
            last = qk_width + self._num_kv * self._shape.v_head_dim
            parts = np.arange(qk_width), self._value_rows(qk_width), last + np.arange(sum(rates.values()))
            rows = np.concatenate(parts) if one else None
            whole = blocks.linear(x, *paths, *rate_paths, name=self._path("qkv_proj"), rows=rows, constant=one)
            return graph.split(whole, *widths, *rates.values())
        v = blocks.linear(x, paths[2], rows=self._value_rows(0) if one else None, constant=one)
        whole = graph.op("Concat", *(blocks.linear(x, path) for path in paths[:2]), v, axis=-1)
        return *graph.split(whole, *widths), *blocks.linears(x, *rate_paths, name=self._path("rates"))

    def _value_rows(self, first: int) -> NDArray[np.int64]:
        """Which stored row is each channel of v; −1 for the denominator's, which is a constant."""
        rows_GV = np.full((self._num_kv, self._shape.v_head_dim + 1), -1)
        rows_GV[:, :-1] = first + np.arange(self._num_kv * self._shape.v_head_dim).reshape(self._num_kv, -1)
        return rows_GV.reshape(-1)

    def _norm_heads(self, qk: str) -> str:
        anatomy, graph = self.blocks.model.shape.family.attention, self.blocks.graph
        counts = (self._num_heads, self._num_kv)
        vectors = (self.blocks.model.vector(f"{self._path(leaf)}.weight") for leaf in (anatomy.q_norm, anatomy.k_norm))
        weight_ND = np.concatenate([np.tile(vector, (n, 1)) for vector, n in zip(vectors, counts, strict=True)])
        heads = graph.op("Reshape", qk, graph.ints(0, 0, -1, self._head_dim))
        normed = self.blocks.rms_norm(heads, graph.constant("ones", np.ones(self._head_dim, np.float32)))
        scaled = graph.op("Mul", normed, graph.weight(self._path("qk_norm.weight"), weight_ND))
        return graph.op("Reshape", scaled, graph.ints(0, 0, -1))

    def _pass_on(self) -> str:
        """An unused state as it is: one copy for all the layers that only onnxruntime-genai wants it of."""
        if not self.blocks.fused or self.spec.window:
            return ""
        graph, specs = self.blocks.graph, self.blocks.model.mixers
        layers = [layer for layer, spec in enumerate(specs) if spec and not keeps_tokens(spec)]
        whole = graph.op("Concat", *(f"past.{layer}.conv" for layer in layers), axis=1)
        split: dict[str, Attribute] = {"axis": 1, "num_outputs": len(layers)}
        return graph.ops("Split", [whole], len(layers), attributes=split)[layers.index(self.layer)]

    def _convolve(self, x: str) -> tuple[str, str]:
        graph, spec = self.blocks.graph, self.spec
        weight_CK = self.blocks.model.vector(self._path("conv.weight"))
        if spec.normalised:
            through_1K = np.eye(1, spec.conv_kernel, spec.conv_kernel - 1, dtype=np.float32)
            stored_CK = np.append(weight_CK, through_1K, axis=0)
            weight_CK = stored_CK[np.append(np.arange(self._widths[0]), self._value_rows(self._widths[0]))]
        if self.inputs.mask_BT1:
            x = graph.op("Mul", x, self.inputs.mask_BT1)
        weight = graph.weight(self._path("conv.weight"), weight_CK[:, None])
        return causal_conv(graph, x, weight, self._past("conv"), shape=weight_CK.shape, native=self.inputs.native)

    def _features(self, qk: str) -> tuple[str, str]:
        """Features of q `(B, T, H·K)` and of k `(B, T, G·K)`, rotated before."""
        num_heads, kind = self._num_heads + self._num_kv, self.spec.feature_map
        mapped = features(self.blocks, qk, num_heads, kind, self._path(""), self.inputs.packed)
        key_dim = self.spec.key_dim(self._head_dim)
        q, k = self.blocks.graph.split(mapped, self._num_heads * key_dim, self._num_kv * key_dim)
        return q, k

    def _rates(self, projected: Mapping[str, str], v: str) -> tuple[str, str, str, str, str]:
        """(v as the recurrence takes it, log decay and beta `(B, T, G)`, gate and the window's weight `(B, T, H)`).

        `""` for what is not.
        """
        graph, spec, mask = self.blocks.graph, self.spec, self.inputs.mask_BT1
        decay = beta = gate = weight = ""
        if spec.decay != "none":
            rate = projected["a_proj" if spec.decay == "scalar" else "dt_proj"]
            v, decay = self._decay(graph.op("Softplus", rate), v)
        if spec.beta:
            beta = graph.op("Sigmoid", projected["b_proj"])
            beta = graph.op("Mul", beta, mask) if mask else beta
        if spec.gate:
            gate = graph.op("Sigmoid", projected["g_proj"])
        if spec.window:
            weight = graph.op("Exp", projected["w_proj"])
        return v, decay, beta, gate, weight

    def _decay(self, rate_BTG: str, v: str) -> tuple[str, str]:
        """(v, log decay) of a positive rate: minus the rate, or Mamba-2's Δ·A with v·Δ."""
        graph, mask = self.blocks.graph, self.inputs.mask_BT1
        if self.spec.decay == "scalar":
            return v, graph.op("Mul", rate_BTG, graph.op("Neg", mask)) if mask else graph.op("Neg", rate_BTG)
        if mask:
            rate_BTG = graph.op("Mul", rate_BTG, mask)
        wide = graph.constant(
            f"per_head.{self._value_dim}" if self._shape == self.blocks.model.shape else self._path("per_head"),
            np.repeat(np.eye(self._num_kv, dtype=np.float32), self._value_dim, axis=1),
        )
        decay_G = graph.weight(self._path("A"), np.minimum(-self.blocks.model.vector(self._path("A")), 0))
        return graph.op("Mul", v, graph.op("MatMul", rate_BTG, wide)), graph.op("Mul", rate_BTG, decay_G)

    def _finish(self, out_BTX: str, near_BTHV: str, weight_BTH: str, gate_BTH: str) -> str:
        """Numerator over denominator, or the norm of each head; times the gate. `(B, T, H·E)`.

        With a window (w·near + numerator)/(w·1 + denominator): that 1, over the factor as the denominator is, is
        `near`'s last column.
        """
        graph = self.blocks.graph
        heads = graph.op("Reshape", out_BTX, graph.ints(0, 0, self._num_heads, self._value_dim))
        if near_BTHV:
            weighted = graph.op("Mul", graph.op("Unsqueeze", weight_BTH, graph.ints(3)), near_BTHV)
            heads = graph.op("Add", weighted, heads)
        gate = graph.op("Unsqueeze", gate_BTH, graph.ints(3)) if gate_BTH else ""
        if self.spec.normalised:
            numerator, denominator = graph.split(heads, self._shape.v_head_dim, 1)
            if not near_BTHV:
                denominator = graph.op("Add", denominator, graph.scalar(EPSILON / self._factor))
            if gate:
                mixed = graph.op("Mul", numerator, graph.op("Div", gate, denominator))
            else:
                mixed = graph.op("Div", numerator, denominator)
        else:
            weight = self._factor * self.blocks.model.vector(self._path("norm.weight"))
            mixed = self.blocks.rms_norm(heads, graph.weight(self._path("norm.weight"), weight))
            mixed = graph.op("Mul", mixed, gate) if gate else mixed
        return graph.op("Reshape", mixed, graph.ints(0, 0, -1))
