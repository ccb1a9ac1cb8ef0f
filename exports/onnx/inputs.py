"""What the layers of a decoder read beside the hidden states: masks, positions and rotary tables, made once a graph.

Shapes: B rows, T new tokens, P past tokens, S = P + T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compress.exports.onnx.attention import FusedInputs, PlainInputs, window
from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.features import Rotary
from compress.exports.onnx.graph import Graph
from compress.exports.onnx.mixer import MixerInputs
from compress.exports.onnx.rotary import padded_rotary
from compress.exports.onnx.window import BLOCK, WindowInputs


@dataclass(frozen=True)
class Inputs:
    """For layers with softmax attention and for those with a mixer; None where there is no such layer."""

    attention: FusedInputs | PlainInputs | None
    mixer: MixerInputs | None


def decoder_inputs(blocks: Blocks, *, native: bool) -> Inputs:
    """Emit what the layers of this model need. native: as `MixerInputs`'."""
    mixers = blocks.model.mixers
    softmax_layers = [layer for layer, spec in enumerate(mixers) if spec is None]
    attention: FusedInputs | PlainInputs | None = None
    if not blocks.fused:
        attention = _plain_inputs(blocks, softmax_layers)
    elif softmax_layers:
        attention = _fused_inputs(blocks)
    return Inputs(attention, _mixer_inputs(blocks, attention, native=native) if any(mixers) else None)


def takes_padding(blocks: Blocks) -> bool:
    """Whether rows may be padded. Not on the right of a convolution or window: its state is the last, tokens or not."""
    return not blocks.fused or not any(spec.conv_kernel or spec.window for spec in blocks.model.mixers if spec)


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


def _mixer_inputs(blocks: Blocks, attention: FusedInputs | PlainInputs | None, *, native: bool) -> MixerInputs:
    """attention: what the softmax layers read, some of which serves here too."""
    graph, mask = blocks.graph, ""
    if isinstance(attention, PlainInputs):
        cos, sin = (graph.op("Transpose", table, perm=(0, 2, 1, 3)) for table in (attention.cos, attention.sin))
        rotary: Rotary = replace(attention, cos=cos, sin=sin)
        mask = _last_columns(graph)
    else:
        rotary = positions(graph), *_mixer_tables(blocks)
        mask = _new_tokens(graph) if takes_padding(blocks) else ""
    packed = graph.op("Concat", graph.op("Shape", "input_ids"), graph.ints(-1), axis=0)
    widths = sorted({spec.window for spec in blocks.model.mixers if spec and spec.window})
    return MixerInputs(rotary, mask, packed, native, {width: _window_inputs(blocks, width) for width in widths})


def _mixer_tables(blocks: Blocks) -> tuple[str, str]:
    """Cosines and sines: those of the softmax layers where these take them as they are."""
    graph, rotary = blocks.graph, blocks.model.rotary
    assert rotary is not None
    names = []
    for name, table in zip(("cos_cache", "sin_cache"), rotary, strict=True):
        if graph.has_weight(name) and padded_rotary(*rotary, blocks.model.shape.head_dim)[2] is not None:
            name = f"{name}.unpadded"
        names.append(name if graph.has_weight(name) else graph.weight(name, table))
    return names[0], names[1]


def _window_inputs(blocks: Blocks, width: int) -> WindowInputs:
    """Query i of a block stands in its slot i + `width`, and sees from slot i + 1 to there.

    Padding is seen by itself alone, so that no softmax is of nothing. What comes before the first token is as
    padding on its left: columns of zeros before the mask's.
    """
    graph, zero, one = blocks.graph, blocks.graph.scalar(0, np.int64), blocks.graph.scalar(1, np.int64)
    num_new, further = size(graph, "input_ids", 1), graph.scalar(width, np.int64)
    length = graph.op("Min", num_new, graph.scalar(BLOCK, np.int64))
    starts_N1 = graph.op("Unsqueeze", graph.op("Range", zero, num_new, length), graph.ints(1))
    queries_C = graph.op("Range", zero, length, one)
    slots_K = graph.op("Range", zero, graph.op("Add", length, further), one)
    last = graph.op("Sub", num_new, one)
    queries_MC2 = _of_each_row(graph, graph.op("Min", graph.op("Add", starts_N1, queries_C), last))
    end = graph.op("Add", last, further)
    slots_MK2 = _of_each_row(graph, graph.op("Min", graph.op("Add", starts_N1, slots_K), end))
    queries_C1 = graph.op("Unsqueeze", queries_C, graph.ints(1))
    own_C1 = graph.op("Add", queries_C1, further)
    near_CK = graph.op("And", graph.op("Greater", slots_K, queries_C1), graph.op("Less", slots_K, own_C1))
    padded = graph.op("Pad", "attention_mask", graph.ints(0, width, 0, 0))
    token_BS = graph.op("Slice", padded, _num_past(graph), graph.ints(np.iinfo(np.int64).max), graph.ints(1))
    token_MK = graph.op("GatherND", graph.op("Cast", token_BS, to=9), slots_MK2)
    token_M11K = graph.op("Unsqueeze", token_MK, graph.ints(1, 2))
    seen = graph.op("Or", graph.op("And", token_M11K, near_CK), graph.op("Equal", slots_K, own_C1))
    bias = graph.op("Where", seen, graph.scalar(0.0), graph.scalar(-1e9))
    num_new_1 = graph.op("Reshape", num_new, graph.ints(1))
    sizes = graph.op("Concat", num_new_1, graph.ints(width), axis=0)
    read = ""
    if not blocks.fused:
        left = graph.op("Slice", token_BS, graph.ints(0), num_new_1, graph.ints(1))
        read = graph.op("Unsqueeze", graph.op("Cast", left, to=1), graph.ints(2))
    return WindowInputs(queries_MC2, slots_MK2, bias, num_new_1, sizes, read)


def _of_each_row(graph: Graph, index_NC: str) -> str:
    """`(B·N, C, 2)`: [row, index] for every row of the batch, the first row's N first."""
    size_N_C, batch = graph.op("Shape", index_NC), graph.op("Shape", "input_ids", start=0, end=1)
    rows_B = graph.op("Range", graph.scalar(0, np.int64), size(graph, "input_ids", 0), graph.scalar(1, np.int64))
    rows_B11 = graph.op("Unsqueeze", rows_B, graph.ints(1, 2))
    whole = graph.op("Concat", batch, size_N_C, axis=0)
    pairs = (graph.op("Unsqueeze", graph.op("Expand", x, whole), graph.ints(3)) for x in (rows_B11, index_NC))
    pairs_BNC2 = graph.op("Concat", *pairs, axis=3)
    of_a_block = graph.op("Concat", graph.ints(-1), graph.op("Shape", index_NC, start=1), graph.ints(2), axis=0)
    return graph.op("Reshape", pairs_BNC2, of_a_block)


def _new_tokens(graph: Graph) -> str:
    """`(B, T, 1)`: 1 for a new token, 0 for padding on its right. A single new token is never padding."""
    num_new = size(graph, "input_ids", 1)
    is_step = graph.op("Equal", num_new, graph.scalar(1, np.int64))
    limit_B1 = graph.op("Where", is_step, num_new, num_real(graph))
    steps_T = graph.op("Range", graph.scalar(0, np.int64), num_new, graph.scalar(1, np.int64))
    return graph.op("Unsqueeze", graph.op("Cast", graph.op("Less", steps_T, limit_B1), to=1), graph.ints(2))


def _num_past(graph: Graph) -> str:
    """`(1,)`: P."""
    num_past = graph.op("Sub", size(graph, "attention_mask", 1), size(graph, "input_ids", 1))
    return graph.op("Reshape", num_past, graph.ints(1))


def _last_columns(graph: Graph) -> str:
    """`(B, T, 1)`: what the mask says of the last T of its S columns."""
    last = graph.op("Slice", "attention_mask", _num_past(graph), graph.ints(np.iinfo(np.int64).max), graph.ints(1))
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
