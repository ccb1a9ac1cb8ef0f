"""Stages by name, from the `compress.stages` entry points of whatever is installed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from compress.stage import Stage

GROUP = "compress.stages"


def stage_names() -> tuple[str, ...]:
    """The names of all installed stages, sorted."""
    return tuple(sorted(_points()))


def stage_class(name: str) -> type[Stage]:
    """The class of the stage called `name`. Raises KeyError where there is none."""
    return _load(_points()[name])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt word: `did you mean 'keep'?`, or the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@cache
def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def _load(point: EntryPoint) -> type[Stage]:
    loaded: type[Stage] = point.load()
    return loaded
