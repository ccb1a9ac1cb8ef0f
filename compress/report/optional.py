"""What only shows what was found: where it can't be made, that is a warning, and what was found still stands."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

_Given = ParamSpec("_Given")
_log = logging.getLogger("compress")


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Go on with a warning, the traceback in the log, where what is done inside fails for whatever reason.

    what: the report or the plot that is missing then.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  (hours of work are not to end for a picture of them)
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        _log.warning("warning: %s can't be written (%s)", what, why)
        _log.info("%s", what, exc_info=error)  # the log has the traceback, the screen has not


def drawing(draw: Callable[_Given, None]) -> Callable[_Given, None]:
    """Make a function that draws a plot to the file that is its last argument optional; half a file is removed."""

    @functools.wraps(draw)
    def drawn(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        file = [*args, *kwargs.values()][-1]
        assert isinstance(file, Path)
        with optional(f"the plot {file}"):
            try:
                draw(*args, **kwargs)
            except BaseException:
                with contextlib.suppress(OSError):
                    file.unlink()
                raise

    return drawn
