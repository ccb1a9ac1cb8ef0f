"""`convert-attention` on a pico model, for the tests and for the processes that they start."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.artifact import Artifact, Metrics
from compress.stage import StageContext, Target
from compress.stages.convert import conversion
from compress.stages.convert.stage import ConvertAttention
from compress.train.distributed import follow, leading
from compress.train.launch import is_follower

LENGTH = 16
ALIGN: dict[str, Any] = {"tokens": 8 * 2 * LENGTH, "sequence_length": LENGTH, "precision": "fp32"}
DISTILL: dict[str, Any] = {
    "tokens": 8 * 2 * LENGTH, "sequence_length": LENGTH, "batch_size": 2, "eval_tokens": 64, "precision": "fp32",
}  # fmt: skip
BASE: dict[str, Any] = {
    "to": "linear", "align": ALIGN, "distill": None, "select_tokens": 64, "kl_tokens": 2 * 2 * LENGTH,
}  # fmt: skip


class RandomTokens:
    """Stands for a pipeline's text: random tokens, others for each split."""

    def blocks(self, split: str, tokenizer: Any, sequence_length: int, max_tokens: int | None = None) -> Any:
        num_blocks = min(4096, max_tokens or 4096) // sequence_length
        generator = np.random.default_rng(["train", "eval"].index(split))
        return generator.integers(1, 500, (num_blocks, sequence_length))


def context(folder: Path, source: Path, teacher: Path | None = None, seed: int = 0) -> StageContext:
    """Where the stage runs, in `folder`."""
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    models = {"input": source, "teacher": teacher or source}
    inputs = {role: Artifact(path, "torch", "source", role) for role, path in models.items()}
    return StageContext(
        folder / "out",
        folder / "work",
        inputs,
        RandomTokens(),
        seed,
        Target(),  # type: ignore[arg-type]
    )


def convert(folder: Path, source: Path, teacher: Path | None = None, seed: int = 0, **options: Any) -> Metrics:
    """Run the stage; what it wrote is in `folder / "out"`."""
    torch.set_num_threads(1)
    return ConvertAttention.model_validate({**BASE, **options}).run(context(folder, source, teacher, seed))


def main(mode: str, folder: str, source: str, options: str) -> None:
    """Convert. Where a training is named `mode`, be killed by SIGKILL while its checkpoint of step 6 is written."""
    save = torch.save

    def killed_while_saving(value: object, file: Any, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(file).parent
        if (checkpoint.parent.name, checkpoint.name) == (mode, "checkpoint-6"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, file, *args, **kwargs)

    torch.save = killed_while_saving
    convert(Path(folder), Path(source), **json.loads(options))


if __name__ == "__main__":
    if is_follower():  # it is told which layers to convert
        del conversion.proxy_scores
        follow()
    else:
        with leading():
            main(*sys.argv[1:])
