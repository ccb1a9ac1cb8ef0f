"""Prompts read in int8 by a model that writes by weights of fewer bits: their codes, and what they cost.

Many new tokens are a matrix product, which int8 is faster at; one is a walk through memory, which fewer bits shorten. A
prompt's codes stand for the values that the token's do: read by other values than those that write, it would be another
model's. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from compress.exports.onnx import FEW
from compress.exports.onnx.kv_cache import log_softmax
from compress.models.parts import Parts
from compress.quant.apply import OUTLIER_ERROR
from compress.quant.calibrate import LayerWalk, RoundingErrors
from compress.quant.choice import matches
from compress.quant.modules import set_weight, weight_of
from compress.quant.options import QuantizeOptions
from compress.quant.qtensor import QTensor
from compress.quant.rounding import quantize
from compress.quant.targets import WeightTarget, layer_targets
from compress.runtime.session import OnnxModel, call_sizes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.data.text import TextData
    from compress.exports.onnx.weights import Model

CALIBRATION_TOKENS, LOSS_TOKENS, MAX_LENGTH = 8192, 4096, 256
Exceptions = Literal["auto"] | Sequence[str]
Ints = NDArray[np.int64]


def text_blocks(
    data: TextData, tokenizer: PreTrainedTokenizerBase, described: Model, exceptions: Exceptions
) -> tuple[Ints | None, Ints]:
    """Token ids `(B, T)` that say which projections are excepted, where text does, and held-out ones for the loss."""
    length = min(MAX_LENGTH, described.shape.max_position_embeddings)
    fitted = data.blocks("train", tokenizer, length, CALIBRATION_TOKENS) if exceptions == "auto" else None
    return fitted, data.blocks("eval", tokenizer, length, LOSS_TOKENS)


def prompt_weights(
    model: PreTrainedModel, tensors: Mapping[str, Tensor | QTensor], exceptions: Exceptions, ids_BT: Ints | None
) -> dict[str, QTensor]:
    """By name, the int8 codes of `model`'s projections that `tensors` has in blocks; a scale for each output channel.

    A value half-way between two codes gets the even one. exceptions: what keeps the token's own codes: modules by path
    or its end; auto: those whose output changes by more than `OUTLIER_ERROR` where text, `ids_BT`, is rounded per call.
    """
    parts, scheme = Parts(model), QuantizeOptions.model_validate({"scheme": "w8a8-dynamic"}).base
    walk = LayerWalk(parts, torch.from_numpy(ids_BT)) if ids_BT is not None else None
    found: dict[str, QTensor] = {}
    for index in range(len(parts.layers)):
        targets = [each for each in layer_targets(parts, index, scheme) if isinstance(tensors[each.name], QTensor)]
        errors = _errors(walk, index, targets)
        for target in targets:
            path = target.name.removesuffix(".weight")
            patterns = () if exceptions == "auto" else exceptions
            if errors.get(target.name, 0.0) <= OUTLIER_ERROR and not any(matches(path, each) for each in patterns):
                found[target.name] = quantize(weight_of(target.module), scheme)
    return found


def _errors(walk: LayerWalk | None, index: int, targets: Sequence[WeightTarget]) -> dict[str, float]:
    """What rounding its input does to each target's output, where there is text."""
    if walk is None:
        return {}
    errors = RoundingErrors({target.module: target.scheme for target in targets}, {})
    with errors.watching():
        walk.step(index)
    return {target.name: errors[target.module] for target in targets}


@contextmanager
def reading(model: PreTrainedModel, weights: Mapping[str, QTensor]) -> Iterator[None]:
    """Inside, `model` has the values of `weights`, by which it reads prompts."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    written = {name: weight_of(module).clone() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            set_weight(module, weights[name].dequantize())
        yield
    finally:
        for name, module in modules.items():
            set_weight(module, written[name])


def prompt_loss(folder: Path, ids_BT: Ints, threads: int) -> dict[str, float]:
    """What reading prompts in int8 does to the tokens after them, on text, against reading them as tokens are.

    The first half of each row is the prompt, read in calls of the folder's chunks; of the second half
    prompt_kl: KL(as tokens‖as a prompt) in nats a token, and its standard error over rows.
    """
    onnx = OnnxModel(folder, threads=threads)
    half, chunk = ids_BT.shape[1] // 2, onnx.chunk_size or ids_BT.shape[1]
    divergence_B = []
    for ids_1T in ids_BT[:, None]:
        log_p, log_q = (_after(onnx, ids_1T, half, size) for size in (FEW, chunk))
        divergence_B.append(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()))
    error = np.std(divergence_B, ddof=1) / len(divergence_B) ** 0.5 if len(divergence_B) > 1 else float("nan")
    return {"prompt_kl": float(np.mean(divergence_B)), "prompt_kl_se": float(error)}


def _after(onnx: OnnxModel, ids_1T: Ints, half: int, chunk: int) -> NDArray[np.float64]:
    """Log-probabilities `(T - half, V)` at the tokens behind a prompt of `half`, which is read in calls of `chunk`."""
    prompt = call_sizes(half, chunk)
    said = onnx.in_calls(ids_1T, [*prompt, *call_sizes(ids_1T.shape[1] - half, FEW)])
    return log_softmax(np.concatenate([logits_1NV[0] for logits_1NV in islice(said, len(prompt), None)]))
