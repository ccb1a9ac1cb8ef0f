"""Which tokens stay: those that the text uses most, what they are made of, and what no text can do without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from compress.errors import StageFailed
from compress.stages.vocab.tokenizer import Vocabulary


@dataclass(frozen=True)
class Chosen:
    """tokens: the old ids that stay, sorted. coverage: the share of the text's tokens that they are."""

    tokens: list[int]
    coverage: float


def choose(
    vocabulary: Vocabulary, used: Mapping[int, int], always: Collection[int], keep: int | None, coverage: float | None
) -> Chosen:
    """The `keep` tokens that matter most, or as many as make up a share `coverage` of the text.

    used: how often the text has each token. always: tokens that stay whatever the text (with what they are made of).
    Behind what the text uses, the rest follows by rank, which is the order of ids. Raises StageFailed where `keep` is
    below what has to stay, or where the text uses nothing else.
    """
    first = list(vocabulary.with_parts(sorted(vocabulary.needed | set(always))))
    by_use = sorted((token for token in used if token not in first), key=lambda token: (-used[token], token))
    if not by_use:
        raise StageFailed("reduce-vocab", "the text is too short to choose from", "give data.train more text")
    if keep is not None and keep < len(first):
        what = f"{keep} tokens are fewer than bytes, characters, special tokens and the chat template's: {len(first)}"
        raise StageFailed("reduce-vocab.keep", what, f"at least {len(first)}")
    total = sum(used.values())
    kept, covered = set(first), sum(used.get(token, 0) for token in first)
    rest = [] if coverage is not None else sorted(vocabulary.ids.values())
    for token in (*by_use, *rest):
        if coverage is not None and covered >= coverage * total:
            break
        more = [part for part in vocabulary.with_parts([token]) if part not in kept]
        if keep is not None and len(kept) + len(more) > keep:
            continue  # a shorter one may still fit
        kept.update(more)
        covered += sum(used.get(part, 0) for part in more)
        if keep is not None and len(kept) == keep:
            break
    return Chosen(sorted(kept), covered / total)
