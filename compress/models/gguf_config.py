"""What a GGUF file says of its model and transformers does not read: rotary scaling, widths of heads, biases.

What can't be read exactly is refused by name. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.models.anatomy import family_of

if TYPE_CHECKING:
    from gguf import GGUFReader

ROPE_FREQS = "rope_freqs.weight"
"""The tensor of divisors of the rotary frequencies: what llama.cpp makes of the rope type `llama3`."""

_NAMED = ("llama", "qwen2", "qwen3")
"""The architectures whose biases and rotary embeddings are those of transformers' llama family."""
_BIASES = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}
_SCALING = "rope.scaling."
_SCALED_ELSEWHERE = ("finetuned",)
"""Keys of scaling that say nothing of how it is computed."""
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_LOW_FREQ_FACTORS = (1, 2, 3, 4, 8)
"""Tried in turn: frequencies only know the ratios of low_freq_factor, high_freq_factor and the original length."""


def said_config(reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, as transformers reads it from the file, with what it leaves out. Raises CompressError for what can't.

    Numbers that were rounded to float32 are the shortest decimals that round to them.
    """
    architecture = _architecture(reader)
    said = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items() if key.startswith(f"{architecture}.")
    }  # fmt: skip
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    full = {key: value for key, value in config.items() if key != "_model_name_or_path"}
    family = family_of(str(config["model_type"]), "its architecture")
    if "context_length" in said:
        full[family.key("max_position_embeddings")] = said["context_length"]
    if "feed_forward_length" in said:
        full[family.key("intermediate_size")] = said["feed_forward_length"]
    if "attention.layer_norm_rms_epsilon" in said:
        full[family.key("norm_eps")] = _decimal(said["attention.layer_norm_rms_epsilon"])
    if architecture in _NAMED:
        full |= _of_llama(said, tensors, full)
    elif any(key.startswith(_SCALING) for key in said):
        raise _unread(f"scales its rotary embedding, which can't be read of architecture {architecture}")
    return full


def check_tensors(reader: GGUFReader, names: Collection[str], num_layers: int) -> None:
    """Raise CompressError where the file has tensors that a model with weights of these `names` has no place for."""
    import gguf

    architecture = _architecture(reader)
    if architecture not in _NAMED:
        return
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, num_layers)
    placed = {table.get_name(name, (".weight", ".bias")) for name in names}
    if unplaced := sorted({tensor.name for tensor in reader.tensors} - placed - {ROPE_FREQS}):
        raise _unread(f"has tensors that no {architecture} has: {', '.join(unplaced[:3])}")


def _of_llama(said: Mapping[str, Any], tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    width = said["embedding_length"] // said["attention.head_count"]
    head_dim = said.get("attention.key_length") or said.get("rope.dimension_count") or width
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, head_dim) != head_dim:
            raise _unread(f"has {key} {said[key]} where a head is {head_dim} wide, which no supported model has")
    own: dict[str, Any] = {
        "num_key_value_heads": said.get("attention.head_count_kv", said["attention.head_count"]),
        "rope_parameters": _rope(said, tensors.get(ROPE_FREQS), head_dim),
    }
    if config["model_type"] != "qwen2" or head_dim != width:
        own["head_dim"] = head_dim
    biases = {key: any(name.endswith(leaf) for name in tensors) for leaf, key in _BIASES.items()}
    own |= {key: has for key, has in biases.items() if key in config}  # the other families have no choice
    if config["model_type"] == "mistral":
        own["sliding_window"] = None  # llama.cpp has none for it
    return own


def _rope(said: Mapping[str, Any], divisors: NDArray[np.float32] | None, head_dim: int) -> dict[str, Any]:
    """The config's `rope_parameters`."""
    theta = _decimal(said.get("rope.freq_base", 10000.0))
    scaling = {key.removeprefix(_SCALING): value for key, value in said.items() if key.startswith(_SCALING)}
    kind = scaling.pop("type", "none")
    factor = scaling.pop("factor", said.get("rope.scale_linear"))
    if kind == "none" and factor not in (None, 0.0, 1.0):
        kind = "linear"
    original = scaling.pop("original_context_length", None)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if divisors is not None and not (divisors == 1).all():
        if kind not in ("none", "llama3"):
            raise _unread(f"scales its rotary embedding twice: by {kind} and by {ROPE_FREQS}")
        parameters |= _llama3(divisors, theta, head_dim)
    elif kind in ("linear", "yarn"):
        parameters |= {"rope_type": kind, "factor": _decimal(factor)}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = original or said["context_length"]
            parameters |= {name: _decimal(scaling.pop(key)) for key, name in _YARN.items() if key in scaling}
    elif kind != "none":
        raise _unread(f"scales its rotary embedding by {kind}, which can't be read from GGUF")
    if unread := [key for key in scaling if key not in _SCALED_ELSEWHERE]:
        raise _unread(f"has {_SCALING}{unread[0]}, which can't be read from GGUF")
    return parameters


def _llama3(divisors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of llama3 that give exactly these divisors, whichever were written. Raises CompressError."""
    known = len(divisors) == head_dim // 2
    for found in _candidates(divisors.astype(np.float64), theta, head_dim) if known else ():
        if np.allclose(divisors, _divisors(found, theta, head_dim), 2e-6, 0):
            return {"rope_type": "llama3", **found}
    raise _unread(f"scales its rotary embedding by {ROPE_FREQS}, whose factors are not those of rope type llama3")


def _candidates(divisors: NDArray[np.float64], theta: float, head_dim: int) -> Iterator[dict[str, Any]]:
    """Sets of parameters that may be it: Meta's, and what two divisors between 1 and the largest say."""
    factor = _decimal(divisors.max())
    yield {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    between = (divisors > 1) & (divisors < divisors.max())
    if between.sum() < 2:
        return
    per_token = _turns(theta, head_dim)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(per_token[between], smooth[between], 1)  # original / (high - low), -low / (high - low)
    for low in _LOW_FREQ_FACTORS if offset < 0 else ():
        yield {
            "factor": factor, "low_freq_factor": float(low), "high_freq_factor": round(low * (1 - 1 / offset), 3),
            "original_max_position_embeddings": round(low * slope / -offset),
        }  # fmt: skip


def _divisors(parameters: Mapping[str, Any], theta: float, head_dim: int) -> NDArray[np.float64]:
    """What each rotary frequency is divided by under rope type llama3."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * _turns(theta, head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / parameters["factor"] + smooth))


def _unread(what: str) -> CompressError:
    return CompressError("GGUF", what, "name the model that it was made from")


def _turns(theta: float, head_dim: int) -> NDArray[np.float64]:
    """How far each rotary frequency turns from one token to the next, in whole turns."""
    return np.asarray(theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi))


def _architecture(reader: GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _decimal(value: float) -> float:
    return float(str(np.float32(value)))
