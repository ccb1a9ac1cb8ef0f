"""What the user sees: results on stdout, progress and problems on stderr, bars only on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, InvalidInput, Problem
from compress.stage import Progress, Reporter
from compress.units import DONE

if TYPE_CHECKING:
    from rich.console import Console

    from compress.report.tables import Table


def print_json(value: object) -> None:
    """A result for programs. What is no number (the standard error of one block) is null: JSON has no word for it."""
    print(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def print_table(table: Table) -> None:
    """A result for people. On a narrow terminal cells are wrapped, and no figure is cut."""
    from rich import box
    from rich.table import Table as RichTable

    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        words = [word for row in table.rows for word in row[index].split()]
        shown.add_column(
            column, justify="right" if index >= table.num_words else "left", overflow="fold",
            min_width=max(map(len, words), default=0),
            no_wrap=not index and len(words) <= len(table.rows),
        )  # fmt: skip
    for row in table.rows:
        shown.add_row(*row)
    if table.title:
        print_line(table.title)
    _stdout().print(shown, crop=False)
    if table.note:
        print_line(table.note)


def print_line(text: str, style: str | None = None) -> None:
    """A line of a result."""
    _stdout().print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_problem(error: CompressError) -> None:
    """What went wrong, on stderr, a line for each problem."""
    print_notes(error.problems if isinstance(error, InvalidInput) else (error.problem,), "error")


def print_notes(problems: Iterable[Problem], word: str = "note") -> None:
    """What is worth knowing, on stderr, a line each. word: what the lines begin with."""
    for problem in problems:
        print(f"{word}: {problem}", file=sys.stderr)


@contextlib.contextmanager
def reporting() -> Iterator[Reporter]:
    """A reporter whose log goes to stderr, a line at a time, and that has bars where stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    log = logging.getLogger("compress")
    handler = _Lines(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield Reporter(log, _Bars(console).bar if console.is_terminal else None)
    finally:
        log.removeHandler(handler)


class _Lines(logging.Handler):
    """Log records as lines. What ended the run is told once, by whoever ends the process; units are told by bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info and record.msg != DONE:
            self._console.print(record.getMessage(), markup=False, soft_wrap=True)


class _Bars:
    """Progress bars with the time that is left; a bar within a bar is shown below it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._depth = 0
        self._progress = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left:"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console, transient=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Progress]:
        if self._depth == 0:
            self._progress.start()
        self._depth += 1
        task = self._progress.add_task(what, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            self._progress.update(task, advance=steps, note=note)

        try:
            yield advance
        finally:
            self._progress.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                self._progress.stop()


def _stdout() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
