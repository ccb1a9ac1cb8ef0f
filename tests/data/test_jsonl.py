"""JSONL as others write it, and what is wrong with a file that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packed import no_download

from compress.data.config import DataConfig, DatasetSpec
from compress.data.read import read_documents
from compress.data.text import TextData
from compress.errors import StageFailed

SEPARATORS = ("\u2028", "\u2029", "\x85", "\\u000b", "\\f", "\\u001c", "\\r", "\\n", "\x7f", "\ufeff", "\U0001f600")


def texts_of(file: Path) -> list[str]:
    return read_documents((str(file),), "data.train", no_download)


def write(file: Path, *rows: str | bytes, end: bytes = b"\n", begin: bytes = b"") -> Path:
    file.write_bytes(begin + b"".join((row.encode() if isinstance(row, str) else row) + end for row in rows))
    return file


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"], ids=["LF", "CRLF", "blank lines"])
def test_a_row_ends_at_a_line_feed_and_nowhere_else(begin: bytes, end: bytes, tmp_path: Path) -> None:
    rows = [f'{{"text": "before{separator}after", "n": {n}}}' for n, separator in enumerate(SEPARATORS)]
    expected = [json.loads(row)["text"] for row in rows]
    assert texts_of(write(tmp_path / "a.jsonl", *rows, end=end, begin=begin)) == expected
    assert "before\u2028after" in expected


@pytest.mark.parametrize(
    "other",
    [
        [1, "two", None, [3.5]], [{"a": 1}, {"b": [2]}, 3, {}], [2**70, 1, 2, 3], ["2020-01-01", "x", "y", "z"],
        [1e400, 0, 1, 2],
    ],
    ids=["mixed types", "mixed objects", "beyond 64 bits", "dates", "infinite"],
)  # fmt: skip
def test_other_columns_may_be_of_any_kind_and_missing(other: list[Any], tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text {n}"} | ({"other": value} if n else {})) for n, value in enumerate(other)]
    file = write(tmp_path / "a.jsonl", *rows, json.dumps({"late": True, "text": "last"}))
    assert texts_of(file) == [*(f"text {n}" for n in range(4)), "last"]


def test_texts_that_look_like_dates_are_texts(tmp_path: Path) -> None:
    dates = ["2020-01-01 00:00:00", "2021-12-31 23:59:59"]
    assert texts_of(write(tmp_path / "a.jsonl", *(json.dumps({"text": date}) for date in dates))) == dates


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_datasets_reads_it(begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.jsonl._row_by_row", lambda *_: pytest.fail("`datasets` can't read it"))
    rows = [json.dumps({"text": f"a{separator}b"}, ensure_ascii=False) for separator in SEPARATORS]
    assert len(texts_of(write(tmp_path / "a.jsonl", *rows, begin=begin))) == len(SEPARATORS)


def test_a_column_may_begin_far_down(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = "x" * 1_000_000
    rows = [json.dumps({"text": f"{n}{long}"} | ({"other": n} if n > 11 else {})) for n in range(13)]
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    assert [text[:2] for text in texts_of(write(folder / "a.jsonl", *rows))][-2:] == ["11", "12"]
    assert capfd.readouterr().out == ""


GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"text": ', r"a\.jsonl:3: is not JSON \(.*\); write one JSON object a line"),
        ('{"text": "a"} {"text": "b"', r"a\.jsonl:3: is not JSON"),
        ('{"text": "\x0b"}', r"a\.jsonl:3: is not JSON \(Invalid control character"),
        ('["good"]', r"a\.jsonl:3: is not a JSON object"),
        ("3", r"a\.jsonl:3: is not a JSON object"),
        ('{"body": "x"}', r"a\.jsonl:3: has a row without text under 'text'; set text_key to one of: body"),
        ('{"text": null}', r"a\.jsonl:3: has a row without text under 'text'"),
        ('{"text": 3}', r"a\.jsonl:3: has a row without text under 'text'"),
        ('{"text": {"a": "b"}}', r"a\.jsonl:3: has a row without text under 'text'"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: is not UTF-8 text \(invalid start byte\)"),
        (r'{"text": "\ud800"}', r"a\.jsonl:3: has half a surrogate pair under 'text'"),
    ],
)
def test_the_row_at_fault_is_named(row: str | bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=expected) as told:
        texts_of(write(tmp_path / "a.jsonl", GOOD, "", row, GOOD))
    assert "\n" not in str(told.value)


def test_a_file_of_blank_lines_and_one_of_an_array_are_told(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"data\.train: holds no text"):
        texts_of(write(tmp_path / "a.jsonl", " ", ""))
    with pytest.raises(StageFailed, match=r"a\.jsonl:1: is not a JSON object"):
        texts_of(write(tmp_path / "a.jsonl", f"[{GOOD}]"))


def test_a_plain_text_begins_after_its_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "first", begin=b"\xef\xbb\xbf")
    assert texts_of(tmp_path / "a.txt") == ["first\n"]


def test_a_data_set_is_kept_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"before{separator}after" for separator in SEPARATORS]
    spec = DatasetSpec(dataset="org/separators")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": text} for text in texts])
        assert read_documents((spec,), "data.train", no_download) == texts
    assert read_documents((spec,), "data.train", no_download) == texts


def test_text_that_was_read_once_is_not_read_again_to_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": " ".join(f"word{n}x{i}" for i in range(50)), "body": f"{n} " * 99}) for n in range(40)]
    file = write(tmp_path / "a.jsonl", *rows)
    digests = {split: TextData(DataConfig(train=str(file))).digest(split) for split in ("train", "eval")}
    others = (
        DataConfig(train={"path": str(file), "text_key": "body"}), DataConfig(train=str(file), eval_share=0.3),
        DataConfig(train=str(write(tmp_path / "b.jsonl", *rows[1:]))),
    )  # fmt: skip
    for config in others:
        assert TextData(config).digest("train") != digests["train"]
    with monkeypatch.context() as patch:
        patch.setattr("compress.data.text.read_documents", lambda *_: pytest.fail("read again"))
        again = TextData(DataConfig(train=str(file)))
        assert {split: again.digest(split) for split in ("train", "eval")} == digests
    write(file, *rows[:-1])
    assert TextData(DataConfig(train=str(file))).digest("train") != digests["train"]
