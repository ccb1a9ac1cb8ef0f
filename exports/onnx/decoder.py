"""A causal decoder with a key/value cache as one ONNX graph, from its family's anatomy.

Names are optimum's: `input_ids`, `attention_mask`, (`position_ids`,) `past_key_values.N.key|value` → `logits`,
`present.N.key|value`. A fused graph computes the logits of the last token of each row; feed `logits_to_keep` (Hugging
Face's word, left out: 1) with 0 for those of all. Shapes: B rows, T new tokens, P past tokens, S = P + T.
"""

from __future__ import annotations

import numpy as np

from compress.exports.onnx.attention import FusedInputs, PlainInputs, fused_attention, plain_attention, window
from compress.exports.onnx.blocks import Blocks, Stream
from compress.exports.onnx.graph import Dimension, Graph
from compress.exports.onnx.rotary import padded_rotary
from compress.runtime.session import LOGITS_TO_KEEP

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def build_decoder(blocks: Blocks) -> None:
    """Emit the whole decoder. Its rows may be padded on the right where it is fused, on the left where it is not."""
    graph, model = blocks.graph, blocks.model
    shape, family = model.shape, model.shape.family
    graph.input("input_ids", np.int64, [BATCH, NEW])
    graph.input("attention_mask", np.int64, [BATCH, TOTAL])
    if not blocks.fused:
        graph.input("position_ids", np.int64, [BATCH, NEW])
    for layer in range(shape.num_hidden_layers):
        for part in ("key", "value"):
            dimensions: list[Dimension] = [BATCH, shape.num_key_value_heads, PAST, shape.head_dim]
            graph.input(f"past_key_values.{layer}.{part}", np.float32, dimensions)
    stream = Stream(blocks.embed("input_ids", model.prefix + family.token_embedding))
    if family.position_embedding:
        positions = _learned_positions(graph) if blocks.fused else "position_ids"
        stream = Stream(stream.value, blocks.embed(positions, model.prefix + family.position_embedding))
    last_B = _last_index(graph) if blocks.fused else ""
    inputs = _fused_inputs(blocks, last_B) if blocks.fused else _plain_inputs(blocks)
    for layer in range(shape.num_hidden_layers):
        with graph.scope(f"layers.{layer}"):
            stream = _layer(blocks, stream, layer, inputs)
    hidden = blocks.last_norm(stream, model.prefix + family.final_norm)
    if blocks.fused:
        hidden = _kept(graph, hidden, last_B)
    num_logits = 1 if blocks.fused else NEW  # onnxruntime-genai reads from the declared shape how many it gets
    graph.output(_head(blocks, hidden), "logits", np.float32, [BATCH, num_logits, shape.vocab_size])


def _layer(blocks: Blocks, stream: Stream, layer: int, inputs: FusedInputs | PlainInputs) -> Stream:
    graph, model, family = blocks.graph, blocks.model, blocks.model.shape.family
    normed, stream = blocks.skip_norm(stream, model.layer(layer, family.attention_norm))
    with graph.scope("attention"):
        if isinstance(inputs, FusedInputs):
            mixed, keys, values = fused_attention(blocks, normed, layer, inputs)
        else:
            mixed, keys, values = plain_attention(blocks, normed, layer, inputs)
        attended = blocks.linear(mixed, model.layer(layer, f"{family.attention.path}.{family.attention.out}"))
    for part, value in (("key", keys), ("value", values)):
        dimensions: list[Dimension] = [BATCH, model.shape.num_key_value_heads, TOTAL, model.shape.head_dim]
        graph.output(value, f"present.{layer}.{part}", np.float32, dimensions)
    if model.shape.residual == "parallel":
        normed = blocks.norm(stream.value, model.layer(layer, family.mlp_norm))
        return Stream(stream.value, graph.op("Add", attended, mlp(blocks, normed, layer)))
    normed, stream = blocks.skip_norm(Stream(stream.value, attended), model.layer(layer, family.mlp_norm))
    return Stream(stream.value, mlp(blocks, normed, layer))


def mlp(blocks: Blocks, x: str, layer: int) -> str:
    """`down(act(gate(x))·up(x))`, or `down(act(up(x)))`."""
    graph, model, anatomy = blocks.graph, blocks.model, blocks.model.shape.family.mlp
    with graph.scope("mlp"):
        up = blocks.linear(x, model.layer(layer, anatomy.up))
        if anatomy.gate:
            hidden = graph.op("Mul", blocks.activation(blocks.linear(x, model.layer(layer, anatomy.gate))), up)
        else:
            hidden = blocks.activation(up)
        return blocks.linear(hidden, model.layer(layer, anatomy.down))


def _kept(graph: Graph, hidden_BTK: str, last_B: str) -> str:
    """The last `logits_to_keep` tokens of each row, `(B, N, K)`: what is padded on its right does not count; 0: all T.

    A row that is shorter than that begins with its first token.
    """
    keep, one = graph.default_input(LOGITS_TO_KEEP, np.array(1, np.int64)), graph.scalar(1, np.int64)
    num_new = _size(graph, "input_ids", 1)
    num_kept = graph.op("Where", graph.op("Equal", keep, graph.scalar(0, np.int64)), num_new, keep)
    num_past = graph.op("Sub", _size(graph, "attention_mask", 1), num_new)
    before = graph.op("Add", num_past, graph.op("Sub", num_kept, one))
    first_B = graph.op("Max", graph.op("Sub", last_B, before), graph.scalar(0, np.int64))
    steps_N = graph.op("Range", graph.scalar(0, np.int64), num_kept, one)
    index_BN = graph.op("Add", graph.op("Unsqueeze", first_B, graph.ints(1)), steps_N)
    return graph.op("GatherND", hidden_BTK, graph.op("Unsqueeze", index_BN, graph.ints(2)), batch_dims=1)


def _head(blocks: Blocks, hidden: str) -> str:
    graph, family = blocks.graph, blocks.model.shape.family
    with graph.scope(family.lm_head):
        if blocks.model.has(family.lm_head):
            return blocks.linear(hidden, family.lm_head)
        return blocks.tied(hidden, blocks.model.prefix + family.token_embedding)


def _fused_inputs(blocks: Blocks, last_B: str) -> FusedInputs:
    graph, rotary = blocks.graph, blocks.model.rotary
    last = graph.op("Cast", last_B, to=6)
    total = graph.op("Cast", _size(graph, "attention_mask", 1), to=6)
    if rotary is None:
        return FusedInputs(last, total)
    cos, sin, lanes_D = padded_rotary(*rotary, blocks.model.shape.head_dim)
    return FusedInputs(last, total, graph.weight("cos_cache", cos), graph.weight("sin_cache", sin), lanes_D)


def _last_index(graph: Graph) -> str:
    """`(B,)` int64: where each row's last token stands among S, padding on the right left out."""
    num_seen = graph.op("ReduceSum", "attention_mask", graph.ints(1), keepdims=0)
    return graph.op("Sub", num_seen, graph.scalar(1, np.int64))


def _learned_positions(graph: Graph) -> str:
    """`(B, T)`: after what the mask says is there already; from 0 in a prompt, padded on the right or not."""
    num_new = _size(graph, "input_ids", 1)
    num_seen = graph.op("ReduceSum", "attention_mask", graph.ints(1), keepdims=1)
    start = graph.op("Max", graph.op("Sub", num_seen, num_new), graph.ints(0))
    steps = graph.op("Range", graph.scalar(0, np.int64), num_new, graph.scalar(1, np.int64))
    return graph.op("Add", start, steps)


def _plain_inputs(blocks: Blocks) -> PlainInputs:
    """The masks that the layers need, and cos and sin at `position_ids`."""
    graph, model = blocks.graph, blocks.model
    windows = {window(model, layer) for layer in range(model.shape.num_hidden_layers)}
    biases = {size: _causal_bias(graph, size) for size in sorted(windows)}
    if model.rotary is None:
        return PlainInputs(biases)
    tables = []
    for name, table in zip(("cos_cache", "sin_cache"), model.rotary, strict=True):
        half = graph.op("Gather", graph.weight(name, table), "position_ids", axis=0)
        whole = graph.op("Concat", half, half, axis=-1)
        tables.append(graph.op("Unsqueeze", whole, graph.ints(1)))
    return PlainInputs(biases, tables[0], tables[1])


def _causal_bias(graph: Graph, size: int) -> str:
    """`(B, 1, T, S)`: 0 where the key is no padding, not in the future and within `size` (0: all), else −1e9."""
    zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
    total, num_new = _size(graph, "attention_mask", 1), _size(graph, "input_ids", 1)
    keys_S = graph.op("Range", zero, total, one)
    queries_T = graph.op("Range", graph.op("Sub", total, num_new), total, one)
    queries_T1 = graph.op("Unsqueeze", queries_T, graph.ints(1))
    seen_TS = graph.op("LessOrEqual", keys_S, queries_T1)
    if size:
        near = graph.op("Greater", keys_S, graph.op("Sub", queries_T1, graph.ints(size)))
        seen_TS = graph.op("And", seen_TS, near)
    present_B11S = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=9), graph.ints(1, 2))
    seen = graph.op("And", present_B11S, seen_TS)
    return graph.op("Where", seen, graph.scalar(0.0), graph.scalar(-1e9))


def _size(graph: Graph, value: str, axis: int) -> str:
    """One dimension of `value` as an int64 scalar."""
    return graph.op("Gather", graph.op("Shape", value), graph.scalar(axis, np.int64), axis=0)
