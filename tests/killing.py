"""Work that is killed right after one of its units was stored, and goes on, in the test's own process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from compress.stage import Reporter
from compress.units import DONE

Result = TypeVar("Result")


class Killed(BaseException):
    """Passes through every `except Exception`."""


class _Killer(logging.Handler):
    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.after, self.units = after, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == DONE:
            self.units.append(record.getMessage())
            if len(self.units) == self.after:
                raise Killed


def killed(work: Callable[[Reporter], Result], *after: int) -> tuple[Result, list[str]]:
    """What `work` makes when it is killed after so many units, each time anew, and then left alone; all units' lines.

    `work` begins with nothing in memory.
    """
    log, lines = logging.Logger("killed", logging.INFO), list[str]()
    for moment in (*after, None):
        log.handlers = [killer := _Killer(moment)]
        try:
            result = work(Reporter(log))
        except Killed:
            assert moment is not None
        else:
            assert moment is None, f"there were no {moment} units left"
        lines += killer.units
    return result, lines
