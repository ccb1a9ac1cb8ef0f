"""Taking tokens out of a model: rows of its embeddings and of its head, tied or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.parts import Parts


def keep_tokens(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave `model` only the embeddings and the outputs of the tokens `kept` (ids), in that order, in place.

    What the embeddings share their weights with goes on sharing them.
    """
    parts = Parts(model)
    embedding: Any = parts.backbone_module(parts.family.token_embedding)
    head: Any = cast(Any, model).get_output_embeddings()
    sliced = {
        id(parameter): nn.Parameter(parameter.detach()[torch.as_tensor(list(kept))].clone())
        for parameter in (embedding.weight, *_of_head(model, head))
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in sliced:
                setattr(module, name, sliced[id(parameter)])
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = kept.index(embedding.padding_idx) if embedding.padding_idx in kept else None
    if head is not None:
        head.out_features = len(kept)
    model.config.vocab_size = len(kept)


def _of_head(model: PreTrainedModel, head: Any) -> Iterator[nn.Parameter]:
    """The head's weight and bias, and a bias of as many outputs that BERT keeps beside it."""
    if head is not None:
        yield from head.parameters()
        beside = (module for module in model.modules() if any(child is head for child in module.children()))
        own = (parameter for module in beside for parameter in module.parameters(recurse=False))
        yield from (parameter for parameter in own if len(parameter) == len(head.weight))
