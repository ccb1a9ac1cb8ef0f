"""Which scheme each weight of a model gets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from compress.mixers.spec import MixerSpec
from compress.models.anatomy import ModelShape
from compress.quant.schemes import Role, Scheme


class SchemeChoice(Protocol):
    """A scheme for each weight. A `Scheme` is one: itself for projections, its `table` for embedding and head."""

    def of(self, name: str, role: Role) -> Scheme | None:
        """The scheme of the weight `name` (`X.weight`) in its role; None: it stays float32."""


@dataclass(frozen=True)
class MixedSchemes:
    """`scheme` for every projection but the exceptions; None anywhere: float32.

    exceptions: by the path of a module or its end, with wildcards (`down_proj`, `layers.0.*`); the first that matches
    counts. embeddings, head: `table` for what goes with `scheme`; a head tied to the embedding has the embedding's.
    """

    scheme: Scheme
    exceptions: Mapping[str, Scheme | None] = field(default_factory=dict)
    embeddings: Scheme | Literal["table"] | None = "table"
    head: Scheme | Literal["table"] | None = "table"

    def of(self, name: str, role: Role) -> Scheme | None:
        """The scheme of the weight `name` (`X.weight`) in its role; None: it stays float32."""
        if role != "projection":
            own = self.embeddings if role == "embedding" else self.head
            return self.scheme.table if own == "table" else own
        path = name.removesuffix(".weight")
        for pattern, own in self.exceptions.items():
            if matches(path, pattern):
                return own
        return self.scheme


def matches(path: str, pattern: str) -> bool:
    """Whether a module's path, or an end of it that begins after a dot, is what `pattern` describes."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def projections(model: ModelShape) -> Iterator[tuple[str, int, int]]:
    """(path, outputs N, inputs K) of every projection of a whole model."""
    for index in range(model.num_hidden_layers):
        for path, (n, k) in _of_layer(model.of_layer(index), model.mixers[index] if model.mixers else None).items():
            yield f"{model.family.backbone}.{model.family.layers}.{index}.{path}", n, k


def _of_layer(own: ModelShape, spec: MixerSpec | None) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection of a layer of this shape, by its path there."""
    attention, mlp, hidden = own.family.attention, own.family.mlp, own.hidden_size
    heads, groups = own.num_attention_heads, own.num_key_value_heads
    query, key, value = heads * own.head_dim, groups * own.head_dim, groups * own.v_head_dim
    inputs = {attention.q: query, attention.k: key, attention.v: value, attention.qkv: query + key + value}
    inputs |= spec.rates(heads, groups) if spec else {}
    sizes = {f"{attention.path}.{leaf}": (size, hidden) for leaf, size in inputs.items() if leaf}
    sizes |= {f"{attention.path}.{attention.out}": (hidden, heads * own.v_head_dim)}
    sizes |= {path: (own.intermediate_size, hidden) for path in (mlp.gate, mlp.up) if path}
    return sizes | {mlp.down: (hidden, own.intermediate_size)}
