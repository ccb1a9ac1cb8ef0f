"""Where a run's words go: everything to `run.log`, what the user should see to stderr, Ctrl-C and SIGTERM as one."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

LOG = "run.log"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _LogFile(logging.FileHandler):
    """A file that can't be written to is no news: what can't either says so itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""


@contextlib.contextmanager
def logged(run_dir: Path) -> Iterator[None]:
    """Append all log records from INFO up, and Python's warnings, to `run_dir/run.log`."""
    root = logging.getLogger()
    handler = _LogFile(run_dir / LOG, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end what is running as Ctrl-C does: KeyboardInterrupt, so that what is half
    done is recorded and no child is left. A signal that is ignored, as in a shell's background job, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
