"""Why a stage is to be computed: how its ingredients differ from those of the newest artifact of it that is there."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST, Artifact, read_artifact
from compress.errors import CompressError
from compress.runner.key import Ingredients
from compress.runner.plan import Plan, Step, stage_directories

UNTOLD = "made before artifacts said what they are made of: what changed can't be told"


@dataclass(frozen=True)
class News:
    """What made a step new, in words, one entry an ingredient, and the directory of the artifact that it was held
    against; None, and no words, where there was none."""

    changes: tuple[str, ...] = ()
    earlier: str | None = None

    def __str__(self) -> str:
        return "; ".join(self.changes)


def news_of(plan: Plan, step: Step) -> News:
    """What made `step`, which has no finished artifact, new.

    It is held against the newest finished artifact of the same id, or else of the same stage, that no other step of the
    plan uses. A step that was begun with these very ingredients, or finished and undone, is not new.
    """
    if step.directory.exists():
        return News()
    used = {other.directory for other in plan.steps}
    found = [each for each in _finished(plan.run_dir, used) if each.stage == step.stage.name]
    own = [artifact for artifact in found if artifact.id == step.id] or found
    if not own:
        return News()
    newest = max(own, key=lambda artifact: (artifact.path / MANIFEST).stat().st_mtime_ns)
    changes = tuple(differences(newest.ingredients, step)) if newest.ingredients else (UNTOLD,)
    return News(changes, newest.path.name)


def differences(before: Ingredients, step: Step) -> Iterator[str]:
    """How the ingredients of `step` differ from others of the same stage, in words."""
    now, inputs = step.ingredients, step.node.inputs
    for kind in sorted(before.keys() | now.keys(), key=_order):
        old, new = before.get(kind), now.get(kind)
        if isinstance(old, Mapping | None) and isinstance(new, Mapping | None):
            for name, pair in _changed(_flat(old or {}), _flat(new or {})).items():
                yield _words(kind, name, *pair, inputs)
        elif old != new:
            yield _words("", kind, old, new, inputs)


def _finished(run_dir: Path, but: Collection[Path]) -> Iterator[Artifact]:
    for directory in stage_directories(run_dir):
        if directory not in but:
            with contextlib.suppress(CompressError):  # unfinished or damaged: there is nothing to hold against
                yield read_artifact(directory)


_KINDS = ("version", "libraries", "options", "text", "seed", "target", "machine", "inputs")


def _order(kind: str) -> tuple[int, str]:
    """What was changed by hand before what follows from it."""
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)


def _flat(group: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Groups within groups by dotted names."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        is_group = isinstance(value, Mapping) and value
        found |= _flat(value, f"{above}{name}.") if is_group else {f"{above}{name}": value}
    return found


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _words(kind: str, name: str, old: Any, new: Any, inputs: Mapping[str, str]) -> str:
    if kind == "inputs":
        id = inputs.get(name, "")
        is_named = id.startswith(f"{name}:")  # another model: its id says what it is for
        return f"{id if is_named else f'{name} {id}'} is new" if id else f"reads no {name} any more"
    if kind == "text":
        return f"text of {name} " + ("is read now" if old is None else "is not read" if new is None else "changed")
    if name == "flags":
        lost, gained = sorted(set(old or ()) - set(new or ())), sorted(set(new or ()) - set(old or ()))
        return "CPU instructions " + " ".join([*(f"+{flag}" for flag in gained), *(f"-{flag}" for flag in lost)])
    shown = {"options": f"option {name}", "target": f"target {name}"}.get(kind, name)
    return f"{shown} {_value(old)} → {_value(new)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "off" if value is None else str(value) or "none"
