"""Unpacking archives that others made: nothing outside the folder, no links, no bombs."""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from compress.errors import CompressError

MAX_BYTES = 40_000_000_000
MAX_FILES = 100_000
_MAX_TAIL = 1 << 20
_DAMAGE = (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError,
           RuntimeError)  # fmt: skip


def unpack(archive: Path, out: Path, wanted: Callable[[str], bool], max_bytes: int = MAX_BYTES) -> list[str]:
    """Unpack the members of a .whl, .zip or .tgz for whose name `wanted` is true into `out`; the names of all files.

    Raises CompressError for a damaged archive, and for one with an absolute path, `..`, a link, a device, a name that
    occurs twice, more than `max_bytes` bytes or too many files, wanted or not.
    """
    members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
    names: set[str] = set()
    size = 0
    try:
        for name, num_bytes, stream in members:
            size += num_bytes
            if size > max_bytes or len(names) >= MAX_FILES:
                raise _refuse(archive, f"unpacks to more than {max_bytes / 1e6:g} MB or {MAX_FILES} files")
            if name in names:
                raise _refuse(archive, f"holds {name!r} twice")
            names.add(_safe(archive, name))
            if wanted(name):
                _copy(stream, out / name, num_bytes, archive)
    except _DAMAGE as error:
        raise CompressError(str(archive), f"is a damaged archive ({error})", "download it again") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _refuse(archive, "holds a file and a folder of one name") from error
    return sorted(names)


def _zip_members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refuse(archive, f"holds {info.filename!r}, which is a link or a device")
            _safe(archive, info.filename)
            if not info.is_dir():
                with opened.open(info) as stream:
                    yield info.filename, info.file_size, stream


def _tar_members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    # a stream, so that an oversized member is refused at its header; unzipped apart, since tarfile misses a cut end
    with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as opened:
        for info in opened:
            _safe(archive, info.name)
            if not (info.isreg() or info.isdir()):
                raise _refuse(archive, f"holds {info.name!r}, which is a link or a device")
            if info.isreg():
                stream = opened.extractfile(info)
                assert stream is not None
                yield info.name, info.size, stream
        if len(unzipped.read(_MAX_TAIL)) == _MAX_TAIL:
            raise _refuse(archive, "goes on after its end")


def _safe(archive: Path, name: str) -> str:
    parts = PurePosixPath(name).parts
    foreign = "\\" in name or "\0" in name or PureWindowsPath(name).drive
    if not parts or name.startswith("/") or ".." in parts or foreign:
        raise _refuse(archive, f"holds the unsafe path {name!r}")
    return name


def _copy(stream: IO[bytes], file: Path, num_bytes: int, archive: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    if file.stat().st_size != num_bytes:
        raise CompressError(str(archive), f"is a damaged archive ({file.name} is cut short)", "download it again")


def _refuse(archive: Path, why: str) -> CompressError:
    return CompressError(str(archive), f"{why}: refused as unsafe", "tell its publisher, or use another source")
