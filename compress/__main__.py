"""The command, as a script and as `python -m compress`: from its first instant on, Ctrl-C is told in one line."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line and exit.

    What it imports takes a while, and an exception in the midst of that can become any other: a signal ends the
    process at once. Nothing is begun by then.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a shell's background jobs
            signal.signal(number, _leave)
    from compress.cli.main import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
