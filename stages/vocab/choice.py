"""Which tokens stay: what any text needs, then what text like this one uses most, with its merge parents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed
from compress.vocab.tokens import Vocabulary, closed

Counts = NDArray[np.integer[Any]]
PRIOR = 0.3
"""What the rank in the vocabulary weighs beside the text's own use, of all of which the weight is 1."""
_FLAT = 500
"""Ranks below which tokens are about as frequent as each other: Mandelbrot's offset."""


@dataclass(frozen=True)
class Choice:
    """Ids of the tokens that stay, rising. beyond: those of added tokens for which the model has no embedding.

    num_indispensable, num_by_use, num_by_rank: for what reason `kept` are: the text has them, or what is merged from
    them, or it has not. coverage: their share of the text's tokens.
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
    is merged from. `keep` goes by what is expected of more text, and of other text: see `_expected`. Raises StageFailed
    where `keep` is less than what is needed, or more than there are tokens.
    """
    size = len(counts_V)
    embedded = sorted(id_ for id_ in vocabulary.names if id_ < size)
    indispensable = least(vocabulary, needed, keep, size)
    chosen = set(indispensable)
    if keep is None:
        used = sorted((id_ for id_ in embedded if counts_V[id_]), key=lambda id_: (-counts_V[id_], id_))
        _add(vocabulary, used, chosen, counts_V, size, float(coverage or 1) * float(counts_V.sum()))
    else:
        use_V = _expected(counts_V, embedded)
        ranked = sorted(embedded, key=lambda id_: (not vocabulary.is_reachable(id_), -use_V[id_], id_))
        _add(vocabulary, ranked, chosen, counts_V, keep)
    beyond = sorted(id_ for id_ in vocabulary.names if id_ >= size)
    share = float(counts_V[sorted(chosen)].sum() / counts_V.sum())
    by_use = closed(vocabulary, {id_ for id_ in chosen if counts_V[id_]}) & chosen - indispensable
    num_by_rank = len(chosen) - len(indispensable) - len(by_use)
    return Choice(sorted(chosen), beyond, len(indispensable), len(by_use), num_by_rank, share)


def least(vocabulary: Vocabulary, needed: Collection[int], keep: int | None, size: int) -> frozenset[int]:
    """What stays of `size` embeddings in any case. Raises StageFailed where `keep` tokens can't be chosen."""
    indispensable = frozenset(id_ for id_ in closed(vocabulary, needed) if id_ < size)
    num_embedded = sum(id_ < size for id_ in vocabulary.names)
    if keep is not None and len(indispensable) > keep:
        what = f"{keep} tokens, and bytes, characters, special tokens and the chat template need {len(indispensable)}"
        raise StageFailed("keep", what, f"keep at least {len(indispensable)}")
    if keep is not None and num_embedded <= keep:
        what = f"{keep} of {num_embedded} tokens ({size} embeddings, some of which have no token) leaves none out"
        raise StageFailed("keep", what, f"keep fewer than {num_embedded}")
    return indispensable


def _expected(counts_V: Counts, embedded: Sequence[int]) -> NDArray[np.float64]:
    """How much of a text each token is expected to be, up to a factor: its share of this text, and PRIOR of its rank's.

    Tokenizers number tokens by how frequent they were where they come from, and frequencies fall as Zipf's and
    Mandelbrot's law says. That decides among the tokens that the text has seldom or never.
    """
    law_V = np.zeros(len(counts_V))
    law_V[embedded] = 1 / (np.arange(len(embedded)) + _FLAT)
    expected: NDArray[np.float64] = counts_V / counts_V.sum() + PRIOR * law_V / law_V.sum()
    return expected


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
