"""The user's cache: what was fetched or converted once. An entry is there whole or not at all.

It lies where the platform keeps caches, or where the environment's COMPRESS_CACHE says. Deleting any of it is safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from compress.artifact import write_json
from compress.errors import CompressError, is_full_disk

VARIABLE = "COMPRESS_CACHE"
MANIFEST = "cache.json"

_RACY_NS = 2_000_000_000
"""A file changed this recently may change again within one tick of its file system's clock: not memoised."""


def cache_root() -> Path:
    """The cache's directory; it need not exist. Raises CompressError where there is no home to put it in."""
    try:
        named = os.environ.get(VARIABLE) or platformdirs.user_cache_dir("compress-pipeline", appauthor=False)
        return Path(named).expanduser()
    except RuntimeError as error:
        what = "there is no home directory to keep the cache in"
        raise CompressError(VARIABLE, what, "set it to a folder") from error


def entry_path(kind: str, identity: str) -> Path:
    """Where the entry for `identity` lies, whether it is there or not."""
    return cache_root() / kind / hashlib.sha256(identity.encode()).hexdigest()[:32]


def finished(entry: Path) -> dict[str, Any] | None:
    """The facts that were stored with a finished, undamaged entry; None for any other."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text("utf-8"))
        for name, (size, mtime_ns, sha256) in manifest["files"].items():
            status = (entry / name).stat()
            unchanged = status.st_size == size and status.st_mtime_ns == mtime_ns
            if not unchanged and (status.st_size != size or file_sha256(entry / name) != sha256):
                return None
        facts: dict[str, Any] = manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts


def ensure(kind: str, identity: str, build: Callable[[Path], Mapping[str, Any]]) -> Path:
    """The finished entry for `identity`, which `build` writes into an empty directory where it is not there yet.

    `build` returns facts to store beside it. Processes that want one entry wait for the first. A build that fails or
    is killed leaves nothing that is taken for an entry. Raises CompressError for a full or unwritable disk.
    """
    entry = entry_path(kind, identity)
    if finished(entry) is not None:
        return entry
    with _locked(entry):
        if finished(entry) is None:
            try:
                _build(entry, build)
            except (OSError, SafetensorError) as error:
                raise _disk_problem(error) or error from error
    return entry


def file_sha256(file: Path) -> str:
    """SHA-256 (hex) of a file. Remembered as long as its size, times and inode stay as they were."""
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    memo = entry_path("digests", str(file.resolve())).with_suffix(".json")
    remembered = recall(memo)
    if remembered is not None and remembered[:-1] == stamp:
        return str(remembered[-1])
    sha256 = _sha256(file)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_NS:
        remember(memo, [*stamp, sha256])
    return sha256


def recall(memo: Path) -> Any:
    """What was remembered; None where nothing was."""
    try:
        return json.loads(memo.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def remember(memo: Path, value: object) -> None:
    """Store a value that can be computed again; does nothing where the cache can't be written."""
    own = memo.with_name(f"{memo.name}.{os.getpid()}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(own, value)
        own.replace(memo)
    except OSError:
        with contextlib.suppress(OSError):
            own.unlink()


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Hold an entry for this process alone."""
    lock = FileLock(entry.with_name(entry.name + ".lock"))
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter of a file system that has no locks
        raise _disk_problem(error) or _unwritable(getattr(error, "strerror", None) or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _build(entry: Path, build: Callable[[Path], Mapping[str, Any]]) -> None:
    unfinished = entry.with_name(entry.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed: this one holds the lock
    unfinished.mkdir()
    try:
        facts = build(unfinished)
        files = {
            file.relative_to(unfinished).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns, _sha256(file))
            for file in sorted(unfinished.rglob("*"))
            if file.is_file()
        }
        write_json(unfinished / MANIFEST, {"facts": dict(facts), "files": files})
        shutil.rmtree(entry, ignore_errors=True)
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _disk_problem(error: Exception) -> CompressError | None:
    if is_full_disk(error):
        return CompressError(str(cache_root()), "no space is left in the cache", f"free some, or set {VARIABLE}")
    unwritable = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
    if isinstance(error, OSError) and error.errno in unwritable:
        return _unwritable(error.strerror)
    return None


def _unwritable(why: str | None) -> CompressError:
    what = f"the cache can't be written ({why})"
    return CompressError(str(cache_root()), what, f"set {VARIABLE} to a place that can")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

