"""The type that weights have on disk: their source's, wherever it holds them exactly; all is computed in float32.

What is cut out of a bfloat16 model are bfloat16 numbers, and half the bytes hold them. What was trained, scaled or made
new are others, and a step of training is finer than bfloat16: those stay float32, so that nothing is lost on the way
from one stage to the next. It is decided tensor by tensor, by the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.anatomy import DTYPE_KEYS
from compress.models.folder import weight_names
from compress.models.stored import stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HALVES = {"BF16": "bfloat16", "F16": "float16"}
"""Types of two bytes: as safetensors calls them, and as torch and `config.json` do."""


def half_types(folder: Path) -> tuple[str, ...]:
    """The types of two bytes that weights of the model in `folder` have: `bfloat16`, `float16`."""
    found = {tensor.dtype for name in weight_names(folder) for tensor in stored_tensors(folder / name)}
    return tuple(name for stored, name in _HALVES.items() if stored in found)


def as_stored(tensors: Mapping[str, Tensor], types: Iterable[str]) -> dict[str, Tensor]:
    """`tensors` by name, each in the first of `types` that holds its values exactly; as it is where none does.

    Tensors that share their memory still do.
    """
    import torch

    wanted = [getattr(torch, name) for name in types]
    found: dict[str, Tensor] = {}
    known: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in known and tensor.dtype == torch.float32:
            narrow = (tensor.to(dtype) for dtype in wanted)
            known[place] = next((each for each in narrow if torch.equal(each.float(), tensor)), tensor)
        found[name] = known.get(place, tensor)
    return found


def declare_dtype(config: dict[str, Any], tensors: Iterable[Tensor]) -> None:
    """Have a parsed `config.json` say the type in which a model of these weights loses nothing: that of all of them, or
    float32 where they differ."""
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    dtype = found.pop() if len(found) == 1 else "float32"
    for key in DTYPE_KEYS:
        if config.get(key) is not None:
            config[key] = dtype


def round_to(model: torch.nn.Module, types: Iterable[str]) -> None:
    """Give `model`, in place, weights that the first of `types` holds exactly; as they are where there is none."""
    import torch

    for name in tuple(types)[:1]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, name)))
