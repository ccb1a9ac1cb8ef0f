"""`genai_config.json`: what onnxruntime-genai must know to run the folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.exports.onnx.weights import Model
from compress.mixers.spec import FULL, LINEAR
from compress.models.config import HYBRID
from compress.runtime.ort import DENORMAL_AS_ZERO

GENERIC_TYPE = "decoder"
_OWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def genai_config(
    model: Model, generation: Mapping[str, Any], threads: int, chunk_size: int | None
) -> dict[str, Any]:
    """The config of a fused decoder. generation: the model's `generation_config.json`, whose token ids win."""
    softmax = [layer for layer, spec in enumerate(model.mixers) if not spec]
    shape = model.shape.of_layer(softmax[0] if softmax else 0)
    ids = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := generation.get(name, model.config.get(name))) is not None
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
    search = {"max_length": length, "do_sample": False, "num_beams": 1, "past_present_share_buffer": True}
    search |= {} if chunk_size is None else {"chunk_size": chunk_size}
    described = {"type": kind, "context_length": length, "vocab_size": shape.vocab_size, **ids, "decoder": decoder}
    return {"model": described, "search": search}


def _first(ids: Any) -> int:
    return int(ids[0] if isinstance(ids, list) else ids)
