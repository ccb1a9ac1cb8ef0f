"""Reading what a data spec names into documents."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.data.config import HUB, PYTHON_DOCS, DatasetSpec, FileSpec, text_files
from compress.errors import StageFailed
from compress.fetch.cache import ensure, entry_path, finished
from compress.fetch.packages import SCHEMES, Downloader, Package, fetch


def read_documents(specs: Sequence[str | FileSpec | DatasetSpec], where: str, download: Downloader) -> list[str]:
    """All documents that `specs` name, in their order. Raises StageFailed for what is missing, unreadable or empty."""
    documents = [text for spec in specs for text in _documents_of(spec, where, download) if text.strip()]
    if not documents:
        raise StageFailed(where, "holds no text", "name files that do")
    return documents


def _documents_of(spec: str | FileSpec | DatasetSpec, where: str, download: Downloader) -> list[str]:
    if isinstance(spec, DatasetSpec):
        return _read_dataset(spec, where)
    text, text_key = (spec.path, spec.text_key) if isinstance(spec, FileSpec) else (spec, "text")
    if text == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if text.startswith(HUB):
        return _read_dataset(DatasetSpec.model_validate({"dataset": text.removeprefix(HUB)}), where)
    return [document for file in files_of(text, where, download) for document in _read_file(file, text_key, where)]


def files_of(text: str, where: str, download: Downloader) -> list[Path]:
    """The files that a path, a folder, a glob or a package URI names. Raises StageFailed where there are none."""
    files = _package_files(Package.parse(text, where), download) if text.startswith(SCHEMES) else text_files(text)
    if not files:
        raise StageFailed(where, f"no file matches {text!r}", "correct the path")
    return files


def _read_file(file: Path, text_key: str, where: str) -> list[str]:
    """The documents of one file: its whole text, or one for each line of a .jsonl file."""
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise StageFailed(where, f"{file} can't be read ({error.strerror})", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise StageFailed(where, f"{file} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from error
    if file.suffix != ".jsonl":
        return [text]
    rows = (json_line(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip())
    return [text_of(row, text_key, str(file)) for row in rows]


def json_line(line: str, where: str) -> dict[str, Any]:
    """One line of a .jsonl file. Raises StageFailed where it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StageFailed(where, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(row, dict):
        raise StageFailed(where, "is not a JSON object", "write one JSON object a line")
    return row


def text_of(row: Mapping[str, Any], text_key: str, where: str) -> str:
    """The text of one row. Raises StageFailed where it has none."""
    text = row.get(text_key)
    if not isinstance(text, str):
        known = ", ".join(sorted(map(str, row)))
        raise StageFailed(where, f"has a row without text under {text_key!r}", f"set text_key to one of: {known}")
    return text


def _package_files(package: Package, download: Downloader) -> list[Path]:
    """The files of `package` that match its path (a file, a folder or a glob), sorted; fetched once into the cache."""
    entry = ensure("packages", _identity(package), lambda out: _unpack_package(package, out, download))
    root = entry / package.root
    files = sorted(file for file in root.rglob("*") if file.is_file())
    chosen = [file for file in files if _matches(file.relative_to(root).as_posix(), package.path)]
    if not chosen:
        names = sorted({file.relative_to(root).parts[0] + ("/…" if file.parent != root else "") for file in files})
        raise StageFailed(package.uri, f"{package} has no such file", f"it has: {', '.join(names[:12])}")
    return chosen


def package_facts(text: str) -> dict[str, str]:
    """The SHA-256 of the archive of the package that a spec names; nothing where it names none or it isn't fetched."""
    if not text.startswith(SCHEMES):
        return {}
    facts = finished(entry_path("packages", _identity(Package.parse(text, "data"))))
    return {"sha256": str(facts["sha256"])} if facts else {}


def _identity(package: Package) -> str:
    return f"{package.scheme} {package.name} {package.version} {package.sha256 or ''}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern.rstrip("/") + "/")


def _unpack_package(package: Package, out: Path, download: Downloader) -> dict[str, str]:
    return {"uri": package.uri, "sha256": fetch(package, out, lambda names: names, download)}


def _read_dataset(spec: DatasetSpec, where: str) -> list[str]:
    """A data set's texts, kept in the cache, so that a cached run neither asks the hub nor imports `datasets`."""
    entry = ensure("datasets", spec.model_dump_json(), lambda out: _fetch_dataset(spec, out, where))
    lines = (entry / "texts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _fetch_dataset(spec: DatasetSpec, out: Path, where: str) -> dict[str, str]:
    from datasets import load_dataset

    try:
        rows: Iterator[dict[str, Any]] = iter(
            load_dataset(spec.dataset, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        )
        with (out / "texts.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                if number == spec.max_documents:
                    break
                file.write(json.dumps({"text": text_of(row, spec.text_key, spec.dataset)}) + "\n")
    except (OSError, ValueError) as error:
        fix = "check its name, config and split, and the network"
        raise StageFailed(where, f"{spec.dataset} can't be loaded ({error})", fix) from error
    return {"dataset": spec.dataset}
