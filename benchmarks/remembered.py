"""A model whose answers are kept on disk, so that many others can be held against it at the cost of one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compress.benchmarks.quality import Floats, Ints
from compress.benchmarks.scorers import Rows, Scorer


class Remembered:
    """Answers as the scorer that `open` returns, which is opened when it is first needed; one file in `folder` each.

    The folder belongs to one model: 200 kB a token of a vocabulary of 50k.
    """

    def __init__(self, folder: Path, open: Callable[[], Scorer]) -> None:
        self._folder, self._open = folder, open
        self._scorer: Scorer | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, ids_T: Ints, rows: Rows = slice(None)) -> Floats:
        question = f"{np.asarray(ids_T).tolist()} {np.arange(len(ids_T))[rows].tolist()}"
        file = self._folder / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.npy"
        if not file.exists():
            self._scorer = self._scorer or self._open()
            part = file.with_suffix(".part.npy")
            np.save(part, self._scorer(ids_T, rows))
            part.replace(file)
        answer: Floats = np.load(file, mmap_mode="r")
        return answer
