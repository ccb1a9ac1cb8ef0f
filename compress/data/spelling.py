"""What tokens spell, in bytes: where two tokenizers' tokens of the same text begin and end at the same place.

N, M tokens of two tokenizations, V ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.integer[Any]]

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BEFORE = "a"
"""Decoded before a token, for a decoder may treat the first one of a text otherwise."""


def spelled_bytes(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """How many UTF-8 bytes of text each token stands for, (V,), of the text as the tokenizer normalises it.

    Special tokens, and ids that are no token's, stand for none. Where tokens are bytes (ByteLevel, byte fallback) the
    numbers are exact also for those that are a part of a character.
    """
    added = tokenizer.added_tokens_decoder
    vocabulary = {id_: name for name, id_ in tokenizer.get_vocab().items()}
    lengths_V = np.zeros(max(vocabulary, default=0) + 1, np.int64)
    length = _length_of(tokenizer)
    for id_, name in vocabulary.items():
        if id_ in added:
            lengths_V[id_] = 0 if added[id_].special else len(name.encode())
        else:
            lengths_V[id_] = length(name)
    return lengths_V


def lengths_of(ids: Ints, lengths_V: Ints) -> Ints:
    """The bytes of each of `ids`, of their shape; none for what lies beyond the vocabulary."""
    return np.where(ids < len(lengths_V), lengths_V[np.minimum(ids, len(lengths_V) - 1)], 0)


def boundaries(ids_N: Ints, lengths_V: Ints) -> Ints:
    """Where each token begins, and the last one ends, (N + 1,): bytes, one more for each token that spells none.

    So the end of a document is a place of its own. Rising.
    """
    return np.concatenate([[0], np.cumsum(np.maximum(lengths_of(ids_N, lengths_V), 1))])


@dataclass(frozen=True)
class Pair:
    """The tokens of one piece of text by two tokenizers; what both are asked for begins after `first` of each."""

    ids_N: Ints
    first_N: int
    ids_M: Ints
    first_M: int


@dataclass(frozen=True)
class Tokens:
    """A whole text as a tokenizer has it: ids (N,), and how many bytes each id of the vocabulary spells (V,)."""

    ids_N: Ints
    lengths_V: Ints


def pairs(one: Tokens, other: Tokens, starts: Ints, length: int) -> Iterator[Pair]:
    """Pieces of the text of at most `length` tokens of both, each from where the block of `one` at `starts` begins.

    They begin and end where a token of both does, as does what is asked for: after the first place from there on where
    tokens of both end. Blocks in which there is too little of that are left out. Raises StageFailed where the two do
    not spell the same text.
    """
    ends_N, ends_M = (boundaries(each.ids_N, each.lengths_V) for each in (one, other))
    if ends_N[-1] != ends_M[-1]:
        what = f"spell the same text in {ends_N[-1]} and in {ends_M[-1]} bytes"
        raise StageFailed("tokenizer", f"the two {what}", "use tokenizers that normalise text alike")
    shared = np.intersect1d(ends_N, ends_M)
    for start in starts:
        at = int(np.searchsorted(shared, ends_N[start]))
        last_N = min(int(start) + length, len(one.ids_N))
        begin_N, begin_M = (int(np.searchsorted(ends, shared[at])) for ends in (ends_N, ends_M))
        last_M = min(begin_M + length, len(other.ids_N))
        stop = int(np.searchsorted(shared, min(ends_N[last_N], ends_M[last_M]), side="right")) - 1
        if stop - at < 2:
            continue
        first_N, first_M = (int(np.searchsorted(ends, shared[at + 1])) for ends in (ends_N, ends_M))
        stop_N, stop_M = (int(np.searchsorted(ends, shared[stop])) for ends in (ends_N, ends_M))
        yield Pair(
            one.ids_N[begin_N:stop_N], first_N - begin_N, other.ids_N[begin_M:stop_M], first_M - begin_M
        )  # fmt: skip


def _length_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A function of a token's name: how many bytes it spells."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return lambda name: len(name.encode())
    kinds = set(_kinds(json.loads(backend.to_str())["decoder"]))
    if "ByteLevel" in kinds:
        return len  # a letter a byte
    falls_back = "ByteFallback" in kinds

    def length(name: str) -> int:
        if falls_back and _BYTE.fullmatch(name):
            return 1
        return len(decoder.decode([_BEFORE, name]).encode()) - len(_BEFORE)

    return length


def _kinds(decoder: Mapping[str, Any]) -> Iterator[str]:
    yield str(decoder.get("type"))
    for each in decoder.get("decoders") or ():
        yield from _kinds(each)
