"""What a model's folder weighs, read from its files' headers: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from compress.artifact import CHECKPOINTS, Format
from compress.errors import InvalidInput
from compress.models.anatomy import ModelShape, is_buffer, shape_of
from compress.models.folder import TIED_HEADS, config_of, weight_files, weight_names
from compress.models.stored import StoredTensor, stored_tensors

_TIED = (*TIED_HEADS, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""What may be another tensor's copy, by its ending."""


def own_figures(folder: Path, format: Format, handed_on: float | None) -> dict[str, float]:
    """The figures that every model has: `parameters`, and `size_mb` (1e6 bytes of weights and graph).

    What counts is what is read. Of a model of safetensors that is the files that it names, `consolidated.safetensors`
    or `onnx/` beside them left out, less the tensors in them that are no parameters: masks and other buffers, and the
    copy of a tied head. Parameters are counted where weights are plain tensors. Quantising and exporting change how
    weights are stored and not how many there are, so there they are those of the input, `handed_on`.

    Raises CompressError for a file that is not safetensors, or cut short.
    """
    if format == "onnx":
        found = (file for file in folder.rglob("*") if file.suffix in (".safetensors", ".onnx", ".data"))
        num_bytes = sum(file.stat().st_size for file in found if file.relative_to(folder).parts[0] != CHECKPOINTS)
        parameters = handed_on
    else:
        tensors = [tensor for name in weight_names(folder) for tensor in stored_tensors(folder / name)]
        idle = _idle(tensors, folder)
        num_bytes = sum(file.stat().st_size for file in weight_files(folder)) - sum(each.num_bytes for each in idle)
        counted = sum(math.prod(tensor.shape) for tensor in tensors) - sum(math.prod(each.shape) for each in idle)
        parameters = float(counted) if format == "torch" and tensors else handed_on
    size_mb = num_bytes / 1e6
    return {"size_mb": size_mb} if parameters is None else {"size_mb": size_mb, "parameters": parameters}


def _idle(tensors: Sequence[StoredTensor], folder: Path) -> list[StoredTensor]:
    """Those that are no parameters of the model, or the same ones again."""
    shape = _shape(folder)
    tied = _TIED if shape and shape.tie_word_embeddings else ()
    heads = [tensor for tensor in tensors if tensor.name.endswith(tied)]
    copies = [head for head in heads if _is_copy(head, tensors)]
    left_over = shape.head.left_over if shape and shape.head else ()
    idle = (tensor for tensor in tensors if is_buffer(tensor.name) or tensor.name.startswith(left_over))
    return [*idle, *copies]


def _shape(folder: Path) -> ModelShape | None:
    try:
        return shape_of(config_of(folder) or {})
    except InvalidInput:
        return None


def _is_copy(head: StoredTensor, tensors: Iterable[StoredTensor]) -> bool:
    """Whether another tensor has the same values: transformers ties the head to its table only where they agree."""
    return any(each.equals(head) for each in tensors if each is not head)
