"""Real text as token ids, with its sentences' ends known: what facts are hidden in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compress.benchmarks.quality import Ints
from compress.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?=\n\s*\n)")
_WORD_STARTS = ("Ġ", "▁")
"""How byte-level BPE and SentencePiece write the space before a word."""
_COMMON = 1024
"""So many words are common."""


class Window(NamedTuple):
    """Consecutive tokens (T,) of the text, and the places between its sentences: 0 ≤ end ≤ T, (E,), T among them."""

    ids_T: Ints
    ends_E: Ints


class Haystack:
    """The documents of a text, one after the other."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        sentences = [piece for piece in _SENTENCE_END.split("\n\n".join(texts)) if piece.strip()]
        encoded = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokenizer = tokenizer
        self._ids_T: Ints = np.array([id_ for sentence in encoded for id_ in sentence], np.int64)
        self._ends_E: Ints = np.cumsum([0, *map(len, encoded)])

    def window(self, number: int, of: int, length: int) -> Window:
        """Window `number` of `of`, spread evenly over the text; each has `length` tokens and ends with a sentence.

        Raises StageFailed where nothing is left of a context for text, or the text is too short.
        """
        if not 0 < length < len(self._ids_T):
            what = f"{length} tokens of text are wanted around a question, and the eval text has {len(self._ids_T)}"
            raise StageFailed("evaluate.recall.contexts", what, "give more text, or other lengths")
        first_end = length + number * (len(self._ids_T) - length) // of
        stop = int(self._ends_E[np.searchsorted(self._ends_E, first_end)])
        ends_E = self._ends_E - (stop - length)
        return Window(self._ids_T[stop - length : stop], ends_E[(ends_E >= 0) & (ends_E <= length)])

    @cached_property
    def words(self) -> Ints:
        """Ids of the common lower-case words of the text that are one token, the space before them included."""
        tokens = list(self.tokenizer.convert_ids_to_tokens(self._ids_T.tolist()))
        word_ends = [not following[:1].isalpha() for following in tokens[1:]]
        whole = Counter(
            id_
            for id_, token, ends in zip(self._ids_T[:-1].tolist(), tokens[:-1], word_ends, strict=True)
            if ends and token.startswith(_WORD_STARTS) and _is_word(token[1:])
        )
        return np.array([id_ for id_, _ in whole.most_common(_COMMON)], np.int64)

    def piece(self, *spellings: str) -> list[int]:
        """The id of the vocabulary's first of these tokens, as a list; empty where it has none."""
        vocabulary = self.tokenizer.get_vocab()
        return next(([vocabulary[spelling]] for spelling in spellings if spelling in vocabulary), [])

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _is_word(letters: str) -> bool:
    return len(letters) > 2 and letters.isascii() and letters.isalpha() and letters.islower()
