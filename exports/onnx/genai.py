"""`genai_config.json`: what onnxruntime-genai must know to run the folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.exports.onnx.sampling import search_options
from compress.mixers.spec import FULL, LINEAR
from compress.models.anatomy import ModelShape
from compress.models.config import HYBRID
from compress.runtime.ort import DENORMAL_AS_ZERO

if TYPE_CHECKING:
    from compress.exports.onnx.weights import Model

GENERIC_TYPE = "decoder"
CACHE_GIB = 1
"""What the keys and values may take that onnxruntime-genai makes room for where its user gives no length."""
_STEP = 256
_OWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def room(shape: ModelShape, *, num_bytes: int) -> int:
    """Tokens that a fused decoder of that shape reads and writes: all its positions, or as many as `CACHE_GIB` holds.

    num_bytes: of one cached number. Whole steps of 256 tokens, and one at least: the buffer is made at once, of the
    full length, however short the text is.
    """
    softmax = [layer for layer, spec in enumerate(shape.mixers or (None,) * shape.num_hidden_layers) if not spec]
    sizes = [own.num_key_value_heads * own.head_dim for own in map(shape.of_layer, softmax)]
    fitting = (CACHE_GIB << 30) // max(2 * num_bytes * sum(sizes), 1)
    return min(shape.max_position_embeddings, max(fitting // _STEP, 1) * _STEP)


def genai_config(
    model: Model, generation: Mapping[str, Any], threads: int, chunk_size: int | None, max_length: int
) -> tuple[dict[str, Any], list[str]]:
    """The config of a fused decoder, and what to say of it.

    generation: the model's `generation_config.json`, whose token ids win, and which says how tokens are chosen.
    max_length: tokens, a prompt's among them, that there is room for where the caller gives no length.
    """
    softmax = [layer for layer, spec in enumerate(model.mixers) if not spec]
    shape = model.shape.of_layer(softmax[0] if softmax else 0)
    ids = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := _said(generation.get(name), model.config.get(name))) is not None
    }
    ids.setdefault("pad_token_id", _first(ids.get("eos_token_id", 0)))
    decoder: dict[str, Any] = {
        "filename": "model.onnx",
        "session_options": {
            "log_id": "onnxruntime-genai", "intra_op_num_threads": threads, DENORMAL_AS_ZERO: "1",
            "provider_options": [],
        },
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "head_size": shape.head_dim,
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
    }  # fmt: skip
    if any(model.mixers):
        decoder["layer_types"] = [LINEAR if spec else FULL for spec in model.mixers]
        for when, names in (("past", decoder["inputs"]), ("present", decoder["outputs"])):
            names |= {f"{when}_{state}_names": f"{when}.%d.{state}" for state in ("conv", "recurrent")}
    length, model_type = shape.max_position_embeddings, shape.model_type.removeprefix(HYBRID)
    kind = model_type if model_type in _OWN_TYPES else GENERIC_TYPE
    search, notes = search_options(generation, shape.vocab_size)
    search |= {"max_length": max_length, "past_present_share_buffer": True}
    search |= {} if chunk_size is None else {"chunk_size": chunk_size}
    described = {"type": kind, "context_length": length, "vocab_size": shape.vocab_size, **ids, "decoder": decoder}
    return {"model": described, "search": search}, notes


def _said(*values: Any) -> Any:
    """The first that is an id, or some; -1 is how some configs say that there is none."""
    return next((value for value in values if value not in (None, [], -1)), None)


def _first(ids: Any) -> int:
    return int(ids[0] if isinstance(ids, list) else ids)
