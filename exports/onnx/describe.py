"""From an artifact to what the exporter needs: its tensors, its config, its rotary tables, and torch's own view."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from compress.artifact import Artifact
from compress.errors import StageFailed
from compress.exports.onnx.rotary import rotary_tables
from compress.exports.onnx.weights import Model
from compress.models.load import auto_class, left_out, load_model
from compress.models.parts import Parts
from compress.models.pretrained import new_model
from compress.quant.modules import set_weight
from compress.quant.qtensor import QTensor
from compress.quant.store import KEY, read_quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def load(artifact: Artifact) -> tuple[PreTrainedModel, Model]:
    """The artifact as a float32 torch model, quantised weights dequantised, and as the exporter sees it.

    Raises CompressError for a damaged artifact and for rotary embeddings that can't be tabulated.
    """
    if artifact.format == "quantized":
        config, tensors = read_quantized(artifact.path)
        model = _dequantised(config, tensors, artifact.path)
    else:
        model = load_model(artifact.path)
        tensors = dict(model.state_dict())
    parts = Parts(model)
    _leave_out_tied_head(tensors, parts)
    plain_config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return model, Model(parts.shape, plain_config, tensors, parts.prefix, rotary_tables(parts))


def _dequantised(config: Mapping[str, Any], tensors: Mapping[str, QTensor | Tensor], folder: Path) -> PreTrainedModel:
    """A float32 model that holds one dequantised weight after the other, so that memory holds the weights once."""
    import transformers

    plain = {key: value for key, value in config.items() if key != KEY}
    auto = auto_class(plain)
    own_config = transformers.AutoConfig.for_model(**plain)
    model: PreTrainedModel = new_model(auto, own_config, dtype=torch.float32, **left_out(plain, tensors))
    own = dict(model.state_dict(keep_vars=True))
    found = [own[name] for name in tensors if name in own]
    tied = {name for name in set(own) - set(tensors) if any(own[name] is other for other in found)}
    misfits = sorted((set(own) - tied) ^ set(tensors))
    if misfits:
        what = f"the weights do not fit config.json: {', '.join(misfits[:3])}"
        raise StageFailed(str(folder), what, "run its stage again")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if isinstance(tensor, QTensor):
                set_weight(model.get_submodule(name.removesuffix(".weight")), tensor.dequantize())
            else:
                own[name].copy_(tensor)
    model.train(False)
    return model


def _leave_out_tied_head(tensors: dict[str, QTensor | Tensor], parts: Parts) -> None:
    table: Any = parts.backbone_module(parts.family.token_embedding)
    if parts.lm_head is not None and cast(Any, parts.lm_head).weight is table.weight:
        tensors.pop(f"{parts.family.lm_head}.weight", None)
