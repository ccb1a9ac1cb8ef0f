"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from compress.errors import InvalidInput

LOCK = ".lock"
_TRIES, _PAUSE_SECONDS = 5, 0.05
"""Who only looks whether a run is in progress holds the lock for a moment."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`, made where it is missing. The kernel lets go of it when the process ends, however it ends.

    Raises InvalidInput where another process holds it, or where it can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidInput(
            str(run_dir), f"can't write the run directory: {error.strerror}", "choose another with --runs"
        ) from error
    try:
        try:
            _take(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise InvalidInput(
                str(run_dir), f"another run is in it (process {holder})", "wait for it, or stop it first"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether a process holds `run_dir` now."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int) -> None:
    """Lock the file for this process alone. Raises BlockingIOError where another one keeps it."""
    for left in reversed(range(_TRIES)):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_PAUSE_SECONDS)
