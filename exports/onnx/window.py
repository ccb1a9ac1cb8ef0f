"""Softmax over the last tokens, beside a linear attention that reads those before them, as ONNX nodes.

Queries go in blocks that share their keys, so that time and memory grow with T alone. Shapes: B rows, T new tokens, W
tokens of a window, S = W + T slots: what the window held, then the new tokens; a block's C queries and its K = C + W
slots; N blocks a row, M = B·N; H query and G key/value heads of D channels, V = D + 1 with the denominator's.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.exports.onnx.blocks import Blocks
from compress.mixers.spec import MixerSpec
from compress.models.anatomy import ModelShape

BLOCK = 64
"""Queries of a block, where there are so many."""


@dataclass(frozen=True)
class WindowInputs:
    """What the layers of one window share.

    queries_MC2, slots_MK2: which tokens and slots, each as [row, index], every block has; beyond the last one, that
    one. bias_M1CK: 0 where the query sees the slot, else −1e9. num_new, sizes: [T] and [T, W] as int64. read_BT1: 0
    where what leaves the window as a token comes is padding; `""` where there is none.
    """

    queries_MC2: str
    slots_MK2: str
    bias_M1CK: str
    num_new: str
    sizes: str
    read_BT1: str


def look_near(
    blocks: Blocks, qk: str, v: str, past: str, shape: ModelShape, spec: MixerSpec, inputs: WindowInputs
) -> tuple[str, str, str, str]:
    """(softmax over the window `(B, T, H, V)`, [q; k] and v as the linear attention reads them, the state).

    shape: with the layer's widths. qk: rotated, `(B, T, (H + G)·D)`. v: `(B, T, G·V)`. The state `(B, W, G·(D + V))`
    is the last keys and values, and those that leave it come out as k and v. The V-th channel of a head of softmax's is
    as v's, the same for all tokens.
    """
    graph = blocks.graph
    num_heads, num_kv, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    value_dim = spec.value_dim(shape.v_head_dim)
    q_width, k_width, v_width = num_heads * head_dim, num_kv * head_dim, num_kv * value_dim
    q, k = graph.split(qk, q_width, k_width)
    slots = graph.op("Concat", past, graph.op("Concat", k, v, axis=-1), axis=1)
    left, present = graph.ops("Split", [slots, inputs.sizes], 2, attributes={"axis": 1})
    k_left, v_left = graph.split(left, k_width, v_width)
    if inputs.read_BT1:
        v_left = graph.op("Mul", v_left, inputs.read_BT1)
    q_MCX = graph.op("GatherND", q, inputs.queries_MC2)
    k_MKX, v_MKX = graph.split(graph.op("GatherND", slots, inputs.slots_MK2), k_width, v_width)
    y_MCX = graph.op("Attention", q_MCX, k_MKX, v_MKX, inputs.bias_M1CK,
                     q_num_heads=num_heads, kv_num_heads=num_kv, scale=head_dim**-0.5)  # fmt: skip
    batch = graph.op("Shape", "input_ids", start=0, end=1)
    rows = graph.op("Reshape", y_MCX, graph.op("Concat", batch, graph.ints(-1, num_heads, value_dim), axis=0))
    near = graph.op("Slice", rows, graph.ints(0), inputs.num_new, graph.ints(1))
    return near, graph.op("Concat", q, k_left, axis=-1), v_left, present
