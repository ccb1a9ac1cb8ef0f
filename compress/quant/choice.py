"""Which scheme each weight of a model gets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol

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
    attention, mlp, hidden = model.family.attention, model.family.mlp, model.hidden_size
    query, key = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    inputs = {attention.q: query, attention.k: key, attention.v: key, attention.qkv: query + 2 * key}
    sizes = {f"{attention.path}.{leaf}": (size, hidden) for leaf, size in inputs.items() if leaf}
    sizes |= {f"{attention.path}.{attention.out}": (hidden, query)}
    sizes |= {path: (model.intermediate_size, hidden) for path in (mlp.gate, mlp.up) if path}
    sizes |= {mlp.down: (hidden, model.intermediate_size)}
    for index, spec in enumerate(model.mixers or (None,) * model.num_hidden_layers):
        rates = spec.rates(model.num_attention_heads, model.num_key_value_heads) if spec else {}
        own = {f"{attention.path}.{leaf}": (number, hidden) for leaf, number in rates.items()}
        for path, (n, k) in (sizes | own).items():
            yield f"{model.family.backbone}.{model.family.layers}.{index}.{path}", n, k
