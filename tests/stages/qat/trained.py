"""`qat` on a pico model; as `python trained.py FOLDER INPUT TEACHER [MODE]` it can be launched, and killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where it is launched, and not imported by pytest

from teaching import context

from compress.artifact import Metrics
from compress.stages.qat.stage import Qat
from compress.train.distributed import follow, leading
from compress.train.launch import is_follower

OPTIONS: dict[str, Any] = {
    "sequence_length": 16, "batch_size": 4, "tokens": 6 * 64, "eval_tokens": 96, "learning_rate": 1e-3, "eval_steps": 3,
    "scale_learning_rate": 1e-2, "precision": "fp32", "method": "rtn", "calibration_tokens": 64,
}  # fmt: skip


def qat(folder: Path, models: Mapping[str, Path], **options: Any) -> Metrics:
    """Run the stage; what it wrote is in `folder / "out"`."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    return Qat(**{**OPTIONS, **options}).run(context(folder, models))


def be_killed(mode: str) -> None:
    """Arrange to be killed with SIGKILL while the start, or the checkpoint of step 6, is being written."""
    save = torch.save

    def killed_while_saving(value: object, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        if Path(file).parent.name == "checkpoint-6" and Path(file).name == "optimizer.pt":
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def killed_before_renaming(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    if mode == "within":
        torch.save = killed_while_saving
    if mode == "start":
        Path.rename = killed_before_renaming  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if is_follower():
        follow()
    else:
        be_killed(sys.argv[4] if len(sys.argv) > 4 else "")
        with leading():
            qat(Path(sys.argv[1]), {"input": Path(sys.argv[2]), "teacher": Path(sys.argv[3])})
