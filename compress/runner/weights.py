"""What a model's folder weighs, read from its files' headers: nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

from compress.artifact import CHECKPOINTS, Format
from compress.errors import CompressError


def count_parameters(files: Iterable[Path]) -> int:
    """Elements of all tensors in safetensors `files`; tensors that share storage are stored, and counted, once.

    Raises CompressError for a file that is not safetensors, or cut short.
    """
    return sum(math.prod(shape) for file in files for shape in _tensor_shapes(file))


def own_figures(folder: Path, format: Format, handed_on: float | None) -> dict[str, float]:
    """The figures that every model has: `parameters`, and `size_mb` (1e6 bytes of weights and graph).

    Parameters are counted where weights are plain tensors. Quantising and exporting change how weights are stored and
    not how many there are, so there they are those of the input, `handed_on`.
    """
    weights = (file for file in folder.rglob("*") if file.suffix in (".safetensors", ".onnx", ".data"))
    size_mb = sum(file.stat().st_size for file in weights if file.relative_to(folder).parts[0] != CHECKPOINTS) / 1e6
    plain = sorted(folder.glob("*.safetensors")) if format == "torch" else []
    parameters = float(count_parameters(plain)) if plain else handed_on
    return {"size_mb": size_mb} if parameters is None else {"size_mb": size_mb, "parameters": parameters}


def _tensor_shapes(file: Path) -> list[list[int]]:
    """safetensors: 8 bytes little-endian length, then a JSON header with each tensor's shape, then the data."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        missing = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0) - file.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing")
        return [entry["shape"] for entry in entries]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise CompressError(str(file), "is not a whole safetensors file", "was it cut short? get it again") from error
