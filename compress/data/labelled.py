"""Texts with labels, for judging encoders by classification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.read import files_of, json_line, text_of
from compress.errors import StageFailed
from compress.fetch.packages import Downloader, download


@dataclass(frozen=True)
class Labelled:
    """Texts and the label of each, in the order of the file."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def read_labelled(
    spec: str, text_key: str = "text", label_key: str = "label", download: Downloader = download
) -> tuple[Labelled, Labelled]:
    """(train, test) of the labelled texts in a JSON array or .jsonl file, on disk or in a package.

    A text whose SHA-1 is divisible by 5 is test text, so the same text is always on the same side. Rows without a
    label are left out. Raises StageFailed for what is missing or malformed, and where a side is empty.
    """
    files = files_of(spec, spec, download)
    rows = [(text_of(row, text_key, spec), row.get(label_key)) for file in files for row in _rows(file)]
    labelled = [(text, str(label)) for text, label in rows if label is not None]
    test = [row for row in labelled if _is_test(row[0])]
    train = [row for row in labelled if not _is_test(row[0])]
    if not train or not test:
        what = f"{len(labelled)} of {len(rows)} rows have a {label_key!r}: too few to train and test on"
        raise StageFailed(spec, what, f"check that the key of the label is {label_key!r}")
    return _unzip(train), _unzip(test)


def _rows(file: Path) -> list[Mapping[str, Any]]:
    text = file.read_text("utf-8")
    if file.suffix == ".jsonl":
        return [json_line(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise StageFailed(str(file), f"is not JSON ({error})", "name a JSON array or a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise StageFailed(str(file), "is not an array of objects", "name a JSON array or a .jsonl file")
    return rows


def _is_test(text: str) -> bool:
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), 16) % 5 == 0


def _unzip(rows: list[tuple[str, str]]) -> Labelled:
    return Labelled(tuple(text for text, _ in rows), tuple(label for _, label in rows))
