from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from compress.data.split import hold_out, overlap_of

DOCUMENTS = [" ".join(f"word{document}x{i}" for i in range(200 + 20 * document)) for document in range(40)]


def test_texts_that_share_nothing_do_not_overlap() -> None:
    assert overlap_of(DOCUMENTS[:20], DOCUMENTS[20:]).share == 0.0


def test_the_same_text_overlaps_wholly_whatever_its_case_and_spacing() -> None:
    held_out = [DOCUMENTS[3].upper().replace(" ", "\n  ")]
    found = overlap_of(DOCUMENTS, held_out)
    assert found.share == 1.0
    assert "word3x" in found.example


def test_a_leaked_part_is_measured_by_its_share() -> None:
    fresh = " ".join(f"fresh{i}" for i in range(3000))
    leaked = " ".join(f"leaked{i}" for i in range(1000))
    assert overlap_of([leaked], [f"{fresh} {leaked}"]).share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_held_out_text_is_disjoint_deterministic_and_of_the_size_asked_for(share: float) -> None:
    train, held_out = hold_out(DOCUMENTS, share)
    assert (train, held_out) == hold_out(DOCUMENTS, share)
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert sum(map(len, held_out)) / sum(map(len, DOCUMENTS)) == pytest.approx(share, rel=0.3)


def test_the_order_of_the_documents_does_not_change_the_choice() -> None:
    _, held_out = hold_out(DOCUMENTS, 0.2)
    _, from_reversed = hold_out(DOCUMENTS[::-1], 0.2)
    assert sorted(held_out) == sorted(from_reversed)


def test_one_long_document_is_cut_at_paragraphs() -> None:
    book = "\n\n".join(" ".join(f"p{paragraph}w{i}" for i in range(80)) for paragraph in range(200))
    train, held_out = hold_out([book], 0.1)
    assert sum(map(len, held_out)) / len(book) == pytest.approx(0.1, rel=0.4)
    assert sorted("\n\n".join(train + held_out).split("\n\n")) == sorted(book.split("\n\n"))


def test_paragraphs_that_several_documents_share_stay_on_one_side() -> None:
    shared = " ".join(f"shared{i}" for i in range(100))
    train, held_out = hold_out([f"{document}\n\n{shared}" for document in DOCUMENTS], 0.3)
    assert overlap_of(train, held_out).share == 0.0
    assert sum(shared in document for document in train + held_out) == 1


def test_the_python_docs_repeat_themselves_and_are_held_out_without_overlap() -> None:
    documents = [topics[name] for name in sorted(topics)]
    assert overlap_of(documents[::2], documents[1::2]).share > 0.1  # why whole topics can't just be dealt out
    train, held_out = hold_out(documents, 0.1)
    assert overlap_of(train, held_out).share < 0.01
    assert 0.07 < sum(map(len, held_out)) / sum(map(len, train + held_out)) < 0.13
