"""What tokens spell: as many bytes as their text has, and the same places by two tokenizers."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "stages/vocab"))

from tokenizers import Tokenizer
from tokenizers_of_kinds import TEXTS, tokenizer_of

from compress.data.spelling import Tokens, boundaries, lengths_of, pairs, spelled_bytes
from compress.data.text import token_ids
from compress.errors import StageFailed
from compress.vocab.rewrite import smaller_tokenizer
from compress.vocab.tokens import Vocabulary

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
STRANGE = ["naïve 🦜🏽 数学\n\n\tdef f():\n    return 'ü'", "", " ", "x" * 50, "a</s>b <tool> c"]


@cache
def fast(kind: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind), **SPECIAL)


@cache
def few(kind: str) -> Any:
    """The same with nothing but what any text needs."""
    import json

    parsed = json.loads(tokenizer_of(kind).to_str())
    kept = sorted(Vocabulary(parsed).indispensable())
    smaller = smaller_tokenizer(parsed, {old: new for new, old in enumerate(kept)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(smaller)), **SPECIAL)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-bpe"])
@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from([*TEXTS[0].split(), "🦜", "\n"])).map(" ".join)))
def test_tokens_spell_the_bytes_of_their_text(kind: str, text: str) -> None:
    tokenizer = fast(kind)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    assert lengths_of(ids, spelled_bytes(tokenizer)).sum() == len(text.replace("▁", " ").encode())


def test_special_tokens_and_ids_beyond_the_vocabulary_spell_nothing() -> None:
    tokenizer = fast("byte-level")
    lengths_V = spelled_bytes(tokenizer)
    assert lengths_of(np.array([0, 1, 2, len(lengths_V), 10**6]), lengths_V).tolist() == [0] * 5
    assert lengths_V[tokenizer.convert_tokens_to_ids("<tool>")] == 6
    assert lengths_V[tokenizer.convert_tokens_to_ids("Ġthe")] == 4
    assert boundaries(np.array([1, 2]), lengths_V).tolist() == [0, 1, 2]


def both(kind: str, texts: list[str]) -> list[Tokens]:
    return [Tokens(np.array(token_ids(texts, each), np.int64), spelled_bytes(each)) for each in (fast(kind), few(kind))]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-bpe", "unigram"])
def test_pieces_are_the_same_text_and_so_is_what_is_asked_for(kind: str) -> None:
    texts = [*STRANGE, *TEXTS[:3]] if kind == "byte-level" else TEXTS[:3]
    one, other = both(kind, texts)
    starts = np.arange(0, len(one.ids_N) - 24, 24)
    found = list(pairs(one, other, starts, 24))
    assert len(found) > 50
    for pair in found:
        assert 2 <= len(pair.ids_N) <= 24
        assert 2 <= len(pair.ids_M) <= 24
        assert pair.first_N >= 1 <= pair.first_M
        for of in (slice(None), slice(pair.first_N, None)):
            ours = fast(kind).decode(pair.ids_N[of])
            theirs = few(kind).decode(pair.ids_M[of if of == slice(None) else slice(pair.first_M, None)])
            assert ours == theirs
        # no earlier place could have been asked from
        ends_N, ends_M = (boundaries(ids, each.lengths_V) for ids, each in ((pair.ids_N, one), (pair.ids_M, other)))
        assert np.intersect1d(ends_N, ends_M)[1] == ends_N[pair.first_N] == ends_M[pair.first_M]


def test_blocks_of_a_tokenization_beside_itself_are_the_blocks() -> None:
    one, _ = both("byte-level", TEXTS[:3])
    found = list(pairs(one, one, np.array([0, 64, 256]), 64))
    assert [pair.ids_N.tolist() for pair in found] == [one.ids_N[at : at + 64].tolist() for at in (0, 64, 256)]
    assert all((pair.first_N, pair.first_M) == (1, 1) for pair in found)


def test_tokenizers_that_spell_other_text_are_refused() -> None:
    one = both("byte-level", TEXTS[:1])[0]
    other = both("byte-level", [TEXTS[0].upper() + "!"])[0]
    with pytest.raises(StageFailed, match="spell the same text"):
        list(pairs(one, other, np.array([0]), 32))
