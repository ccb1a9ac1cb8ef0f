"""Attention as ONNX nodes: `GroupQueryAttention` with its rotary and shared cache, or standard operators.

Shapes: B rows, T new tokens, S = past + new tokens, H query and G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed
from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.graph import Attribute
from compress.exports.onnx.weights import CacheScales, Model
from compress.models.anatomy import ModelShape

QUANTISED_CACHE: Mapping[str, Attribute] = {
    "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8,
}  # fmt: skip
"""Attributes of a `GroupQueryAttention` whose cache is int8."""
CACHE_SCALES = 12
"""The first of its two inputs that hold the scales of keys and of values."""


@dataclass(frozen=True)
class FusedInputs:
    """What it reads beside q, k, v: last key's index `(B,)` and S, both int32, and the rotary tables.

    lanes_D: the order of a head's lanes that the tables are made for, where it is not the model's.
    """

    last_B: str
    total: str
    cos: str = ""
    sin: str = ""
    lanes_D: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class PlainInputs:
    """bias: `(B, 1, T, S)` by sliding window (0: none), 0 where a key is seen. cos, sin: `(B, 1, T, rotary_dim)`."""

    bias_B1TS: dict[int, str]
    cos: str = ""
    sin: str = ""


def window(model: Model, layer: int) -> int:
    """How many of the last keys a layer sees, itself included; 0 where it sees all."""
    size = model.config.get("sliding_window")
    kinds = model.config.get("layer_types")
    if size is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return 0
    return int(size) if kinds is not None or model.shape.model_type == "mistral" else 0


def scale(model: Model, layer: int) -> float:
    """What q·k is multiplied by."""
    value = float(model.shape.head_dim) ** -0.5 if model.config.get("scale_attn_weights", True) else 1.0
    return value / (layer + 1) if model.config.get("scale_attn_by_inverse_layer_idx") else value


def project(
    blocks: Blocks, x: str, layer: int, *, packed: bool, lanes_D: NDArray[np.int64] | None = None
) -> tuple[str, ...]:
    """(q, k, v), each `(B, T, heads·D)`; or (qkv,) `(B, T, (H + 2G)·D)` where one operator can do it and may.

    Norms of q and k per head are applied, which keeps them apart. lanes_D: another order of each head's q and k.
    """
    model, anatomy = blocks.model, blocks.model.shape.family.attention
    paths = [model.layer(layer, f"{anatomy.path}.{leaf}") for leaf in (anatomy.q, anatomy.k, anatomy.v) if leaf]
    q_norm, k_norm = (
        model.layer(layer, f"{anatomy.path}.{leaf}") if leaf else "" for leaf in (anatomy.q_norm, anatomy.k_norm)
    )
    has_norms = bool(q_norm) and model.has(q_norm)
    shape, graph = model.shape.of_layer(layer), blocks.graph
    if anatomy.qkv or (not has_norms and blocks.can_stack(*paths)):
        path = model.layer(layer, f"{anatomy.path}.{anatomy.qkv or 'qkv_proj'}")
        rows = _rows(shape, lanes_D)
        qkv = blocks.linear(x, *(paths or [path]), name=path, rows=rows)
        if packed:
            return (qkv,)
        q_width, k_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        return graph.split(qkv, q_width, k_width, shape.num_key_value_heads * shape.v_head_dim)
    if lanes_D is not None:
        what = "GroupQueryAttention can't rotate heads of this width where q and k stand apart"
        raise StageFailed("export-onnx.fused", what, "set fused: false")
    q, k, v = (blocks.linear(x, path) for path in paths)
    if has_norms:
        q, k = _norm_heads(blocks, q, q_norm), _norm_heads(blocks, k, k_norm)
    return q, k, v


def fused_attention(blocks: Blocks, x: str, layer: int, inputs: FusedInputs) -> tuple[str, str, str]:
    """(attention `(B, T, H·D)`, keys, values `(B, G, S, D)`) by `GroupQueryAttention`."""
    shape = blocks.model.shape.of_layer(layer)
    q, k, v = (*project(blocks, x, layer, packed=True, lanes_D=inputs.lanes_D), "", "")[:3]
    attributes: dict[str, Attribute] = {
        "num_heads": shape.num_attention_heads, "kv_num_heads": shape.num_key_value_heads,
        "scale": scale(blocks.model, layer), "do_rotary": int(bool(inputs.cos)), "rotary_interleaved": 0,
        "local_window_size": window(blocks.model, layer) or -1,
    }  # fmt: skip
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    operands = [q, k, v, *past, inputs.last_B, inputs.total, inputs.cos, inputs.sin]
    if scales := blocks.model.cache_scales.get(layer):
        operands += [""] * (CACHE_SCALES - len(operands)) + _cache_scales(blocks, layer, scales, inputs.lanes_D)
        attributes |= QUANTISED_CACHE
    while not operands[-1]:
        operands.pop()
    out, keys, values = blocks.graph.ops(
        "GroupQueryAttention", operands, 3, domain="com.microsoft", attributes=attributes
    )
    return out, keys, values


def _cache_scales(blocks: Blocks, layer: int, scales: CacheScales, lanes_D: NDArray[np.int64] | None) -> list[str]:
    """The scales of a layer's keys and values, those of keys with their lanes in the order `lanes_D`."""
    keys_GD = scales.keys_GD if lanes_D is None else scales.keys_GD[:, lanes_D]
    named = {"key": keys_GD, "value": scales.values_GD}
    return [blocks.graph.weight(f"cache.{layer}.{part}.scale", value[None, :, None]) for part, value in named.items()]


def plain_attention(blocks: Blocks, x: str, layer: int, inputs: PlainInputs) -> tuple[str, str, str]:
    """The same by standard operators, right for left-padded rows."""
    graph, shape = blocks.graph, blocks.model.shape.of_layer(layer)
    num_heads, num_kv = shape.num_attention_heads, shape.num_key_value_heads
    q, k, v = project(blocks, x, layer, packed=False)
    q, k, v = (split_heads(blocks, value, n) for value, n in ((q, num_heads), (k, num_kv), (v, num_kv)))
    if inputs.cos:
        q, k = (rotate(blocks, value, inputs) for value in (q, k))
    keys = graph.op("Concat", f"past_key_values.{layer}.key", k, axis=2)
    values = graph.op("Concat", f"past_key_values.{layer}.value", v, axis=2)
    wide_keys, wide_values = (_repeat_heads(blocks, value, shape) for value in (keys, values))
    bias = inputs.bias_B1TS[window(blocks.model, layer)]
    out = attend(blocks, q, wide_keys, wide_values, bias, scale(blocks.model, layer))
    return out, keys, values


def attend(blocks: Blocks, q_BHTD: str, k_BHSD: str, v_BHSD: str, bias: str, factor: float) -> str:
    """softmax(q kᵀ·factor + bias) v with the heads side by side: `(B, T, H·D)`."""
    graph = blocks.graph
    scores = graph.op("MatMul", q_BHTD, graph.op("Transpose", k_BHSD, perm=(0, 1, 3, 2)))
    scores = graph.op("Add", graph.op("Mul", scores, graph.scalar(factor)), bias)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v_BHSD)
    return graph.op("Reshape", graph.op("Transpose", mixed, perm=(0, 2, 1, 3)), graph.ints(0, 0, -1))


def split_heads(blocks: Blocks, x: str, num_heads: int, head_dim: int = 0) -> str:
    """`(B, T, heads·D)` → `(B, heads, T, D)`; D is the model's head_dim where it is not given."""
    graph = blocks.graph
    shaped = graph.op("Reshape", x, graph.ints(0, 0, num_heads, head_dim or blocks.model.shape.head_dim))
    return graph.op("Transpose", shaped, perm=(0, 2, 1, 3))


def _rows(shape: ModelShape, lanes_D: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """Which stored row is each row of [q; k; v], with the lanes of each head of q and k in the order `lanes_D`."""
    num_heads, num_kv, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    rows_XD = np.arange((num_heads + 2 * num_kv) * head_dim).reshape(-1, head_dim)
    if shape.family.attention.qkv_layout == "per_head":
        rows_XD = rows_XD.reshape(num_heads, 3, head_dim).transpose(1, 0, 2).reshape(-1, head_dim)
    elif lanes_D is None:
        return None
    if lanes_D is not None:
        rows_XD[: num_heads + num_kv] = rows_XD[: num_heads + num_kv, lanes_D]
    return rows_XD.reshape(-1)


def _norm_heads(blocks: Blocks, x: str, path: str) -> str:
    graph = blocks.graph
    shaped = graph.op("Reshape", x, graph.ints(0, 0, -1, blocks.model.shape.head_dim))
    return graph.op("Reshape", blocks.norm(shaped, path), graph.ints(0, 0, -1))


def rotate(blocks: Blocks, x: str, inputs: PlainInputs) -> str:
    """Rotate the first `rotary_dim` of D by halves; the rest passes."""
    assert blocks.model.rotary is not None
    graph, head_dim = blocks.graph, blocks.model.shape.head_dim
    half = blocks.model.rotary[0].shape[1]
    sizes = [half, half, head_dim - 2 * half][: 2 if head_dim == 2 * half else 3]
    first, second, *rest = graph.split(x, *sizes)
    turned = graph.op("Concat", graph.op("Neg", second), first, axis=-1)
    plain = graph.op("Concat", first, second, axis=-1) if rest else x
    rotated = graph.op("Add", graph.op("Mul", plain, inputs.cos), graph.op("Mul", turned, inputs.sin))
    return graph.op("Concat", rotated, *rest, axis=-1) if rest else rotated


def _repeat_heads(blocks: Blocks, x_BGSD: str, shape: ModelShape) -> str:
    graph = blocks.graph
    times = shape.num_attention_heads // shape.num_key_value_heads
    if times == 1:
        return x_BGSD
    tall = graph.op("Unsqueeze", x_BGSD, graph.ints(2))
    repeated = graph.op("Concat", *[tall] * times, axis=2)
    return graph.op("Reshape", repeated, graph.op("Concat", graph.ints(0), graph.ints(shape.num_attention_heads),
                    graph.ints(-1), graph.ints(shape.head_dim), axis=0))  # fmt: skip
