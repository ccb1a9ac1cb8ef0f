"""What the layers of a decoder read beside the hidden states: masks, positions and rotary tables, made once a graph.

Shapes: B rows, T new tokens, P past tokens, S = P + T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.exports.onnx.attention import FusedInputs, PlainInputs, window
from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.graph import Graph
from compress.exports.onnx.mixer import MixerInputs
from compress.exports.onnx.rotary import padded_rotary


@dataclass(frozen=True)
class Inputs:
    """For layers with softmax attention and for those with a mixer; None where there is no such layer."""

    attention: FusedInputs | PlainInputs | None
    mixer: MixerInputs | None


def decoder_inputs(blocks: Blocks, *, native: bool) -> Inputs:
    """Emit what the layers of this model need. native: as `MixerInputs`'."""
    mixers = blocks.model.mixers
    softmax_layers = [layer for layer, spec in enumerate(mixers) if spec is None]
    if not blocks.fused:
        plain = _plain_inputs(blocks, softmax_layers)
        tokens = _last_columns(blocks.graph) if any(mixers) else ""
        return Inputs(plain, MixerInputs(plain, tokens, "", native=False) if any(mixers) else None)
    attention = _fused_inputs(blocks) if softmax_layers else None
    return Inputs(attention, _mixer_inputs(blocks, native=native) if any(mixers) else None)


def takes_padding(blocks: Blocks) -> bool:
    """Whether rows may be padded. Not on the right of a convolution, whose state is the last T, tokens or not."""
    return not blocks.fused or not any(spec.conv_kernel for spec in blocks.model.mixers if spec)


def positions(graph: Graph) -> str:
    """`(B, T)`: after what the mask says is there already; from 0 in a prompt, padded on the right or not."""
    num_new = size(graph, "input_ids", 1)
    start = graph.op("Max", graph.op("Sub", _num_seen(graph), num_new), graph.ints(0))
    steps = graph.op("Range", graph.scalar(0, np.int64), num_new, graph.scalar(1, np.int64))
    return graph.op("Add", start, steps)


def num_real(graph: Graph) -> str:
    """`(B, 1)`: how many of each row's T new tokens are no padding on the right; below 1 in a step after some."""
    num_past = graph.op("Sub", size(graph, "attention_mask", 1), size(graph, "input_ids", 1))
    return graph.op("Sub", _num_seen(graph), num_past)


def size(graph: Graph, value: str, axis: int) -> str:
    """One dimension of `value` as an int64 scalar."""
    return graph.op("Gather", graph.op("Shape", value), graph.scalar(axis, np.int64), axis=0)


def _num_seen(graph: Graph) -> str:
    """`(B, 1)`: how many of each row's S tokens are no padding."""
    return graph.op("ReduceSum", "attention_mask", graph.ints(1), keepdims=1)


def _fused_inputs(blocks: Blocks) -> FusedInputs:
    graph, rotary = blocks.graph, blocks.model.rotary
    last_B = graph.op("Sub", graph.op("Squeeze", _num_seen(graph), graph.ints(1)), graph.scalar(1, np.int64))
    last = graph.op("Cast", last_B, to=6)
    total = graph.op("Cast", size(graph, "attention_mask", 1), to=6)
    if rotary is None:
        return FusedInputs(last, total)
    cos, sin, lanes_D = padded_rotary(*rotary, blocks.model.shape.head_dim)
    return FusedInputs(last, total, graph.weight("cos_cache", cos), graph.weight("sin_cache", sin), lanes_D)


def _mixer_inputs(blocks: Blocks, *, native: bool) -> MixerInputs:
    """The tables are those of the softmax layers where these take them as they are."""
    graph, rotary = blocks.graph, blocks.model.rotary
    assert rotary is not None
    names = []
    for name, table in zip(("cos_cache", "sin_cache"), rotary, strict=True):
        if graph.has_weight(name) and padded_rotary(*rotary, blocks.model.shape.head_dim)[2] is not None:
            name = f"{name}.unpadded"
        names.append(name if graph.has_weight(name) else graph.weight(name, table))
    mask = _new_tokens(graph) if takes_padding(blocks) else ""
    packed = graph.op("Concat", graph.op("Shape", "input_ids"), graph.ints(-1), axis=0)
    return MixerInputs((positions(graph), names[0], names[1]), mask, packed, native)


def _new_tokens(graph: Graph) -> str:
    """`(B, T, 1)`: 1 for a new token, 0 for padding on its right. A single new token is never padding."""
    num_new = size(graph, "input_ids", 1)
    is_step = graph.op("Equal", num_new, graph.scalar(1, np.int64))
    limit_B1 = graph.op("Where", is_step, num_new, num_real(graph))
    steps_T = graph.op("Range", graph.scalar(0, np.int64), num_new, graph.scalar(1, np.int64))
    return graph.op("Unsqueeze", graph.op("Cast", graph.op("Less", steps_T, limit_B1), to=1), graph.ints(2))


def _last_columns(graph: Graph) -> str:
    """`(B, T, 1)`: what the mask says of the last T of its S columns."""
    first = graph.op("Sub", size(graph, "attention_mask", 1), size(graph, "input_ids", 1))
    start = graph.op("Reshape", first, graph.ints(1))
    last = graph.op("Slice", "attention_mask", start, graph.ints(np.iinfo(np.int64).max), graph.ints(1))
    return graph.op("Unsqueeze", graph.op("Cast", last, to=1), graph.ints(2))


def _plain_inputs(blocks: Blocks, layers: list[int]) -> PlainInputs:
    """The masks that softmax layers need, and cos and sin at `position_ids`."""
    graph, model = blocks.graph, blocks.model
    biases = {width: _causal_bias(graph, width) for width in sorted({window(model, layer) for layer in layers})}
    if model.rotary is None:
        return PlainInputs(biases)
    tables = []
    for name, table in zip(("cos_cache", "sin_cache"), model.rotary, strict=True):
        half = graph.op("Gather", graph.weight(name, table), "position_ids", axis=0)
        whole = graph.op("Concat", half, half, axis=-1)
        tables.append(graph.op("Unsqueeze", whole, graph.ints(1)))
    return PlainInputs(biases, tables[0], tables[1])


def _causal_bias(graph: Graph, width: int) -> str:
    """`(B, 1, T, S)`: 0 where the key is no padding, not in the future and within `width` (0: all), else −1e9."""
    zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
    total, num_new = size(graph, "attention_mask", 1), size(graph, "input_ids", 1)
    keys_S = graph.op("Range", zero, total, one)
    queries_T = graph.op("Range", graph.op("Sub", total, num_new), total, one)
    queries_T1 = graph.op("Unsqueeze", queries_T, graph.ints(1))
    seen_TS = graph.op("LessOrEqual", keys_S, queries_T1)
    if width:
        near = graph.op("Greater", keys_S, graph.op("Sub", queries_T1, graph.ints(width)))
        seen_TS = graph.op("And", seen_TS, near)
    present_B11S = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=9), graph.ints(1, 2))
    seen = graph.op("And", present_B11S, seen_TS)
    return graph.op("Where", seen, graph.scalar(0.0), graph.scalar(-1e9))
