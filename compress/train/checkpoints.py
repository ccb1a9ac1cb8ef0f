"""Finding the checkpoint that a killed training goes on from, and keeping those that are needed.

`transformers.Trainer` writes a checkpoint in place: weights, optimiser, scheduler, random states, and last
`trainer_state.json`; `rotate` deletes that first. So a folder without a whole one is what a kill left of a checkpoint
that was being written or deleted. Every other one is somebody's hours of training, and is never deleted for a fault.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
_PREFIX = "checkpoint-"
_ASIDE = "damaged-"


def checkpoint_folder(work: Path, step: int) -> Path:
    """Where the checkpoint of optimiser step `step` lies."""
    return work / f"{_PREFIX}{step}"


def newest_complete(work: Path) -> Path | None:
    """The complete checkpoint of the highest step in `work`, or None."""
    return next((folder for folder in _checkpoints(work) if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """Whether everything that resuming can't do without is there and whole."""
    return (
        read_state(folder) is not None
        and all(_is_whole_zip(folder / name) for name in ("optimizer.pt", "scheduler.pt"))
        and _is_whole_safetensors(folder / WEIGHTS)
    )


def remove_incomplete(work: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for folder in _checkpoints(work):
        if read_state(folder) is None:
            shutil.rmtree(folder)


def set_aside_damaged(work: Path) -> Iterator[Path]:
    """Rename checkpoints whose state is whole and other parts are not, so that nothing is written over them.

    Yields where they are then.
    """
    for folder in _checkpoints(work):
        if not is_complete(folder):
            names = (f"{_ASIDE}{number}-{folder.name}" for number in range(1, 1_000_000))
            yield folder.rename(next(work / name for name in names if not (work / name).exists()))


def has_random_states(folder: Path, num_processes: int) -> bool:
    """Whether a checkpoint keeps the random states, whole, of so many processes and of no others."""
    wanted = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    found = {file.name for file in folder.glob("rng_state*.pth")}
    return found == set(wanted) and all(_is_whole_zip(folder / name) for name in wanted)


def rotate(work: Path, best_step: int | None) -> None:
    """Keep the newest checkpoint, by its step and not by a clock, and the best one, or the newest two."""
    older = _checkpoints(work)[1:]
    for folder in sorted(older, key=lambda folder: _step(folder) != best_step)[1:]:
        (folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any] | None:
    """`trainer_state.json` of a checkpoint, or None where it is missing or cut off."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def _checkpoints(work: Path) -> list[Path]:
    """The folders of checkpoints, the newest first."""
    folders = (folder for folder in work.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdecimal())
    return sorted(folders, key=_step, reverse=True)


def _is_whole_zip(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


def _is_whole_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))
