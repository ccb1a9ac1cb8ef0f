"""The texts of a JSONL file, through `datasets`; and where that fails, the row that is at fault.

A row ends at a line feed and nowhere else: U+2028, U+2029 and U+0085 may stand in a string.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.errors import StageFailed

_FIX = "write one JSON object a line"


def read_jsonl(file: Path, text_key: str) -> list[str]:
    """The text under `text_key` of each row, in their order.

    Raises StageFailed, naming the row, for one that is no JSON object, has no such text or is not UTF-8; OSError where
    the file can't be read.
    """
    if not _begins_with_object(file):
        return list(_row_by_row(file, text_key))
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    # All in one chunk: the columns of the first would else have to be those of all.
    options = {"chunksize": file.stat().st_size + 1, "keep_in_memory": True}
    try:
        with TemporaryDirectory(prefix="compress-") as cache:
            rows = Dataset.from_json(glob.escape(str(file.absolute())), cache_dir=cache, **options)
            texts = list(rows[text_key]) if text_key in rows.column_names else []
    except (DatasetsError, OSError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError):
        texts = []  # read again below, row by row
    return texts if texts and all(isinstance(text, str) for text in texts) else list(_row_by_row(file, text_key))


def text_of(row: Mapping[str, Any], text_key: str, where: str) -> str:
    """The text of one row. Raises StageFailed where it has none."""
    text = row.get(text_key)
    if not isinstance(text, str):
        known = ", ".join(sorted(map(str, row)))
        raise StageFailed(where, f"has a row without text under {text_key!r}", f"set text_key to one of: {known}")
    return text


def _begins_with_object(file: Path) -> bool:
    """Whether the first row may be an object; `datasets` also takes arrays, and makes of them what it can."""
    with file.open("rb") as stream:
        for line in stream:
            if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
                return stripped.startswith(b"{")
    return False


def _row_by_row(file: Path, text_key: str) -> Iterator[str]:
    """Reads a file that Arrow has no types for (a number beyond 64 bits), and tells what is wrong with any other."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise StageFailed(where, f"is not UTF-8 text ({error.reason})", "convert it to UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise StageFailed(where, f"is not JSON ({error})", _FIX) from error
            if not isinstance(row, dict):
                raise StageFailed(where, "is not a JSON object", _FIX)
            found = text_of(row, text_key, where)
            if not _is_unicode(found):
                raise StageFailed(where, f"has half a surrogate pair under {text_key!r}", "write the whole character")
            yield found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
