"""Finding the checkpoint that a killed training goes on from.

`transformers.Trainer` writes a checkpoint in place: weights, optimiser, scheduler, random state, and last
`trainer_state.json`. It also deletes old ones in place, so that a kill can leave a part of either kind.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
_PREFIX = "checkpoint-"


def checkpoint_folder(work: Path, step: int) -> Path:
    """Where the checkpoint of optimiser step `step` lies."""
    return work / f"{_PREFIX}{step}"


def newest_complete(work: Path, num_processes: int = 1) -> Path | None:
    """The complete checkpoint of the highest step in `work`, or None."""
    folders = [folder for folder in work.glob(f"{_PREFIX}*") if is_complete(folder, num_processes)]
    return max(folders, key=_step, default=None)


def remove_incomplete(work: Path, num_processes: int = 1) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for folder in work.glob(f"{_PREFIX}*"):
        if not is_complete(folder, num_processes):
            shutil.rmtree(folder)


def is_complete(folder: Path, num_processes: int = 1) -> bool:
    """Whether everything that resuming reads is there and whole."""
    random_states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    return (
        read_state(folder) is not None
        and all(zipfile.is_zipfile(folder / name) for name in ("optimizer.pt", "scheduler.pt", *random_states))
        and _is_whole_safetensors(folder / WEIGHTS)
    )


def read_state(folder: Path) -> dict[str, Any] | None:
    """`trainer_state.json` of a checkpoint, or None where it is missing or cut off."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def _is_whole_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))
