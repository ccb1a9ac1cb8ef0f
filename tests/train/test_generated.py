"""Text that a teacher writes: what it consists of, that it is the same again, that a kill loses little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import StageFailed
from compress.models.load import load_model, load_tokenizer
from compress.stage import Reporter
from compress.train import generated
from compress.train.generated import Author, generate_blocks, packed
from pico import make_hybrid, make_pico

LENGTH = 24
ENDS = list(range(40, 100))
"""So many that documents end at every length."""


def author_of(folder: Path, ends: list[int] | None = None) -> Author:
    torch.set_num_threads(1)
    model = load_model(folder)
    if ends:
        model.generation_config.eos_token_id = ends
    return Author(lambda: model, load_tokenizer(folder))


@pytest.fixture(scope="module")
def llama(pico):
    return author_of(pico("llama"), ENDS)


@torch.no_grad()
def naive(author: Author, num: int, rng: np.random.Generator) -> list[list[int]]:
    """The documents one by one, every token from a forward pass over all before it."""
    plain = [i for i in range(512) if i not in {0, *ENDS}]
    first, num_likeliest = rng.choice(plain, num), rng.integers(3, 6, (num, 1))[:, 0]
    chances = rng.random((num, LENGTH))
    documents = []
    for row in range(num):
        document = [int(first[row])]
        while len(document) < LENGTH and (document[-1] not in {0, *ENDS} or len(document) == 1):
            logits = author.model(torch.tensor([document])).logits[0, -1].double()
            if len(document) <= num_likeliest[row]:
                document.append(max(plain, key=lambda i: logits[i]))
                continue
            cumulative = logits.softmax(-1).cumsum(-1)
            document.append(int((cumulative <= chances[row, len(document)]).sum()))
        documents.append(document)
    return documents


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "hybrid"])
def test_documents_are_what_the_naive_way_writes(model_type, pico, tmp_path):
    folder = make_hybrid("llama", tmp_path) if model_type == "hybrid" else pico(model_type)
    author = author_of(folder, ENDS)
    ids_BT = author.write(12, LENGTH, np.random.default_rng(3))
    documents = [[int(id_) for id_ in row if id_ >= 0] for row in ids_BT]
    assert documents == naive(author, 12, np.random.default_rng(3))
    assert len({len(document) for document in documents}) > 3, "they end at many lengths"


def test_tokens_are_drawn_as_often_as_they_are_likely(llama):
    logits_V, num = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 2, 20_000
    logits_V[0] = -torch.inf
    drawn = llama._next(logits_V.expand(num, 512), (np.arange(num) + 0.5) / num, np.ones(num, bool))
    shares = np.bincount(drawn, minlength=512) / num
    assert np.abs(shares - logits_V.softmax(-1).numpy()).max() <= 1.01 / num


def test_only_plain_tokens_are_written(tmp_path):
    folder = make_pico("llama", tmp_path, vocab_size=640, seed=5)
    author = author_of(folder)
    ids_BT = author.write(40, 64, np.random.default_rng(0))
    assert ids_BT.max() < len(author.tokenizer) == 512, "nothing that the tokenizer can't read"
    assert not (ids_BT[:, :4] == 0).any(), "no end before the first likely tokens"
    ended = [row[row >= 0] for row in ids_BT if (row < 0).any()]
    assert ended
    assert all(document[-1] == 0 and 0 not in document[:-1] for document in ended)


def test_a_document_begins_as_the_tokenizer_begins_one(pico):
    from tokenizers.processors import TemplateProcessing

    author = author_of(pico("llama"))
    author.tokenizer._tokenizer.post_processor = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    ids_BT = author.write(6, LENGTH, np.random.default_rng(0))
    assert (ids_BT[:, 0] == 0).all()
    assert (ids_BT[:, 1:5] > 0).all()


def test_short_documents_share_blocks():
    none = -1
    documents = np.array([[8, 0, none, none], [4, 5, 6, 7], [9, 0, none, none], [3, 0, none, none]])
    blocks, rest = packed(documents, np.array([1]))
    assert np.array(blocks).tolist() == [[4, 5, 6, 7], [1, 8, 0, 9]]
    assert rest.tolist() == [0, 3, 0]


def test_a_seed_gives_the_same_text_again(llama, tmp_path):
    one, again, other = (
        generate_blocks(llama, 9, LENGTH, seed, tmp_path / name, Reporter())
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one.shape == (9, LENGTH)
    assert (one == again).all()
    assert len({tuple(block) for block in [*one, *other]}) == 18


def test_fewer_blocks_are_the_first_of_more_and_are_not_written_again(llama, tmp_path, monkeypatch):
    few = generate_blocks(llama, 3, LENGTH, 0, tmp_path, Reporter())
    many = generate_blocks(llama, 8, LENGTH, 0, tmp_path, Reporter())
    monkeypatch.setattr(Author, "write", lambda *_: pytest.fail("written again"))
    assert (few == many[:3]).all()
    assert (generate_blocks(llama, 8, LENGTH, 0, tmp_path, Reporter()) == many).all()


def test_a_killed_generation_goes_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "_CHUNK_DOCUMENTS", 4)
    undisturbed = generate_blocks(llama, 8, LENGTH, 0, tmp_path / "undisturbed", Reporter())
    work, write, num_written = tmp_path / "killed", Author.write, 0

    def write_and_be_killed(author: Author, *rest: Any) -> Any:
        nonlocal num_written
        num_written += 1
        if num_written == 2:
            raise KeyboardInterrupt
        return write(author, *rest)

    monkeypatch.setattr(Author, "write", write_and_be_killed)
    with pytest.raises(KeyboardInterrupt):
        generate_blocks(llama, 8, LENGTH, 0, work, Reporter())
    assert (generate_blocks(llama, 8, LENGTH, 0, work, Reporter()) == undisturbed).all()
    assert num_written == 1 + len(list((tmp_path / "undisturbed").rglob("*.json"))), "only what was cut off came twice"


def test_a_backbone_without_a_head_is_refused(tmp_path):
    folder = make_pico("llama", tmp_path, architecture="LlamaModel")
    with pytest.raises(StageFailed, match="without a head and writes no text; use data: text"):
        author_of(folder).write(1, LENGTH, np.random.default_rng(0))


def test_a_broken_teacher_is_refused(pico):
    author = author_of(pico("llama"))
    next(author.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(StageFailed, match="logits are not finite"):
        author.write(1, LENGTH, np.random.default_rng(0))
