"""Whether an artifact is what a record says: the structure exactly, numbers within what CPUs differ by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from golden.recording import unpacked

TOLERANCE = 1e-3
"""Of a tensor's spread, and of a figure."""
ROUNDED = 0.1
"""The same of what is computed with codes: one that is rounded otherwise moves all of it."""
FLIPPED = 0.01
"""The share of the codes of a tensor that may be others."""
_NUMBERS = ("figures", "json", "outputs")
"""What is computed with a model."""


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs in the record of a case, by its place there."""
    yield from _of_names(was, now, "")
    computed = ROUNDED if was.get("has_codes") else TOLERANCE
    for name in (name for name in was if name in now):
        if name == "codes":
            yield from _of_names(was[name], now[name], name)
            for each in (each for each in was[name] if each in now[name]):
                yield from _of_whole(was[name][each], now[name][each], f"{name}.{each}")
        else:
            yield from _of_value(was[name], now[name], name, computed if name in _NUMBERS else 0.0)


def _of_value(was: Any, now: Any, path: str, tolerance: float) -> Iterator[str]:
    """tolerance: of a figure, as a share of it, 0 where it must be equal; of a tensor's spread TOLERANCE at least."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        if "spread" in was and "spread" in now:
            yield from _of_floats(was, now, path, max(tolerance, TOLERANCE))
        elif "counts" in was and "counts" in now:
            yield from _of_codes(was, now, path)
        else:
            yield from _of_names(was, now, path)
            for name in (name for name in was if name in now):
                yield from _of_value(was[name], now[name], f"{path}.{name}", tolerance)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _of_value(one, other, f"{path}[{index}]", tolerance)
    elif not _is_same(was, now, tolerance):
        yield f"{path}: was {was!r}, is {now!r}"


def _of_names(was: Mapping[str, Any], now: Mapping[str, Any], path: str) -> Iterator[str]:
    for names, what in ((was.keys() - now.keys(), "is missing"), (now.keys() - was.keys(), "is new")):
        yield from (f"{path}.{name} {what}".lstrip(".") for name in sorted(names))


def _is_same(was: Any, now: Any, tolerance: float) -> bool:
    if tolerance and isinstance(was, float) and isinstance(now, (float, int)):
        return math.isclose(was, now, rel_tol=tolerance, abs_tol=tolerance**2) or (math.isnan(was) and math.isnan(now))
    return type(was) is type(now) and bool(was == now)


def _of_floats(was: Mapping[str, Any], now: Mapping[str, Any], path: str, tolerance: float) -> Iterator[str]:
    if (was["dtype"], was["shape"]) != (now["dtype"], now["shape"]):
        yield f"{path}: was {was['dtype']} {was['shape']}, is {now['dtype']} {now['shape']}"
        return
    for name in ("rms", "samples"):
        change = np.abs(np.subtract(now[name], was[name])).max() / max(was["spread"], 1e-12)
        if not change <= tolerance:
            yield f"{path}.{name}: moved by {change:.2g} of the spread"


def _of_codes(was: Mapping[str, Any], now: Mapping[str, Any], path: str) -> Iterator[str]:
    kinds = [[each[name] for name in ("dtype", "shape", "least", "greatest")] for each in (was, now)]
    if kinds[0] != kinds[1]:
        yield f"{path}: was {kinds[0]}, is {kinds[1]}"
        return
    moved = np.abs(np.subtract(now["counts"], was["counts"])).sum() / 2 / sum(was["counts"])
    if not moved <= FLIPPED:
        yield f"{path}: {moved:.1%} of the codes are others"


def _of_whole(was: str, now: str, path: str) -> Iterator[str]:
    one, other = unpacked(was), unpacked(now)
    flipped = 1.0 if one.shape != other.shape else float((one != other).mean())
    if flipped > FLIPPED:
        yield f"{path}: {flipped:.1%} of the codes are others"
