"""A causal decoder with its cache as one ONNX graph, from its family's anatomy.

Names are optimum's: `input_ids`, `attention_mask`, (`position_ids`,) `past_key_values.N.key|value` → `logits`,
`present.N.key|value`; those of a linear layer N onnxruntime-genai's: `past.N.recurrent|conv` →
`present.N.recurrent|conv`, of one size whatever the length. A fused graph computes the logits of the last token of each
row, or of all; feed `logits_to_keep` (Hugging Face's word, left out: 1, or 0) with 0 for all, else for so many. Shapes:
B rows, T new tokens, P past tokens, S = P + T.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from compress.exports.onnx import FEW
from compress.exports.onnx.attention import FusedInputs, fused_attention, plain_attention
from compress.exports.onnx.blocks import Blocks, Stream
from compress.exports.onnx.graph import Dimension, Graph
from compress.exports.onnx.inputs import Inputs, decoder_inputs, num_real, positions, size
from compress.exports.onnx.mixer import mixer
from compress.exports.onnx.states import state_shapes
from compress.exports.onnx.weights import Model
from compress.runtime.session import LOGITS_TO_KEEP

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def build_decoder(
    blocks: Blocks, reading: Blocks | None = None, *, native: bool = True, all_logits: bool = False
) -> None:
    """Emit the whole decoder. Its rows may be padded on the left where it is not fused, on the right where it is.

    reading: what reads more than `FEW` new tokens, where it is not what reads fewer; both share the embedding and head.
    native: whether ONNX Runtime has the recurrences of linear layers as operators. all_logits: where nothing is said, a
    fused graph gives those of every token.
    """
    graph, model = blocks.graph, blocks.model
    shape, family = model.shape, model.shape.family
    graph.input("input_ids", np.int64, [BATCH, NEW])
    graph.input("attention_mask", np.int64, [BATCH, TOTAL])
    if not blocks.fused:
        graph.input("position_ids", np.int64, [BATCH, NEW])
    for layer in range(shape.num_hidden_layers):
        for name, dimensions in _cache(blocks, layer, PAST).items():
            prefix = "past" if model.mixers[layer] else "past_key_values"
            graph.input(f"{prefix}.{layer}.{name}", _cache_dtype(model, layer), dimensions)
    stream = Stream(blocks.embed("input_ids", model.prefix + family.token_embedding))
    if family.position_embedding:
        places = positions(graph) if blocks.fused else "position_ids"
        stream = Stream(stream.value, blocks.embed(places, model.prefix + family.position_embedding))
    inputs = decoder_inputs(blocks, native=native)
    cache = [(layer, name) for layer in range(shape.num_hidden_layers) for name in _cache(blocks, layer, TOTAL)]
    if reading is None:
        hidden, *presents = _body(blocks, stream, inputs)
    else:
        is_prompt = graph.op("Greater", size(graph, "input_ids", 1), graph.scalar(FEW, np.int64))
        bodies = {name: partial(_body, own, stream, inputs) for name, own in (("prompt", reading), ("token", blocks))}
        dtypes: list[type[np.generic]] = [np.float32, *(_cache_dtype(model, layer) for layer, _ in cache)]
        hidden, *presents = graph.either(is_prompt, bodies, dtypes)
    for (layer, name), present in zip(cache, presents, strict=True):
        dimensions = _cache(blocks, layer, TOTAL)[name]
        graph.output(present, f"present.{layer}.{name}", _cache_dtype(model, layer), dimensions)
    if blocks.fused:
        hidden = _kept(graph, hidden, 0 if all_logits else 1)
    # onnxruntime-genai reads from the declared shape how many it gets
    num_logits = 1 if blocks.fused and not all_logits else NEW
    graph.output(_head(blocks, hidden), "logits", np.float32, [BATCH, num_logits, shape.vocab_size])


def _body(blocks: Blocks, stream: Stream, inputs: Inputs) -> list[str]:
    """What the layers and the last norm make of the stream; then the cache of each layer, in the order of `_cache`."""
    model, presents = blocks.model, list[str]()
    for layer in range(model.shape.num_hidden_layers):
        with blocks.graph.scope(f"layers.{layer}"):
            stream, present = _layer(blocks, stream, layer, inputs)
        presents += [present[name] for name in _cache(blocks, layer, TOTAL)]
    return [blocks.last_norm(stream, model.prefix + model.shape.family.final_norm), *presents]


def _cache(blocks: Blocks, layer: int, length: str) -> dict[str, list[Dimension]]:
    """What a layer keeps, by name, with its shape; keys and values of `length` tokens."""
    model = blocks.model
    if model.mixers[layer]:
        return {name: [BATCH, *sizes] for name, sizes in state_shapes(model, layer, keep_both=blocks.fused).items()}
    own = model.shape.of_layer(layer)
    dimensions: list[Dimension] = [BATCH, own.num_key_value_heads, length, own.head_dim]
    return {"key": dimensions, "value": dimensions}


def _cache_dtype(model: Model, layer: int) -> type[np.generic]:
    return np.int8 if layer in model.cache_scales else np.float32


def _layer(blocks: Blocks, stream: Stream, layer: int, inputs: Inputs) -> tuple[Stream, dict[str, str]]:
    """The stream behind a layer, and its cache by name."""
    graph, model, family = blocks.graph, blocks.model, blocks.model.shape.family
    normed, stream = blocks.skip_norm(stream, model.layer(layer, family.attention_norm))
    with graph.scope("attention"):
        mixed, present = _mixed(blocks, normed, layer, inputs)
        attended = blocks.linear(mixed, model.layer(layer, f"{family.attention.path}.{family.attention.out}"))
    if model.shape.residual == "parallel":
        normed = blocks.norm(stream.value, model.layer(layer, family.mlp_norm))
        return Stream(stream.value, graph.op("Add", attended, mlp(blocks, normed, layer))), present
    normed, stream = blocks.skip_norm(Stream(stream.value, attended), model.layer(layer, family.mlp_norm))
    return Stream(stream.value, mlp(blocks, normed, layer)), present


def _mixed(blocks: Blocks, x: str, layer: int, inputs: Inputs) -> tuple[str, dict[str, str]]:
    """What a layer's attention, or the mixer in its place, gives to the output projection; its cache by name."""
    if spec := blocks.model.mixers[layer]:
        assert inputs.mixer
        return mixer(blocks, x, layer, spec, inputs.mixer)
    assert inputs.attention
    if isinstance(inputs.attention, FusedInputs):
        mixed, keys, values = fused_attention(blocks, x, layer, inputs.attention)
    else:
        mixed, keys, values = plain_attention(blocks, x, layer, inputs.attention)
    return mixed, {"key": keys, "value": values}


def mlp(blocks: Blocks, x: str, layer: int) -> str:
    """`down(act(gate(x))·up(x))`, or `down(act(up(x)))`."""
    graph, model, anatomy = blocks.graph, blocks.model, blocks.model.shape.family.mlp
    up, down = model.layer(layer, anatomy.up), model.layer(layer, anatomy.down)
    with graph.scope("mlp"):
        if anatomy.gate:
            gate = model.layer(layer, anatomy.gate)
            gated, raised = blocks.linears(x, gate, up, name=model.layer(layer, "mlp.gate_up_proj"))
            hidden = graph.op("Mul", blocks.activation(gated), raised)
        else:
            hidden = blocks.activation(blocks.linear(x, up))
        return blocks.linear(hidden, down)


def _kept(graph: Graph, hidden_BTK: str, left_out: int) -> str:
    """The last `logits_to_keep` tokens of each row, `(B, N, K)`: what is padded on its right does not count; 0: all T.

    A row that is shorter than that begins with its first token.
    """
    keep, zero = graph.default_input(LOGITS_TO_KEEP, np.array(left_out, np.int64)), graph.scalar(0, np.int64)
    num_kept = graph.op("Where", graph.op("Equal", keep, zero), size(graph, "input_ids", 1), keep)
    first_B1 = graph.op("Max", graph.op("Sub", num_real(graph), num_kept), zero)
    index_BN = graph.op("Add", first_B1, graph.op("Range", zero, num_kept, graph.scalar(1, np.int64)))
    return graph.op("GatherND", hidden_BTK, graph.op("Unsqueeze", index_BN, graph.ints(2)), batch_dims=1)


def _head(blocks: Blocks, hidden: str) -> str:
    graph, family = blocks.graph, blocks.model.shape.family
    with graph.scope(family.lm_head):
        if blocks.model.has(family.lm_head):
            return blocks.linear(hidden, family.lm_head)
        return blocks.tied(hidden, blocks.model.prefix + family.token_embedding)
