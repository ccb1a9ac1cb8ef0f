"""Artifacts of format `quantized`: a `save_pretrained` folder with codes, scales and zero points for some weights.

`X.weight` becomes `X.weight.codes`, `X.weight.scales` and, where there are any, `X.weight.zero_points`,
`X.weight.input_scale` and `X.weight.input_zero_point`, all as `QTensor.pack` lays them out and as (output, input) also
where the model has it transposed (GPT-2). Other weights lie there as they are, in the type that the model's source has
where that holds them exactly. A head tied to a quantised embedding is not stored: the embedding's codes serve both.
config.json keeps all that it had, but for the `auto_map` of code that is not copied, and gains

    "quantization_config": {"quant_method": "compress", "scheme": NAME, "symmetric": BOOL, "reduce_range": BOOL,
                            "tensors": {"X.weight": {"scheme": OTHER, "symmetric": BOOL, "in_features": K}}}

where `tensors` names only what differs: another scheme, zero points where the others have none (or none where they have
some), or a K that the padded codes do not tell. `reduce_range` is that of all weights with int8 codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact import write_json
from compress.errors import CompressError
from compress.models.anatomy import family_of
from compress.models.dtypes import as_stored, declare_dtype, half_types
from compress.models.folder import config_of
from compress.models.load import auto_class, carry, left_out
from compress.models.pretrained import new_model, with_weights
from compress.quant import bnb
from compress.quant.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.quant.qtensor import QTensor

KEY = "quantization_config"
METHOD = "compress"
WEIGHTS = "model.safetensors"


def save_quantized(
    model: PreTrainedModel, tensors: Mapping[str, QTensor], scheme: Scheme, origin: Path, out: Path
) -> None:
    """Write `model`, whose weights named in `tensors` are stored quantised, to `out`, with what travels of `origin`.

    `scheme` is the one that most tensors have. `model` itself holds floats under the same names. Raises CompressError
    for values that are NaN or infinite.
    """
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        if name in tensors:
            stored |= {f"{name}.{part}": value for part, value in tensors[name].pack().items()}
        else:
            floats[name] = tensor.detach().contiguous()
    floats = as_stored(floats, half_types(origin))
    stored |= floats
    _refuse_nan(stored, out)
    save_file(stored, out / WEIGHTS, metadata={"format": "pt"})
    config = config_of(origin) or {}
    config.pop("auto_map", None)  # a hybrid model's own code, which only a plain folder carries
    declare_dtype(config, floats.values())
    reduced = any(not tensor.scheme.blockwise and tensor.scheme.bits < 8 for tensor in tensors.values())
    config[KEY] = {
        "quant_method": METHOD, "scheme": scheme.name, "symmetric": scheme.symmetric, "reduce_range": reduced,
        "tensors": {name: own for name, tensor in tensors.items() if (own := _exceptions(tensor, scheme))},
    }  # fmt: skip
    write_json(out / "config.json", config)
    carry(origin, out)


def read_quantized(folder: Path) -> tuple[dict[str, Any], dict[str, QTensor | Tensor]]:
    """`config.json` as it is, and every tensor by its name: QTensors under the names of the weights they stand for.

    Floats are float32, however they are stored.

    Raises CompressError for a folder that is no quantised model or a damaged one, and for NaN or infinite values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        stored = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CompressError(str(folder), f"is no readable model: {error}", "run its stage again") from error
    declared = config.get(KEY) or {}
    if declared.get("quant_method") == bnb.METHOD:
        raise CompressError(str(folder), bnb.PYTORCH_ONLY, "quantize by another scheme, as w4-block32")
    if declared.get("quant_method") != METHOD or declared.get("scheme") not in SCHEMES:
        raise CompressError(str(folder / "config.json"), f"{KEY} names no scheme of compress", "quantize it first")
    _refuse_nan(stored, folder)
    tensors: dict[str, QTensor | Tensor] = {}
    for name in sorted(stored):
        base, _, part = name.rpartition(".")
        if part == "codes":
            tensors[base] = _unpacked(stored, declared, base, folder)
        elif f"{base}.codes" not in stored:
            plain = stored[name]
            tensors[name] = plain.float() if plain.is_floating_point() else plain
    return config, tensors


def _unpacked(stored: Mapping[str, Tensor], declared: Mapping[str, Any], name: str, folder: Path) -> QTensor:
    from compress.quant.qtensor import PARTS, QTensor

    parts = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
    try:
        scheme, k = _declared(declared, name, parts["codes"])
        return QTensor.unpack(parts, scheme, k)
    except ValueError as error:
        raise CompressError(str(folder / WEIGHTS), f"{name}: {error}", "run its stage again") from error


def _refuse_nan(stored: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            what = f"{name} has values that are NaN or infinite"
            raise CompressError(str(folder / WEIGHTS), what, "look where they come from: the model, a scale, training")


def load_quantized_model(folder: Path, *, accuracy_level: int = 0) -> PreTrainedModel:
    """The stored model in eval mode, its quantised modules computing what the exported operators do.

    accuracy_level: as `MatMulNBits` has it; 4 rounds activations to int8 by blocks. Raises CompressError for weights
    that do not fit config.json.
    """
    import torch
    import transformers

    from compress.quant.modules import replace_modules
    from compress.quant.qtensor import QTensor

    config_dict, tensors = read_quantized(folder)
    quantised = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    plain = {key: value for key, value in config_dict.items() if key != KEY}
    family = family_of(plain["model_type"], str(folder))
    state = {name: _as_float(name, tensor, transposed=family.conv1d) for name, tensor in tensors.items()}
    auto = auto_class(plain)
    config = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        architecture = type(new_model(auto, config))
    model, report = with_weights(
        architecture, config, state, output_loading_info=True, dtype=torch.float32,
        ignore_mismatched_sizes=True,  # told below
        **left_out(plain, state),
    )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):  # a mismatched one is (name, shape, the shape that is wanted)
            names = ", ".join(key if isinstance(key, str) else key[0] for key in sorted(report[kind])[:3])
            raise CompressError(str(folder), f"the weights do not fit config.json: {kind} {names}", "is it complete?")
    assert isinstance(model, transformers.PreTrainedModel)
    model.train(False)
    replace_modules(model, quantised, accuracy_level)
    return model


def _exceptions(tensor: QTensor, scheme: Scheme) -> dict[str, Any]:
    k, own = tensor.shape[1], tensor.scheme
    found: dict[str, Any] = {}
    if own.name != scheme.name:
        found["scheme"] = own.name
    if own.symmetric != scheme.symmetric:
        found["symmetric"] = own.symmetric
    if own.blockwise and k % own.block_size:
        found["in_features"] = k
    return found


def _declared(declared: Mapping[str, Any], name: str, codes: Tensor) -> tuple[Scheme, int]:
    """The scheme of a weight and its number of input channels. Raises ValueError for unknown ones."""
    own = declared.get("tensors", {}).get(name, {})
    scheme_name = own.get("scheme", declared["scheme"])
    if scheme_name not in SCHEMES:
        raise ValueError(f"config.json names no scheme of compress: {scheme_name!r}")
    scheme = SCHEMES[scheme_name]
    if not scheme.blockwise:
        return (scheme.reduced if declared.get("reduce_range") else scheme), codes.shape[1]
    if not own.get("symmetric", declared.get("symmetric", True)):
        scheme = scheme.asymmetric
    return scheme, own.get("in_features", codes.shape[1] * scheme.block_size)


def _as_float(name: str, tensor: QTensor | Tensor, *, transposed: bool) -> Tensor:
    from torch import Tensor

    if isinstance(tensor, Tensor):
        return tensor
    weight = tensor.dequantize()
    is_projection = any(part.isdigit() for part in name.split("."))
    return weight.T.contiguous() if transposed and is_projection else weight
