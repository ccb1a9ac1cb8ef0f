"""A bidirectional encoder as one ONNX graph, with the head or the pooling that its folder declares.

`input_ids`, `attention_mask`, `token_type_ids` (B, T) → `last_hidden_state` with `pooler_output` or, where the folder
says how sentences are pooled, `sentence_embedding`; → `logits` for classifiers and masked language models. Rows may
be padded on either side, as `attention_mask` says; positions count from the row's start, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compress.exports.onnx.attention import attend, project, scale, split_heads
from compress.exports.onnx.blocks import Blocks, Stream
from compress.exports.onnx.decoder import mlp
from compress.exports.onnx.graph import Graph
from compress.exports.onnx.noncausal import fold_feature_maps, noncausal_attention
from compress.models.pooling import Pooling

BATCH, LENGTH = "batch_size", "sequence_length"
_POOLER, _CLASSIFIER, _MASKED_LM = "pooler.dense", "classifier", "cls.predictions"


def build_encoder(blocks: Blocks, pooling: Pooling | None) -> None:
    """Emit the whole encoder and its head."""
    blocks = replace(blocks, model=fold_feature_maps(blocks.model))
    graph, model, family = blocks.graph, blocks.model, blocks.model.shape.family
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        graph.input(name, np.int64, [BATCH, LENGTH])
    words = blocks.embed("input_ids", model.prefix + family.token_embedding)
    types = blocks.embed("token_type_ids", model.prefix + family.type_embedding)
    length = graph.op("Gather", graph.op("Shape", "input_ids"), graph.scalar(1, np.int64), axis=0)
    positions_T = graph.op("Range", graph.scalar(0, np.int64), length, graph.scalar(1, np.int64))
    places = blocks.embed(positions_T, model.prefix + family.position_embedding)
    hidden = blocks.norm(
        graph.op("Add", graph.op("Add", words, types), places), model.prefix + family.embedding_norm
    )
    masks = _masks(blocks)
    for layer in range(model.shape.num_hidden_layers):
        with graph.scope(f"layers.{layer}"):
            attended = _attention(blocks, hidden, layer, masks)
            hidden = blocks.last_norm(Stream(hidden, attended), model.layer(layer, family.attention_norm))
            hidden = blocks.last_norm(Stream(hidden, mlp(blocks, hidden, layer)), model.layer(layer, family.mlp_norm))
    _outputs(blocks, hidden, pooling)


@dataclass(frozen=True)
class _Masks:
    """The mask as softmax attention takes it and as linear attention does; `""` where no layer is of that kind."""

    softmax: str
    linear: str


def _masks(blocks: Blocks) -> _Masks:
    """softmax: `MultiHeadAttention`'s int32 `(B, T)`, or `(B, 1, 1, T)` to add: 0 for a token, −1e9 for padding.

    linear: float `(B, T, 1)`, 1 for a token.
    """
    graph, softmax, linear = blocks.graph, "", ""
    if None in blocks.model.mixers:
        softmax = graph.op("Cast", "attention_mask", to=6) if blocks.fused else _bias(graph)
    if any(blocks.model.mixers):
        linear = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=1), graph.ints(2))
    return _Masks(softmax, linear)


def _bias(graph: Graph) -> str:
    seen = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=9), graph.ints(1, 2))
    return graph.op("Where", seen, graph.scalar(0.0), graph.scalar(-1e9))


def _attention(blocks: Blocks, x: str, layer: int, masks: _Masks) -> str:
    model, anatomy = blocks.model, blocks.model.shape.family.attention
    with blocks.graph.scope("attention"):
        if model.mixers[layer] is None:
            mixed = _softmax_attention(blocks, x, layer, masks.softmax)
        else:
            mixed = noncausal_attention(blocks, x, layer, masks.linear)
        return blocks.linear(mixed, model.layer(layer, f"{anatomy.path}.{anatomy.out}"))


def _softmax_attention(blocks: Blocks, x: str, layer: int, mask: str) -> str:
    num_heads, factor = blocks.model.shape.of_layer(layer).num_attention_heads, scale(blocks.model, layer)
    q, k, v = project(blocks, x, layer, packed=False)
    if blocks.fused:
        options = {"num_heads": num_heads, "scale": factor, "mask_filter_value": -1e9}
        return blocks.graph.fused("MultiHeadAttention", q, k, v, "", mask, **options)
    q, k, v = (split_heads(blocks, value, num_heads) for value in (q, k, v))
    return attend(blocks, q, k, v, mask, factor)


def _outputs(blocks: Blocks, hidden: str, pooling: Pooling | None) -> None:
    graph, model = blocks.graph, blocks.model
    hidden_size, pooler = model.shape.hidden_size, model.prefix + _POOLER
    if model.has(f"{_MASKED_LM}.transform.dense"):
        graph.output(_masked_lm(blocks, hidden), "logits", np.float32, [BATCH, LENGTH, model.shape.vocab_size])
    elif model.has(_CLASSIFIER) and model.has(pooler):
        logits = blocks.linear(_pooled(blocks, hidden, pooler), _CLASSIFIER)
        graph.output(logits, "logits", np.float32, [BATCH, model.matrix(_CLASSIFIER).shape[0]])
    elif model.has(_CLASSIFIER):
        logits = blocks.linear(hidden, _CLASSIFIER)
        graph.output(logits, "logits", np.float32, [BATCH, LENGTH, model.matrix(_CLASSIFIER).shape[0]])
    else:
        graph.output(hidden, "last_hidden_state", np.float32, [BATCH, LENGTH, hidden_size])
        if pooling:
            sentence = _sentence(graph, "last_hidden_state", pooling)
            graph.output(sentence, "sentence_embedding", np.float32, [BATCH, hidden_size])
        elif model.has(pooler):
            pooled = _pooled(blocks, "last_hidden_state", pooler)
            graph.output(pooled, "pooler_output", np.float32, [BATCH, hidden_size])


def _pooled(blocks: Blocks, hidden: str, path: str) -> str:
    """tanh of a projection of the first token, `(B, hidden)`."""
    first = blocks.graph.op("Gather", hidden, blocks.graph.scalar(0, np.int64), axis=1)
    return blocks.graph.op("Tanh", blocks.linear(first, path))


def _masked_lm(blocks: Blocks, hidden: str) -> str:
    graph, model = blocks.graph, blocks.model
    inner = blocks.activation(blocks.linear(hidden, f"{_MASKED_LM}.transform.dense"))
    normed = blocks.norm(inner, f"{_MASKED_LM}.transform.LayerNorm")
    logits = blocks.tied(normed, model.prefix + model.shape.family.token_embedding)
    bias = graph.weight(f"{_MASKED_LM}.bias", model.vector(f"{_MASKED_LM}.bias"))
    return graph.op("Add", logits, bias)


def _sentence(graph: Graph, hidden: str, pooling: Pooling) -> str:
    if pooling.mode == "cls":
        pooled = graph.op("Gather", hidden, graph.scalar(0, np.int64), axis=1)
    else:
        weights = graph.op("Unsqueeze", graph.op("Cast", "attention_mask", to=1), graph.ints(2))
        total = graph.op("ReduceSum", graph.op("Mul", hidden, weights), graph.ints(1), keepdims=0)
        count = graph.op("Max", graph.op("ReduceSum", weights, graph.ints(1), keepdims=0), graph.scalar(1e-9))
        pooled = graph.op("Div", total, count)
    if not pooling.normalize:
        return pooled
    length = graph.op("ReduceL2", pooled, graph.ints(1), keepdims=1)
    return graph.op("Div", pooled, graph.op("Max", length, graph.scalar(1e-12)))
