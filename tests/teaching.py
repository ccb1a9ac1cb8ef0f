"""Where a stage that trains towards a teacher runs: what tests, and the processes that they launch or kill, share."""

from __future__ import annotations

import pydoc_data.topics as topics
from collections.abc import Mapping
from pathlib import Path

from compress.artifact import Artifact
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.stage import StageContext, Target


def text_data(folder: Path) -> TextData:
    """A few of the interpreter's own topics, the last of them held out."""
    files = {"train": list(topics.topics.values())[:8], "eval": list(topics.topics.values())[30:32]}
    for split, texts in files.items():
        (folder / f"{split}.txt").write_text("\n".join(texts))
    return TextData(DataConfig(train=str(folder / "train.txt"), eval=str(folder / "eval.txt")))


def context(folder: Path, models: Mapping[str, Path]) -> StageContext:
    """Where a stage runs, in `folder`, with `models` by role."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    inputs = {role: Artifact(path, "torch", "source", role) for role, path in models.items()}
    return StageContext(folder / "out", folder / "work", inputs, text_data(folder), seed=0, target=Target())
