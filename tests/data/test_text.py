from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import Registry, no_download

from compress.data.config import DataConfig
from compress.data.text import TextData, check_tokenizer
from compress.errors import CompressError, StageFailed
from compress.models.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(pico: Callable[[str], Path]) -> Any:
    return load_tokenizer(pico("llama"))


def words(name: str, num_words: int = 300) -> str:
    return " ".join(f"{name}{i}" for i in range(num_words))


def data(tmp_path: Path, train: dict[str, str], held_out: dict[str, str], **options: Any) -> TextData:
    for folder, files in (("train", train), ("eval", held_out)):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, "utf-8")
    return TextData(DataConfig(train=f"{tmp_path}/train/*", eval=f"{tmp_path}/eval/*", **options))


def test_blocks_hold_every_token_in_order_with_an_end_after_each_document(tmp_path: Path, tokenizer: Any) -> None:
    texts = [words("alpha"), words("beta", 77), words("gamma", 150)]
    source = data(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)}, {"e.txt": words("held")})
    stream = [id_ for text in texts for id_ in (*tokenizer.encode(text), tokenizer.eos_token_id)]
    blocks = source.blocks("train", tokenizer, 64)
    assert blocks.dtype == np.int64
    assert blocks.shape == (len(stream) // 64, 64)
    assert blocks.ravel().tolist() == stream[: blocks.size]


def test_fewer_tokens_are_taken_from_all_over_the_text(tmp_path: Path, tokenizer: Any) -> None:
    source = data(tmp_path, {"t.txt": words("train")}, {"e.txt": words("held", 2000)})
    whole = source.blocks("eval", tokenizer, 32)
    some = source.blocks("eval", tokenizer, 32, max_tokens=32 * 10 + 5)
    places = [next(i for i, block in enumerate(whole) if np.array_equal(block, chosen)) for chosen in some]
    assert len(some) == 10
    assert places[0] == 0
    assert set(np.diff(places)) <= {len(whole) // 10, len(whole) // 10 + 1}
    assert np.array_equal(source.blocks("eval", tokenizer, 32, max_tokens=10**9), whole)


def test_a_fresh_object_gives_the_same_texts_blocks_and_digests(tokenizer: Any) -> None:
    first, second = TextData(DataConfig()), TextData(DataConfig())
    for split in ("train", "eval"):
        assert first.digest(split) == second.digest(split)
        assert np.array_equal(first.blocks(split, tokenizer, 128, 4096), second.blocks(split, tokenizer, 128, 4096))
    assert first.digest("train") != first.digest("eval")


def test_the_digest_follows_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    digests = []
    for text in (words("a"), words("b"), words("a")):
        file.write_text(text)
        digests.append(TextData(DataConfig(train=str(file), eval="python-docs")).digest("train"))
    assert digests[0] == digests[2] != digests[1]


def test_too_short_a_text_says_how_much_there_is_and_is_needed(tmp_path: Path, tokenizer: Any) -> None:
    source = data(tmp_path, {"t.txt": words("train")}, {"e.txt": "Five words are not enough."})
    num_tokens = len(tokenizer.encode("Five words are not enough.")) + 1
    with pytest.raises(StageFailed, match=f"eval text has {num_tokens} tokens and one block needs 512"):
        source.blocks("eval", tokenizer, 512)
    with pytest.raises(StageFailed, match="max_tokens is 10"):
        source.blocks("train", tokenizer, 64, max_tokens=10)


def test_leaked_eval_text_is_refused_with_an_example_and_can_be_allowed(tmp_path: Path) -> None:
    source = data(tmp_path, {"t.txt": words("train")}, {"e.txt": words("fresh") + words("train", 200)})
    for ask in (source.texts, source.digest):
        with pytest.raises(StageFailed, match=r"data.eval: 3\d\.\d% of it also stands in data.train, as: '.*train1"):
            ask("eval")
    allowed = source.config.model_copy(update={"max_overlap": 0.5})
    assert len(TextData(allowed).texts("eval")) == 1
    assert source.texts("train")  # training alone leaks nothing


def test_jsonl_takes_each_line_as_a_document(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"body": words(f"w{i}", 50), "n": i}) for i in range(30)) + "\n\n")
    source = TextData(DataConfig(train={"path": str(file), "text_key": "body"}, eval_share=0.2))
    assert sorted(source.texts("train") + source.texts("eval")) == sorted(words(f"w{i}", 50) for i in range(30))
    assert len(source.texts("eval")) == 5  # the sixth would be more than a fifth of the characters
    with pytest.raises(StageFailed, match="text_key to one of: body, n"):
        TextData(DataConfig(train=str(file))).texts("train")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: is not JSON"),
        ("a.jsonl", b'["x"]\n', "is not a JSON object"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b"  \n\n", "holds no text"),
        ("a.txt", b"one paragraph only", "too few to hold some out"),
    ],
)
def test_unreadable_text_is_one_clear_message(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageFailed, match=expected):
        TextData(DataConfig(train=str(tmp_path / name))).texts("train")


def test_package_text_is_downloaded_once_for_all_that_name_it() -> None:
    registry = Registry({f"data/{year}_speech.txt": words(f"y{year}").encode() for year in range(1990, 2010)})
    config = DataConfig(train="npm://@org/speeches/1.0.0/data/19*.txt", eval="npm://@org/speeches/1.0.0/data/20*.txt")
    source = TextData(config, registry)
    assert source.texts("train") == [words(f"y{year}") for year in range(1990, 2000)]
    assert source.texts("eval") == [words(f"y{year}") for year in range(2000, 2010)]
    assert registry.num_downloads == 1
    assert TextData(config, no_download).digest("eval") == source.digest("eval")


def test_a_folder_of_a_wheel_is_text_too() -> None:
    registry = Registry({"texts/a.txt": words("a").encode(), "texts/sub/b.txt": words("b").encode(), "c.txt": b"c"})
    source = TextData(DataConfig(train="pypi://texts/1.0/texts", eval="python-docs"), registry)
    assert source.texts("train") == [words("a"), words("b")]


def test_a_wrong_path_in_a_package_lists_what_there_is() -> None:
    registry = Registry({"data/a.txt": b"a", "README.md": b"b"})
    with pytest.raises(CompressError, match=r"has no such file; it has: README.md, data/…"):
        TextData(DataConfig(train="npm://speeches/1.0.0/texts/*.txt"), registry).texts("train")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, 512)
    with pytest.raises(StageFailed, match=r"gives token 511 .* to a model of 500 embeddings"):
        check_tokenizer(tokenizer, 500)
