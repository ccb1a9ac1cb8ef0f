"""The two stateful operators of a linear-time mixer, native or spelled out in standard ones.

Shapes: B rows, T new tokens, H query and G key/value heads, K and V rows and columns of a head's state, C channels.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.exports.onnx.graph import MICROSOFT, Attribute, Graph

OPERATORS = ("LinearAttention", "CausalConvWithState")


def linear_attention(
    graph: Graph, q_BTX: str, k_BTX: str, v_BTX: str, past_BGKV: str, decay_BTG: str, beta_BTG: str,
    *, rule: str, heads: tuple[int, int], native: bool,
) -> tuple[str, str]:  # fmt: skip
    """(output `(B, T, H·V)`, present state). heads: (H, G). decay (a logarithm) and beta: `""` where the rule has none.

    q, k and v have their heads side by side.
    """
    if not native:
        return _scanned(graph, q_BTX, k_BTX, v_BTX, past_BGKV, decay_BTG, beta_BTG, heads)
    inputs = [q_BTX, k_BTX, v_BTX, past_BGKV, decay_BTG, beta_BTG]
    while not inputs[-1]:
        inputs.pop()
    num_heads, num_kv = heads
    attributes: dict[str, Attribute] = {
        "q_num_heads": num_heads, "kv_num_heads": num_kv, "update_rule": rule, "scale": 1.0,
    }  # fmt: skip
    out, present = graph.ops("LinearAttention", inputs, 2, domain=MICROSOFT, attributes=attributes)
    return out, present


def causal_conv(
    graph: Graph, x_BTC: str, weight_C1K: str, past_BCJ: str, *, shape: tuple[int, int], native: bool
) -> tuple[str, str]:
    """(depthwise causal convolution `(B, T, C)`, present state: its last K − 1 inputs). shape: (C, K)."""
    x_BCT = graph.op("Transpose", x_BTC, perm=(0, 2, 1))
    if native:  # channels first: three times faster on a prompt than its `channels_last`
        inputs = [x_BCT, weight_C1K, "", past_BCJ]
        y_BCT, present = graph.ops("CausalConvWithState", inputs, 2, domain=MICROSOFT)
    else:
        channels, taps = shape
        padded = graph.op("Concat", past_BCJ, x_BCT, axis=2)
        y_BCT = graph.op("Conv", padded, weight_C1K, group=channels)
        present = graph.op("Slice", padded, graph.ints(1 - taps), graph.ints(np.iinfo(np.int64).max), graph.ints(2))
    return graph.op("Transpose", y_BCT, perm=(0, 2, 1)), present


def _scanned(
    graph: Graph, q_BTX: str, k_BTX: str, v_BTX: str, past_BGKV: str, decay_BTG: str, beta_BTG: str,
    heads: tuple[int, int],
) -> tuple[str, str]:  # fmt: skip
    """The recurrence token by token in ONNX's `Scan`, whose time and memory grow with T alone."""
    num_heads, num_kv = heads
    q = graph.op("Reshape", q_BTX, graph.ints(0, 0, num_kv, num_heads // num_kv, -1))
    k = graph.op("Reshape", k_BTX, graph.ints(0, 0, num_kv, 1, -1))
    v = graph.op("Reshape", v_BTX, graph.ints(0, 0, num_kv, 1, -1))
    scanned = [q, k, v]
    for rate_BTG in (graph.op("Exp", decay_BTG) if decay_BTG else "", beta_BTG):
        if rate_BTG:
            scanned.append(graph.op("Reshape", rate_BTG, graph.ints(0, 0, num_kv, 1, 1)))
    body = _token(has_decay=bool(decay_BTG), has_beta=bool(beta_BTG))
    attributes: dict[str, Attribute] = {
        "body": body, "num_scan_inputs": len(scanned), "scan_input_axes": [1] * len(scanned), "scan_output_axes": [1],
    }  # fmt: skip
    present, out = graph.ops("Scan", [past_BGKV, *scanned], 2, attributes=attributes)
    return graph.op("Reshape", out, graph.ints(0, 0, -1)), present


def _token(*, has_decay: bool, has_beta: bool) -> onnx.GraphProto:
    """S ← decay·S;  S ← S + kᵀ(v), or kᵀ(beta·(v − kS));  out = qS, for every row and head at once."""
    names = ["state", "q", "k", "v", *(["decay"] if has_decay else []), *(["beta"] if has_beta else [])]
    nodes, state, added = [], "state", "v"
    if has_decay:
        nodes.append(helper.make_node("Mul", ["state", "decay"], ["decayed"]))
        state = "decayed"
    if has_beta:
        nodes.append(helper.make_node("MatMul", ["k", state], ["known"]))
        nodes.append(helper.make_node("Sub", ["v", "known"], ["news"]))
        nodes.append(helper.make_node("Mul", ["news", "beta"], ["delta"]))
        added = "delta"
    nodes += [
        helper.make_node("Transpose", ["k"], ["k_column"], perm=(0, 1, 3, 2)),
        helper.make_node("Mul", ["k_column", added], ["outer"]),
        helper.make_node("Add", [state, "outer"], ["next_state"]),
        helper.make_node("MatMul", ["q", "next_state"], ["out"]),
    ]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("next_state", "out")]
    return helper.make_graph(nodes, "token", floats, outputs)
