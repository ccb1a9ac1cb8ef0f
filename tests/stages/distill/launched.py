"""`distill` on a pico model, in one process or, as `torchrun launched.py …`, in several."""

from __future__ import annotations

import pydoc_data.topics as topics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.artifact import Artifact, Metrics
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.stage import StageContext, Target
from compress.stages.distill.stage import Distill
from compress.train.distributed import follow, is_follower, release

OPTIONS: dict[str, Any] = {
    "sequence_length": 16, "batch_size": 4, "tokens": 6 * 64, "eval_tokens": 96, "learning_rate": 3e-3, "eval_steps": 3,
    "precision": "fp32",
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


def distil(folder: Path, models: Mapping[str, Path], **options: Any) -> Metrics:
    """Run the stage; what it wrote is in `folder / "out"`."""
    torch.set_num_threads(1)
    return Distill(**{**OPTIONS, **options}).run(context(folder, models))


if __name__ == "__main__":
    if is_follower():
        follow()
    else:
        distil(Path(sys.argv[1]), {"input": Path(sys.argv[2]), "teacher": Path(sys.argv[3])})
        release()
