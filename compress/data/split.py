"""Holding text out for evaluation, and checking that what is judged on was not trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

SPLITTING = 1
"""Raised when the same files are read, or held out, as other documents."""
WINDOW = 13
"""Words in a row that two texts must share to count: the length in common use for finding leaked test text."""

_PIECE = 4000
"""Characters of a piece where there are too few documents to hold some out whole."""
_WORD = re.compile(r"\w+")
_SAMPLED = 4
"""Windows are compared that start at a word with a hash divisible by this: the same ones in both texts."""


@dataclass(frozen=True)
class Overlap:
    """The share of eval windows that also stand in the train text, and one of them."""

    share: float
    example: str = ""


def overlap_of(train: Sequence[str], held_out: Sequence[str]) -> Overlap:
    """How much of `held_out` stands word for word, whatever its case and spacing, in `train`."""
    held_out_windows = [window for text in held_out for window in _windows(text)]
    wanted = set(held_out_windows)
    shared = {window for text in train for window in _windows(text) if window in wanted}
    found = [window for window in held_out_windows if window in shared]
    return Overlap(len(found) / len(held_out_windows), found[0]) if found else Overlap(0.0)


def hold_out(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """(train, eval): about `share` of the characters as eval, in whole documents chosen by their hashes.

    A paragraph that occurs in several documents is kept in the longest of them only. Where whole documents can't
    make up half the share, they are cut at paragraphs first.
    """
    unique = _unshared(documents)
    chosen = _choose(unique, share)
    if _length(unique[i] for i in chosen) < 0.5 * share * _length(unique):
        unique = [piece for document in unique for piece in _pieces(document)]
        chosen = _choose(unique, share)
    train = [text for index, text in enumerate(unique) if index not in chosen]
    return train, [unique[index] for index in sorted(chosen)]


def _choose(texts: Sequence[str], share: float) -> set[int]:
    """In the order of their hashes, the texts that fit into `share` of all characters."""
    room = share * _length(texts)
    chosen = set()
    for index in sorted(range(len(texts)), key=lambda index: hashlib.sha256(texts[index].encode()).digest()):
        if len(texts[index]) <= room:
            chosen.add(index)
            room -= len(texts[index])
    return chosen


def _unshared(documents: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    kept: dict[int, str] = {}
    for index in sorted(range(len(documents)), key=lambda index: (-len(documents[index]), documents[index])):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", documents[index]):
            words = " ".join(_WORD.findall(paragraph.lower()))
            if words and words not in seen:
                paragraphs.append(paragraph)
            seen.add(words)
        kept[index] = "\n\n".join(paragraphs)
    return [kept[index] for index in range(len(documents)) if kept[index]]


def _pieces(document: str) -> list[str]:
    pieces = [""]
    for paragraph in document.split("\n\n"):
        if len(pieces[-1]) + len(paragraph) > _PIECE and pieces[-1]:
            pieces.append("")
        pieces[-1] += f"\n\n{paragraph}" if pieces[-1] else paragraph
    return pieces


def _windows(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - WINDOW + 1):
        if crc32(words[start].encode()) % _SAMPLED == 0:
            yield " ".join(words[start : start + WINDOW])


def _length(texts: Iterator[str] | Sequence[str]) -> int:
    return sum(map(len, texts))
