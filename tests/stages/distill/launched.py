"""`distill` on a pico model, in one process or, as `torchrun launched.py …`, in several."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where it is launched, and not imported by pytest

from teaching import context

from compress.artifact import Metrics
from compress.stages.distill.stage import Distill
from compress.train.distributed import follow, leading
from compress.train.launch import is_follower

OPTIONS: dict[str, Any] = {
    "sequence_length": 16, "batch_size": 4, "tokens": 6 * 64, "eval_tokens": 96, "learning_rate": 3e-3, "eval_steps": 3,
    "precision": "fp32",
}  # fmt: skip


def distil(folder: Path, models: Mapping[str, Path], **options: Any) -> Metrics:
    """Run the stage; what it wrote is in `folder / "out"`."""
    torch.set_num_threads(1)
    return Distill(**{**OPTIONS, **options}).run(context(folder, models))


if __name__ == "__main__":
    if is_follower():
        follow()
    else:
        with leading():
            for folder in sys.argv[3:]:
                distil(Path(folder), {"input": Path(sys.argv[1]), "teacher": Path(sys.argv[2])})
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    if any("gloo" in thread for thread in threads):
        sys.exit(f"the process group outlives its end: {threads}")
