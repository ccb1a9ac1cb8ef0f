"""What `reduce-vocab` makes of tokenizers: any text still encodes, and text of kept tokens as it did."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from tokenizers_of_kinds import KINDS, TEXTS, sentencepiece_bpe, tokenizer_of, with_json

from compress.errors import StageFailed
from compress.stages.vocab.choice import Choice, choose
from compress.vocab.rewrite import smaller_tokenizer
from compress.vocab.tokens import BYTES, Vocabulary, closed

OTHER_TEXT = "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. 数学 🦜🏽\r\n\t x³ ﬁ </s> <tool> \x00 ▁ ##s"


@cache
def parsed_of(kind: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(tokenizer_of(kind).to_str())
    return parsed


def counts_of(kind: str, texts: list[str] = TEXTS) -> Any:
    encoder = tokenizer_of(kind)
    ids = [id_ for each in encoder.encode_batch(texts, add_special_tokens=False) for id_ in each.ids]
    return np.bincount(ids, minlength=encoder.get_vocab_size())


@cache
def least(kind: str) -> int:
    vocabulary = Vocabulary(parsed_of(kind))
    return len(closed(vocabulary, vocabulary.indispensable()))


@cache
def choice_of(kind: str, keep: int) -> Choice:
    vocabulary = Vocabulary(parsed_of(kind))
    return choose(vocabulary, counts_of(kind), vocabulary.indispensable(), keep, None)


@cache
def smaller(kind: str, share: float) -> tuple[Tokenizer, Choice]:
    """The tokenizer with what it can't do without and `share` of the rest."""
    keep = least(kind) + round(share * (tokenizer_of(kind).get_vocab_size() - 1 - least(kind)))
    choice = choice_of(kind, keep)
    assert len(choice.kept) == keep
    return Tokenizer.from_str(json.dumps(smaller_tokenizer(parsed_of(kind), choice.new_ids))), choice


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    decoded: str = tokenizer.decode(encoded(tokenizer, text), skip_special_tokens=False)
    return decoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 0.3, 1])
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*" ".join(TEXTS[:3]).split(), *OTHER_TEXT, *OTHER_TEXT.split(), "\n"])).map(" ".join),
))  # fmt: skip
def test_any_text_comes_back_as_it_did(kind: str, share: float, text: str) -> None:
    few, _ = smaller(kind, share)
    assert round_trip(few, text) == round_trip(tokenizer_of(kind), text)
    if kind == "byte-level":
        assert round_trip(few, text) == text


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_kept_tokens_are_encoded_as_they_were(kind: str) -> None:
    few, choice = smaller(kind, 0.3)
    alike = 0
    for word in {f" {word}" for text in TEXTS for word in text.split()}:
        ids = encoded(tokenizer_of(kind), word)
        if all(id_ in choice.new_ids for id_ in ids):
            assert encoded(few, word) == [choice.new_ids[id_] for id_ in ids], word
            alike += len(ids) > 1 or kind == "unigram"
    assert alike > 20


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_compact_and_names_keep_their_order(kind: str) -> None:
    few, choice = smaller(kind, 0.3)
    names = tokenizer_of(kind).get_vocab()
    by_id = {id_: name for name, id_ in names.items()}
    found = few.get_vocab()
    assert sorted(found.values()) == list(range(len(choice.kept)))
    assert found == {by_id[old]: new for old, new in choice.new_ids.items()}
    assert few.get_added_tokens_decoder().keys() == {choice.new_ids[id_] for id_ in tokenizer_of(kind)
                                                     .get_added_tokens_decoder()}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_surrounds_a_text_has_its_new_ids(kind: str) -> None:
    few, choice = smaller(kind, 0)
    before, after = (each.encode("").tokens for each in (tokenizer_of(kind), few))
    assert before == after != []
    assert few.encode("").ids == [choice.new_ids[id_] for id_ in tokenizer_of(kind).encode("").ids]


def test_every_merge_that_is_left_makes_a_token_and_every_token_can_be_made() -> None:
    for kind in ("byte-level", "sentencepiece-bpe"):
        few, choice = smaller(kind, 0.3)
        vocabulary = Vocabulary(json.loads(few.to_str()))
        for id_ in range(len(choice.kept)):
            if id_ not in vocabulary.added and vocabulary.names[id_] not in BYTES:
                assert vocabulary.is_reachable(id_)
        assert {vocabulary.joined(*pair) for pair in vocabulary.merges} <= vocabulary.ids.keys()


def test_a_token_stays_by_the_merges_that_really_make_it() -> None:
    """Of several ways to merge `aab`, BPE goes by the ranks, and not by the first merge that ends in it."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aa": 3, "aab": 4},
             "merges": ["a b", "a a", "aa b", "a ab"]}  # fmt: skip
    vocabulary = Vocabulary({"model": model})
    assert vocabulary.parents(4) == {0, 1, 2, 4}
    assert vocabulary.parents(3) == {0, 3}


def test_a_token_that_no_merge_makes_has_no_parents_and_comes_last() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ba": 2, "ab": 3}, "merges": ["a b"]}
    vocabulary = Vocabulary({"model": model})
    assert vocabulary.parents(2) == {2}
    assert not vocabulary.is_reachable(2)
    counts = np.array([5, 5, 0, 0])
    assert choose(vocabulary, counts, {0, 1}, 3, None).kept == [0, 1, 3]
    whole = Vocabulary({"model": {**model, "ignore_merges": True}})
    assert choose(whole, counts, {0, 1}, 3, None).kept == [0, 1, 2]


def test_tokens_stay_by_use_with_their_parents_and_then_by_rank() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "aa": 2, "bb": 3, "ba": 4, "bab": 5, "aab": 6},
             "merges": ["a a", "b b", "b a", "ba b", "aa b"]}  # fmt: skip
    vocabulary = Vocabulary({"model": model})
    counts = np.array([1, 1, 0, 0, 0, 9, 3])

    def kept(keep: int | None, coverage: float | None = None) -> Choice:
        return choose(vocabulary, counts, {0, 1}, keep, coverage)

    assert kept(4).kept == [0, 1, 4, 5]  # `bab`, and `ba` for its sake
    assert kept(3).kept == [0, 1, 2]  # there is room for neither token in use with its parents
    assert kept(6).kept == [0, 1, 2, 4, 5, 6]
    assert (kept(6).num_indispensable, kept(6).num_by_use, kept(6).num_by_rank) == (2, 4, 0)
    assert kept(5).kept == [0, 1, 2, 4, 5]
    assert (kept(5).num_by_rank, kept(5).coverage) == (1, pytest.approx(11 / 14))
    assert kept(None, 0.7).kept == [0, 1, 4, 5]
    assert kept(None, 0.8).kept == [0, 1, 2, 4, 5, 6]
    assert kept(None, 0.1).kept == [0, 1]


def test_what_the_text_has_once_does_not_outweigh_what_other_text_has_often() -> None:
    names = [f"<{number}>" for number in range(2000)]
    vocabulary = Vocabulary({"model": {"type": "WordPiece", "vocab": {name: id_ for id_, name in enumerate(names)}}})
    counts = np.zeros(2000, np.int64)
    counts[[0, 1999]] = 10_000, 1
    often = np.argsort(-choose_all(vocabulary, counts))[:100]
    kept = choose(vocabulary, counts, set(), 100, None)
    assert set(kept.kept) == set(often)
    assert 1999 not in kept.kept
    counts[1999] = 100
    kept = choose(vocabulary, counts, set(), 100, None)
    assert 1999 in kept.kept
    assert (kept.num_by_use, kept.num_by_rank) == (2, 98)


def choose_all(vocabulary: Vocabulary, counts: Any) -> Any:
    """The share that a token is expected to have, spelt out: Zipf and Mandelbrot's law beside the text's."""
    law = np.array([1 / (rank + 500) for rank in range(len(counts))])
    return counts / counts.sum() + 0.3 * law / law.sum()


def test_bytes_special_tokens_and_single_characters_stay() -> None:
    for kind in KINDS:
        _, choice = smaller(kind, 0)
        by_id = {id_: name for name, id_ in tokenizer_of(kind).get_vocab().items()}
        names = {by_id[id_] for id_ in choice.kept}
        assert set(tokenizer_of(kind).get_added_tokens_decoder()) <= set(choice.kept)
        if kind == "byte-level":
            assert sum(len(name) == 1 for name in names) == 256
        elif kind == "sentencepiece-bpe":
            assert {*BYTES, "▁"} <= names
        else:
            single = {name for name in by_id.values() if len(name.removeprefix("##")) == 1}
            assert single <= names


def test_a_fallback_that_lacks_a_byte_is_none() -> None:
    lacking = with_json(sentencepiece_bpe(), vocab=lambda vocab: {n: i for n, i in vocab.items() if n != BYTES[255]})
    vocabulary = Vocabulary(json.loads(lacking.to_str()))
    single = {id_ for name, id_ in vocabulary.ids.items() if len(name) == 1}
    assert single <= vocabulary.indispensable()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_token_whose_characters_have_no_token_stays(kind: str) -> None:
    parsed = parsed_of(kind)
    vocabulary = Vocabulary(parsed)
    rest = "##q" if kind == "wordpiece" else "q"
    named = next(name for name in vocabulary.ids if "q" in name[1:].removeprefix("##")[1:] and len(name) > 4)
    model = dict(parsed["model"])
    if kind == "wordpiece":
        model["vocab"] = {name: id_ for name, id_ in model["vocab"].items() if name != rest}
    else:
        model["vocab"] = [[f"{name}\0" if name == rest else name, score] for name, score in model["vocab"]]
    assert vocabulary.ids[named] not in vocabulary.indispensable()
    assert vocabulary.ids[named] in Vocabulary({**parsed, "model": model}).indispensable()


def test_fewer_than_are_needed_or_as_many_as_there_are_is_refused() -> None:
    kind = "byte-level"
    vocabulary, counts = Vocabulary(parsed_of(kind)), counts_of(kind)
    needed = vocabulary.indispensable()
    with pytest.raises(StageFailed, match=rf"need {least(kind)}.*at least {least(kind)}"):
        choose(vocabulary, counts, needed, least(kind) - 1, None)
    padded = np.concatenate([counts, np.zeros(10, int)])
    with pytest.raises(StageFailed, match="leaves none out"):
        choose(vocabulary, padded, needed, len(vocabulary.names), None)
    assert len(choose(vocabulary, padded, needed, len(vocabulary.names) - 1, None).kept) == len(vocabulary.names) - 1


def test_added_tokens_without_an_embedding_come_after_those_with_one() -> None:
    kind = "byte-level"
    vocabulary, counts = Vocabulary(parsed_of(kind)), counts_of(kind)
    last = len(counts) - 1
    choice = choose(vocabulary, counts[:last], vocabulary.indispensable(), 300, None)
    assert (len(choice.kept), choice.beyond, choice.new_ids[last]) == (300, [last], 300)
    few = Tokenizer.from_str(json.dumps(smaller_tokenizer(parsed_of(kind), choice.new_ids)))
    assert encoded(few, "<tool>") == [300]
