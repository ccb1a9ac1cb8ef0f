"""Reading what a data spec names into documents."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.data.config import HUB, PYTHON_DOCS, DatasetSpec, FileSpec, text_files
from compress.data.jsonl import read_jsonl, text_of
from compress.errors import StageFailed
from compress.fetch.cache import ensure, entry_path, file_sha256, finished
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
        return _read_dataset(_dataset_of(text), where)
    return [document for file in files_of(text, where, download) for document in _read_file(file, text_key, where)]


def content_of(specs: Sequence[str | FileSpec | DatasetSpec], where: str, download: Downloader) -> list[str]:
    """What tells the documents that `specs` name from any others, without reading them where they are known."""
    found = []
    for spec in specs:
        text, text_key = (spec.path, spec.text_key) if isinstance(spec, FileSpec) else (spec, "text")
        if isinstance(text, DatasetSpec):
            files = [_fetched(text, where)]
        elif text == PYTHON_DOCS:
            files = [_python_docs()]
        elif text.startswith(HUB):
            files = [_fetched(_dataset_of(text), where)]
        else:
            files = files_of(text, where, download)
        found += [f"{text_key} {file.suffix} {file_sha256(file)}" for file in files]
    return found


def files_of(text: str, where: str, download: Downloader) -> list[Path]:
    """The files that a path, a folder, a glob or a package URI names. Raises StageFailed where there are none."""
    files = _package_files(Package.parse(text, where), download) if text.startswith(SCHEMES) else text_files(text)
    if not files:
        raise StageFailed(where, f"no file matches {text!r}", "correct the path")
    return files


def _python_docs() -> Path:
    module = find_spec("pydoc_data.topics")
    assert module is not None and module.origin is not None  # noqa: PT018
    return Path(module.origin)


def _dataset_of(text: str) -> DatasetSpec:
    return DatasetSpec.model_validate({"dataset": text.removeprefix(HUB)})


def _read_file(file: Path, text_key: str, where: str) -> list[str]:
    """The documents of one file: its whole text, or one for each row of a .jsonl file."""
    try:
        return read_jsonl(file, text_key) if file.suffix == ".jsonl" else [file.read_text("utf-8-sig")]
    except OSError as error:
        raise StageFailed(where, f"{file} can't be read ({error.strerror})", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise StageFailed(where, f"{file} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from error


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
    with _fetched(spec, where).open(encoding="utf-8", newline="\n") as rows:
        return [json.loads(row)["text"] for row in rows]


def _fetched(spec: DatasetSpec, where: str) -> Path:
    """A data set's texts, kept in the cache, so that a cached run neither asks the hub nor imports `datasets`."""
    entry = ensure("datasets", spec.model_dump_json(), lambda out: _fetch_dataset(spec, out, where))
    return entry / "texts.jsonl"


def _fetch_dataset(spec: DatasetSpec, out: Path, where: str) -> dict[str, str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Iterator[dict[str, Any]] = iter(
            load_dataset(spec.dataset, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        )
        with (out / "texts.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                if number == spec.max_documents:
                    break
                file.write(json.dumps({"text": text_of(row, spec.text_key, spec.dataset)}) + "\n")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: one that is a script
        fix = "check its name, config and split, and the network"
        raise StageFailed(where, f"{spec.dataset} can't be loaded ({error})", fix) from error
    return {"dataset": spec.dataset}
