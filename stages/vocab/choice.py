"""Which tokens stay: what any text needs, what this text uses most with its merge parents, and the rest by rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed
from compress.stages.vocab.tokens import Vocabulary, closed

Counts = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Choice:
    """Ids of the tokens that stay, rising. beyond: those of added tokens for which the model has no embedding.

    num_indispensable, num_by_use, num_by_rank: for what reason `kept` are. coverage: their share of the text's tokens.
    """

    kept: Sequence[int]
    beyond: Sequence[int]
    num_indispensable: int
    num_by_use: int
    num_by_rank: int
    coverage: float

    @property
    def new_ids(self) -> dict[int, int]:
        """The new id of each token that stays, by its old one: the order stays, the gaps go."""
        return {old: new for new, old in enumerate([*self.kept, *self.beyond])}


def choose(
    vocabulary: Vocabulary, counts_V: Counts, needed: Collection[int], keep: int | None, coverage: float | None
) -> Choice:
    """Exactly `keep` tokens of a model of V embeddings, or as few as make up `coverage` of the text.

    counts_V: how often the text has each token. needed: ids that stay whatever the text. With a token stay all that it
    is merged from. Raises StageFailed where `keep` is less than what is needed, or more than there are tokens.
    """
    size = len(counts_V)
    embedded = [id_ for id_ in vocabulary.names if id_ < size]
    chosen = {id_ for id_ in closed(vocabulary, needed) if id_ < size}
    num_indispensable = len(chosen)
    if keep is not None and num_indispensable > keep:
        what = f"{keep} tokens, and bytes, characters, special tokens and the chat template need {num_indispensable}"
        raise StageFailed("keep", what, f"keep at least {num_indispensable}")
    if keep is not None and len(embedded) <= keep:
        what = f"{keep} of {len(embedded)} tokens ({size} embeddings, some of which have no token) leaves none out"
        raise StageFailed("keep", what, f"keep fewer than {len(embedded)}")
    used = sorted((id_ for id_ in embedded if counts_V[id_]), key=lambda id_: (-counts_V[id_], id_))
    room = size if keep is None else keep
    wanted = float("inf") if coverage is None else coverage * float(counts_V.sum())
    _add(vocabulary, used, chosen, counts_V, room, wanted)
    num_by_use = len(chosen) - num_indispensable
    if keep is not None:
        unused = sorted(set(embedded) - chosen, key=lambda id_: (not vocabulary.is_reachable(id_), id_))
        _add(vocabulary, unused, chosen, counts_V, room)
    beyond = sorted(id_ for id_ in vocabulary.names if id_ >= size)
    share = float(counts_V[sorted(chosen)].sum() / counts_V.sum())
    num_by_rank = len(chosen) - num_indispensable - num_by_use
    return Choice(sorted(chosen), beyond, num_indispensable, num_by_use, num_by_rank, share)


def _add(
    vocabulary: Vocabulary, candidates: Sequence[int], chosen: set[int], counts_V: Counts, room: int,
    wanted: float = float("inf"),
) -> None:  # fmt: skip
    """Put candidates in order into `chosen`, each with what it is made of, while there is room and more is wanted."""
    covered = float(counts_V[sorted(chosen)].sum())
    for id_ in candidates:
        if len(chosen) == room or covered >= wanted:
            return
        new = {each for each in vocabulary.parents(id_) if each < len(counts_V)} - chosen
        if len(chosen) + len(new) <= room:
            chosen |= new
            covered += float(counts_V[sorted(new)].sum())
