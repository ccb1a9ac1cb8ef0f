"""An artifact: one directory and its `artifact.json`, which is written last and by rename.

A directory without `artifact.json` did not finish. Nothing in an artifact is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from compress.errors import CompressError

Format = Literal["torch", "quantized", "onnx", "measurement"]
"""`torch`: a `save_pretrained` folder. `quantized`: the same with codes, scales and zero points in place of some
weights. `onnx`: a folder that ONNX Runtime loads. `measurement`: figures about another artifact, no model."""

FORMATS: tuple[Format, ...] = get_args(Format)
Metrics = Mapping[str, Mapping[str, float]]
"""Figures by subject and name: `{"result": {"perplexity": 20.1, "perplexity_se": 0.3}, "source": {…}}`."""

MANIFEST = "artifact.json"
CHECKPOINTS = "checkpoints"
"""Inside an unfinished artifact's directory: what a killed stage goes on from. Removed when the stage is done."""

_SEAL = "sha256"
_WEIGHTS = (".safetensors", ".onnx", ".data")


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: bytes, modification time (ns) when it was digested, SHA-256 (hex)."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A finished directory: its format, key, lineage (the ids and keys of all it came from) and figures.

    ingredients: what the key is made of. id: what the pipeline that made it called the stage. Artifacts of earlier
    versions have neither.
    """

    path: Path
    format: Format
    stage: str
    key: str
    lineage: tuple[str, ...] = ()
    metrics: Metrics = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    ingredients: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    @property
    def size_mb(self) -> float:
        """Megabytes (1e6 bytes) of weights and graph: what a deployment must carry beside the tokenizer."""
        return sum(entry.size for name, entry in self.files.items() if name.endswith(_WEIGHTS)) / 1e6

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, as `config_of` reads it."""
        from compress.models.folder import config_of

        return config_of(self.path) or {}


def is_finished(path: Path) -> bool:
    """Whether `path` holds a finished artifact."""
    return (path / MANIFEST).is_file()


def finish(
    path: Path, *, format: Format, stage: str, key: str, lineage: tuple[str, ...], metrics: Metrics, id: str = "",
    ingredients: Mapping[str, Any] | None = None,
) -> Artifact:  # fmt: skip
    """Digest what a stage wrote to `path` and put `artifact.json` in place, last and by rename."""
    files = {
        file.relative_to(path).as_posix(): _digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).parts[0] not in (MANIFEST, MANIFEST + ".tmp", CHECKPOINTS)
    }
    artifact = Artifact(path, format, stage, key, lineage, metrics, files, ingredients or {}, id)
    manifest = {
        "format": format, "stage": stage, "id": id, "key": key, "lineage": list(lineage),
        "ingredients": dict(artifact.ingredients),
        "metrics": {subject: dict(values) for subject, values in metrics.items()},
        "files": {name: vars(entry) for name, entry in files.items()},
    }  # fmt: skip
    write_json(path / MANIFEST, sealed(manifest))
    return artifact


def open_artifact(path: Path) -> Artifact:
    """The artifact at `path`, its files checked against their digests.

    Files whose size and modification time are as recorded are taken to be as they were; others are read again.
    Raises CompressError for an unfinished, damaged or unreadable artifact.
    """
    artifact = read_artifact(path)
    for name, entry in artifact.files.items():
        _verify(path / name, entry, path)
    return artifact


def damages(artifact: Artifact) -> Iterator[tuple[Path, str]]:
    """The files of an artifact that are not what was written, every one read in full, and what is wrong with each."""
    for name, entry in artifact.files.items():
        file = artifact.path / name
        try:
            if _digest(file).sha256 != entry.sha256:
                yield file, "is not what was written (digest differs)"
        except FileNotFoundError:
            yield file, "is missing from a finished artifact"
        except OSError as error:
            yield file, f"can't be read ({error.strerror})"


def read_artifact(path: Path) -> Artifact:
    """The artifact at `path` as its `artifact.json` tells it, its files unread. Raises as `open_artifact`."""
    manifest = path / MANIFEST
    if not path.is_dir():
        raise CompressError(str(path), "no such artifact directory", "check the path")
    if not manifest.is_file():
        raise CompressError(str(path), f"has no {MANIFEST}, so the stage that wrote it did not finish", "run it again")
    try:
        raw = json.loads(manifest.read_text("utf-8"))
        files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        artifact = Artifact(
            path, raw["format"], raw["stage"], raw["key"], tuple(raw["lineage"]), raw["metrics"], files,
            raw.get("ingredients", {}), raw.get("id", ""),
        )  # fmt: skip
        if not is_whole(raw):
            raise ValueError("its digest differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(str(manifest), f"is damaged ({error})", f"delete {path} and run again") from error
    if artifact.format not in FORMATS:
        raise CompressError(str(manifest), f"unknown format {artifact.format!r}", "written by another version?")
    return artifact


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, to be written as JSON, with the digest of all of it."""
    return {**value, _SEAL: _sha256_of(json.loads(json.dumps(value)))}


def is_whole(value: Mapping[str, Any]) -> bool:
    """Whether what was read is as it was sealed; what was written before there were seals is taken to be."""
    return value.get(_SEAL) in (None, _sha256_of({name: each for name, each in value.items() if name != _SEAL}))


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sha256_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> FileEntry:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    status = file.stat()
    return FileEntry(status.st_size, status.st_mtime_ns, sha256)


def _verify(file: Path, entry: FileEntry, artifact: Path) -> None:
    fix = f"delete {artifact} and run again"
    if not file.is_file():
        raise CompressError(str(file), "is missing from a finished artifact", fix)
    status = file.stat()
    if status.st_size == entry.size and status.st_mtime_ns == entry.mtime_ns:
        return
    if status.st_size != entry.size or _digest(file).sha256 != entry.sha256:
        raise CompressError(str(file), "is not what was written (digest differs)", fix)
