"""Which scheme each weight of a model gets. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol

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
