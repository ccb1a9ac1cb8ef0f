"""The model with fewer rows in its tables, and its ids renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import StageFailed
from compress.models.convert import narrowed
from compress.models.narrow import weights_of
from compress.models.parts import Parts

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")
"""Keys of a generation config that hold ids beside those that end with `_token_id`."""
_HEADS = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias")


def reduced(model: PreTrainedModel, tokens: Sequence[int]) -> PreTrainedModel:
    """`model` with the rows `tokens` of its tables, in eval mode: logits are those of the same tokens before."""
    parts, index, new = Parts(model), torch.tensor(tokens), {old: place for place, old in enumerate(tokens)}
    tables = {f"{parts.prefix}{parts.family.token_embedding}.weight", *_HEADS}
    if parts.family.lm_head:
        tables |= {f"{parts.family.lm_head}.weight", f"{parts.family.lm_head}.bias"}
    weights: dict[str, Tensor] = {
        name: (tensor[index] if name in tables else tensor).detach().clone()
        for name, tensor in weights_of(model).items()
    }
    changes = {"vocab_size": len(tokens), **renumbered(model.config.to_dict(), new, "config.json")}
    smaller = narrowed(model, changes, weights)
    if smaller.can_generate() and (generation := smaller.generation_config) is not None:
        for name, value in renumbered(generation.to_dict(), new, "generation_config.json").items():
            setattr(generation, name, value)
    return smaller


def special_ids(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The ids that a config or a generation config names, by key."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token_id") or name in _LISTS:
            ids = list(_flat(value))
            if ids:
                found[name] = ids
    return found


def renumbered(config: Mapping[str, Any], new: Mapping[int, int], where: str) -> dict[str, Any]:
    """The keys of `config` that hold ids, with their new ones. Raises StageFailed for an id that is of no token."""
    found = {}
    for name, ids in special_ids(config).items():
        for id in ids:
            if id not in new:
                what = f"{where} names {id} as {name}, which is no token of the tokenizer"
                raise StageFailed("reduce-vocab", what, "use the model's own tokenizer and config")
        found[name] = _mapped(config[name], new)
    return found


def _flat(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        if value >= 0:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _flat(each)


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_mapped(each, new) for each in value]
    return new[value] if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else value
