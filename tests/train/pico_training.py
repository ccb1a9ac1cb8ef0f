"""One short training of a pico student towards a pico teacher, for tests and for the processes that they start."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.models.load import load_model
from compress.stage import Reporter
from compress.train.engine import Outcome, recover
from compress.train.options import TrainingOptions

LENGTH = 16
STEPS = 8
BASE: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_size": 4, "tokens": STEPS * 4 * LENGTH, "eval_steps": 2, "learning_rate": 3e-3,
    "precision": "fp32",
}  # fmt: skip


def blocks(num_blocks: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(1, 500, (num_blocks, LENGTH))


def train(student: Path, teacher: Path | None, work: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Outcome]:
    """The student's weights after training, and the outcome."""
    torch.set_num_threads(1)
    model = load_model(student)
    outcome = recover(
        model, load_model(teacher) if teacher else None, blocks(20), blocks(6, seed=1),
        TrainingOptions(**{**BASE, **options}), [(1, 1), (4, 4)], work, 0, Reporter(),
    )  # fmt: skip
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, outcome


def main(mode: str, student: str, teacher: str, work: str) -> None:
    """Train, and be killed with SIGKILL: after checkpoint 4, or while checkpoint 6 is being written."""
    save = torch.save

    def killed_while_saving(value: object, file: Any, *args: Any, **kwargs: Any) -> None:
        step = int(Path(file).parent.name.removeprefix("checkpoint-"))
        if mode == "between" and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, file, *args, **kwargs)
        if mode == "within" and step == 6 and Path(file).name == "optimizer.pt":
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed_while_saving
    train(Path(student), Path(teacher), Path(work))


if __name__ == "__main__":
    main(*sys.argv[1:])
