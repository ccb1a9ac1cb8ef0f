"""`qat` on a pico model; as `python trained.py FOLDER INPUT TEACHER [MODE]` it can be launched, and killed."""

from __future__ import annotations

import os
import pydoc_data.topics as topics
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.artifact import Artifact, Metrics
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.stage import StageContext, Target
from compress.stages.qat.stage import Qat
from compress.train.distributed import follow, is_follower, release

OPTIONS: dict[str, Any] = {
    "sequence_length": 16, "batch_size": 4, "tokens": 6 * 64, "eval_tokens": 96, "learning_rate": 1e-3, "eval_steps": 3,
    "scale_learning_rate": 1e-2, "precision": "fp32", "method": "rtn", "calibration_tokens": 64,
}  # fmt: skip


def text_data(folder: Path) -> TextData:
    """A few of the interpreter's own topics, the last of them held out."""
    files = {"train": list(topics.topics.values())[:8], "eval": list(topics.topics.values())[30:32]}
    for split, texts in files.items():
        (folder / f"{split}.txt").write_text("\n".join(texts))
    return TextData(DataConfig(train=str(folder / "train.txt"), eval=str(folder / "eval.txt")))


def context(folder: Path, models: Mapping[str, Path]) -> StageContext:
    """Where a stage runs, in `folder`, with `models` by role."""
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    inputs = {role: Artifact(path, "torch", "source", role) for role, path in models.items()}
    return StageContext(folder / "out", folder / "work", inputs, text_data(folder), seed=0, target=Target())


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
        qat(Path(sys.argv[1]), {"input": Path(sys.argv[2]), "teacher": Path(sys.argv[3])})
        release()
