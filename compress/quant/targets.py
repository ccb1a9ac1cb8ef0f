"""Which weights of a model are quantised, and what each is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from compress.models.parts import Parts
from compress.quant.choice import SchemeChoice
from compress.quant.modules import output_head
from compress.quant.schemes import Role, Scheme


@dataclass(frozen=True)
class WeightTarget:
    """One weight to quantise: its name (`X.weight`), its module, what it is for and the scheme it gets."""

    name: str
    module: nn.Module
    role: Role
    scheme: Scheme


def layer_targets(parts: Parts, index: int, choice: SchemeChoice) -> Iterator[WeightTarget]:
    """Every projection of layer `index` that does not stay float32."""
    for path, module in parts.projections(parts.layers[index]):
        name = f"{parts.layer_path(index)}.{path}.weight"
        if scheme := choice.of(name, "projection"):
            yield WeightTarget(name, module, "projection", scheme)


def table_targets(parts: Parts, choice: SchemeChoice) -> Iterator[WeightTarget]:
    """The token embedding, and the output head where it has weights of its own, unless they stay float32.

    An embedding gets the largest blocks that fill its rows, up to its scheme's own.
    """
    embedding = cast(Any, parts.backbone_module(parts.family.token_embedding))
    name = f"{parts.prefix}{parts.family.token_embedding}.weight"
    if scheme := choice.of(name, "embedding"):
        yield WeightTarget(name, embedding, "embedding", scheme.filling(embedding.weight.shape[1]))
    head = output_head(parts.model)
    if head and cast(Any, head[1]).weight is not embedding.weight:
        name = f"{head[0]}.weight"
        if scheme := choice.of(name, "head"):
            yield WeightTarget(name, head[1], "head", scheme)


def all_targets(parts: Parts, choice: SchemeChoice) -> list[WeightTarget]:
    """Every weight that `choice` quantises; norms, biases, positions, poolers and classifiers stay float32."""
    layers = [target for index in range(len(parts.layers)) for target in layer_targets(parts, index, choice)]
    return [*layers, *table_targets(parts, choice)]
