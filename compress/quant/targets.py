"""Which weights of a model are quantised, and what each is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from compress.models.parts import Parts
from compress.quant.modules import output_head
from compress.quant.schemes import W8_BLOCK32, Scheme

Role = Literal["projection", "embedding", "head"]


@dataclass(frozen=True)
class WeightTarget:
    """One weight to quantise: its name (`X.weight`), its module, what it is for and the scheme it gets."""

    name: str
    module: nn.Module
    role: Role
    scheme: Scheme


def layer_targets(parts: Parts, index: int, scheme: Scheme) -> Iterator[WeightTarget]:
    """Every projection of layer `index`."""
    for path, module in parts.projections(parts.layers[index]):
        yield WeightTarget(f"{parts.layer_path(index)}.{path}.weight", module, "projection", scheme)


def table_targets(parts: Parts, scheme: Scheme) -> Iterator[WeightTarget]:
    """The token embedding, and the output head where it has weights of its own.

    An embedding can only be gathered block-wise, by a scheme whose blocks fill its rows: beside `w8-dynamic` it gets
    `w8-block32`, with a head that is tied to it.
    """
    embedding = cast(Any, parts.backbone_module(parts.family.token_embedding))
    hidden_size = embedding.weight.shape[1]
    blockwise = W8_BLOCK32 if scheme.dynamic else scheme
    if hidden_size % blockwise.block_size == 0:
        yield WeightTarget(f"{parts.prefix}{parts.family.token_embedding}.weight", embedding, "embedding", blockwise)
    head = output_head(parts.model)
    if head and cast(Any, head[1]).weight is not embedding.weight:
        yield WeightTarget(f"{head[0]}.weight", head[1], "head", scheme)


def all_targets(parts: Parts, scheme: Scheme) -> list[WeightTarget]:
    """Every weight that `scheme` quantises; norms, biases, positions, poolers and classifiers stay float32."""
    layers = [target for index in range(len(parts.layers)) for target in layer_targets(parts, index, scheme)]
    return [*layers, *table_targets(parts, scheme)]
