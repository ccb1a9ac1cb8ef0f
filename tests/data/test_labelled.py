from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from packed import Registry

from compress.data.labelled import read_labelled
from compress.errors import CompressError

ROWS = [{"text": f"review {i}", "class": [0, 1, None][i % 3]} for i in range(60)]


def test_rows_without_a_label_are_dropped_and_the_rest_split_by_hash() -> None:
    registry = Registry({"fixtures/reviews.json": json.dumps(ROWS).encode()})
    train, test = read_labelled("npm://reviews/1.0.0/fixtures/reviews.json", label_key="class", download=registry)
    assert len(train.texts) + len(test.texts) == 40
    assert all(int(hashlib.sha1(text.encode()).hexdigest(), 16) % 5 == 0 for text in test.texts)
    assert all(int(hashlib.sha1(text.encode()).hexdigest(), 16) % 5 != 0 for text in train.texts)
    found = dict(zip(train.texts + test.texts, train.labels + test.labels, strict=True))
    assert found == {row["text"]: str(row["class"]) for row in ROWS if row["class"] is not None}


def test_jsonl_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": r["text"], "label": r["class"]}) for r in ROWS))
    train, test = read_labelled(str(tmp_path / "a.jsonl"))
    assert len(train.labels) + len(test.labels) == 40


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '[{"text": "x"}]', '[{"body": "x"}]'])
def test_what_is_not_labelled_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CompressError):
        read_labelled(str(tmp_path / "a.json"))
