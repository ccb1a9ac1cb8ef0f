"""The files of an exported folder: graph, weights, configs, tokenizer, licence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.artifact import write_json
from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.decoder import build_decoder
from compress.exports.onnx.encoder import build_encoder
from compress.exports.onnx.genai import genai_config
from compress.exports.onnx.graph import Graph
from compress.exports.onnx.inputs import takes_padding
from compress.exports.onnx.operators import missing
from compress.exports.onnx.recurrence import OPERATORS
from compress.exports.onnx.states import state_shapes
from compress.exports.onnx.tasks import task_of
from compress.exports.onnx.weights import Model
from compress.fetch.cache import recall
from compress.models.folder import GENERATION
from compress.models.load import carry
from compress.models.pooling import Pooling
from compress.runtime.session import CHUNK_SIZE, SHARED_CACHE, TAKES_PADDING
from compress.stage import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_folder(
    context: StageContext, model: PreTrainedModel, described: Model, pooling: Pooling | None, *, fused: bool,
    chunk_size: int | None, max_length: int, all_logits: bool = False,
) -> str:  # fmt: skip
    """Write everything that a deployment needs to `context.out`; optimum's name of the task.

    chunk_size and max_length: of fused decoders, see `genai_config`.
    """
    origin, out, family = context.input.path, context.out, described.shape.family
    task = task_of(model, pooled=pooling is not None)
    with Graph(out, family.name) as graph:
        blocks = Blocks(graph, described, fused)
        metadata = {"task": task, "fused": str(fused), SHARED_CACHE: "0"}
        if family.kind == "decoder":
            reads = replace(blocks, model=described.reading, reads=True) if described.prompt else None
            native = _has_native_mixers(context, described) if fused else False
            build_decoder(blocks, reads, native=native, all_logits=all_logits)
            metadata |= {SHARED_CACHE: str(int(fused)), TAKES_PADDING: str(int(takes_padding(blocks)))}
            metadata |= {CHUNK_SIZE: str(chunk_size)} if fused and chunk_size else {}
        else:
            build_encoder(blocks, pooling)
        graph.save(metadata)
    carry(origin, out)
    left_out = ("quantization_config", "auto_map")  # the graph has the weights as they are, and needs no code
    config = {key: value for key, value in context.input.config.items() if key not in left_out}
    write_json(out / "config.json", config)
    if fused and family.kind == "decoder" and _fits_genai(context, described):
        generation = recall(origin / GENERATION) or {}
        told, notes = genai_config(described, generation, context.target.threads, chunk_size, max_length)
        for note in notes:
            context.reporter.log.warning("%s: %s", GENERATION, note)
        if max_length < described.shape.max_position_embeddings:
            what = "onnxruntime-genai makes room for %d tokens of %d where it is told no length (max_length)"
            context.reporter.log.info(what, max_length, described.shape.max_position_embeddings)
        write_json(out / "genai_config.json", told)
    return task


def _has_native_mixers(context: StageContext, model: Model) -> bool:
    """Whether ONNX Runtime has the operators of the model's mixers; the log says what it costs where it has not."""
    if not any(model.mixers) or not (lacking := missing(OPERATORS)):
        return True
    what = "this ONNX Runtime has no %s: linear layers run token by token (Scan), some 10 µs a token and layer slower"
    context.reporter.log.warning(what, " and no ".join(lacking))
    return False


def _fits_genai(context: StageContext, model: Model) -> bool:
    """Whether onnxruntime-genai can run it: it takes one shape of states for all linear layers, one of all caches."""
    linear = [layer for layer, spec in enumerate(model.mixers) if spec]
    shapes = {tuple(state_shapes(model, layer, keep_both=True).values()) for layer in linear}
    softmax = [layer for layer, spec in enumerate(model.mixers) if not spec]
    groups = {model.shape.of_layer(layer).num_key_value_heads for layer in softmax}
    without = "which onnxruntime-genai can't: no genai_config.json is written"
    if len(shapes) > 1:
        context.reporter.log.warning("its mixers keep states of %d shapes, %s", len(shapes), without)
    if len(groups) > 1:
        context.reporter.log.warning("its layers have %s key/value heads, %s", sorted(groups), without)
    return len(shapes) <= 1 and len(groups) <= 1
