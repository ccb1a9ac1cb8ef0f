"""A model whose layers are read from the disk one at a time: it takes the memory of one, its embeddings and its head.

transformers makes the model without weights; those outside the stack of layers are read at once. A layer's are read
where it computes, and let go of afterwards, unless they are held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress.models.anatomy import is_buffer
from compress.models.folder import config_of, weight_names
from compress.models.heads import architecture_of, named_head
from compress.models.load import auto_class, check_finite, load_model, untied
from compress.models.parts import Parts
from compress.models.pretrained import new_model, read_folder
from compress.models.stored import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OLD_NAMES = {"lm_head.weight": "embed_out.weight"}
"""By transformers' own names of weights, those that it writes and reads them under: of GPT-NeoX."""


class Shelf:
    """Where on the disk the weights of a model's layers lie, by their names in the model.

    Of a model that is in memory whole none do, and nothing that is done here does anything.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[str, StoredTensor], layers: Iterable[str] = (), folder: Path = Path()
    ) -> None:
        self.model, self._places, self._folder = model, places, folder
        self._held: set[str] = set()
        for path in layers:
            layer = model.get_submodule(path)
            layer.register_forward_pre_hook(lambda *_, path=path: self._read(path))
            layer.register_forward_hook(lambda *_, path=path: self._let_go(path))

    @contextmanager
    def held(self, path: str, done: Collection[str]) -> Iterator[None]:
        """Have the layer at `path` in memory in the block, and all but its weights `done` from then on.

        What the block makes of the others, norms perhaps, stays. Raises CompressError for weights that are no numbers.
        """
        self._read(path)
        self._held.add(path)
        yield
        self._drop(name for name in done if name in self._places)

    def _read(self, path: str) -> None:
        if path not in self._held:
            _fill(self.model, {name: self._places[name] for name in self._names(path)}, self._folder)

    def _let_go(self, path: str) -> None:
        if path not in self._held:
            self._drop(self._names(path))

    def _names(self, path: str) -> list[str]:
        return [name for name in self._places if name.startswith(f"{path}.")]

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            _put(self.model, name, torch.empty(self.model.get_parameter(name).shape, device="meta"))


def load_by_layers(folder: Path) -> tuple[PreTrainedModel, Shelf]:
    """What `load_model` makes of `folder`, with the weights of its layers on the disk, and where they lie.

    A model whose weights have other names than those of the files, but for the backbone's prefix, is read whole. Raises
    as `load_model` does.
    """
    config = config_of(folder) or {}
    if not config.get("quantization_config") and (found := _by_layers(folder, config)):
        return found
    model = load_model(folder)
    return model, Shelf(model, {})


def _by_layers(folder: Path, config: Mapping[str, Any]) -> tuple[PreTrainedModel, Shelf] | None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    reader = auto_class(config)
    own_config = read_folder(AutoConfig, folder, "is config.json complete?", **untied(config))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = new_model(reader, own_config, dtype=torch.float32)
    model.tie_weights()
    places = _places(model, folder, config)
    if places is None:
        return None
    model.train(False)
    parts = Parts(model)
    layers = [parts.layer_path(index) for index in range(len(parts.layers))]
    in_layers = {name for name in places if name.startswith(tuple(f"{path}." for path in layers))}
    _fill(model, {name: place for name, place in places.items() if name not in in_layers}, folder)
    model.tie_weights()
    return model, Shelf(model, {name: places[name] for name in in_layers}, layers, folder)


def _places(model: PreTrainedModel, folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor] | None:
    """Where each parameter of `model` is stored; None where that can't be told for each, or others are stored."""
    prefix = f"{model.base_model_prefix}."
    head = named_head(architecture_of(config))
    stored = {tensor.name: tensor for file in weight_names(folder) for tensor in stored_tensors(folder / file)}
    tied = set(model.state_dict()) - dict(model.named_parameters()).keys()
    left = {name for name in stored if not is_buffer(name) and not name.startswith(head.left_over if head else ())}
    places = {}
    for name, weight in model.named_parameters():
        names = (name, prefix + name, name.removeprefix(prefix), _OLD_NAMES.get(name))
        alike = [each for each in names if each in left]
        if not alike or stored[alike[0]].shape != tuple(weight.shape):
            return None
        places[name] = stored[alike[0]]
        left.remove(alike[0])
    copies = {name for name in left & tied if any(stored[name].equals(place) for place in places.values())}
    return places if left == copies else None


def _fill(model: nn.Module, places: Mapping[str, StoredTensor], folder: Path) -> None:
    """Read parameters of `model` from where they are stored, as float32."""
    for file in {place.file for place in places.values()}:
        with safe_open(file, "pt") as stored:
            for name, place in places.items():
                if place.file == file:
                    _put(model, name, stored.get_tensor(place.name).to(torch.float32, copy=True))
    check_finite(((name, model.get_parameter(name)) for name in places), folder)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
