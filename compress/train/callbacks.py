"""What watches a training: the guard against divergence, and progress with TensorBoard events."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compress.errors import StageFailed
from compress.stage import Progress
from compress.train.checkpoints import newest_complete, rotate

_WINDOW = 8
_WORSE = 5.0
_FLOOR = 1.0


class LossWatch:
    """Says when a sequence of losses diverges: the median of 8 steps is 5 times the lowest one so far, and above 1."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self.best = math.inf
        for loss in losses:
            self.diverges(loss)

    def diverges(self, loss: float) -> bool:
        """Take in the next loss; True where it is no number or the losses have run away."""
        if not math.isfinite(loss):
            return True
        self._recent.append(loss)
        if len(self._recent) < _WINDOW:
            return False
        middle = median(self._recent)
        self.best = min(self.best, middle)
        return middle > max(_FLOOR, _WORSE * self.best)


class DivergenceGuard(TrainerCallback):
    """Raises StageFailed, before the step's checkpoint is written, when loss or gradient are no numbers or run away.

    Needs `logging_steps=1`. The checkpoints of earlier steps stay where they are.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._watch = LossWatch()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the losses of the checkpoint."""
        self._watch = LossWatch([entry["loss"] for entry in state.log_history if "loss" in entry])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Look at one step's loss and gradient norm, or at an evaluation."""
        logs = logs or {}
        if "loss" in logs and self._watch.diverges(logs["loss"]):
            self._stop(state, "loss", logs["loss"])
        for name in ("grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                self._stop(state, name, logs[name])

    def _stop(self, state: TrainerState, name: str, value: float) -> None:
        kept = newest_complete(self._work)
        raise StageFailed(
            f"step {state.global_step} of {state.max_steps}",
            f"training diverged: {name} is {value:.4g}",
            "lower learning_rate or raise warmup_ratio; "
            + (f"the last good checkpoint is kept in {kept}" if kept else "no checkpoint had been written"),
        )


class Rotation(TrainerCallback):
    """Deletes the checkpoints in `work` that are neither the newest nor the best.

    Trainer's own rotation goes by modification times and by the path that the best one had when it was written: of a
    folder that was copied, or written on a machine with another clock, it deletes the newest.
    """

    def __init__(self, work: Path) -> None:
        self._work = work

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look through what there is, whoever wrote it."""
        if state.is_world_process_zero:
            rotate(self._work, state.best_global_step)


class Telemetry(TrainerCallback):
    """Moves the progress bar and writes TensorBoard events, from the main process only.

    A context: at its end the events are closed, whatever ends it.
    """

    def __init__(self, advance: Progress, events: Path) -> None:
        self._advance = advance
        self._events = events
        self._writer: Any = None
        self._threads_hook = threading.excepthook

    def __enter__(self) -> Self:
        threading.excepthook = self._hook
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        threading.excepthook = self._threads_hook
        if self._writer is not None:
            with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
                self._writer.close()

    def _hook(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of the writer's thread: it raises the same in ours at the next figure."""
        if not isinstance(failure.exc_value, OSError):
            self._threads_hook(failure)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the events, hiding those that a killed run wrote beyond the checkpoint."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._events), purge_step=state.global_step + 1)
            self._advance(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write every figure of the step."""
        if self._writer is not None:
            for name, value in (logs or {}).items():
                self._writer.add_scalar(name.replace("eval_", "eval/"), value, state.global_step)
            if "loss" in (logs or {}):
                self._advance(1, f"loss {(logs or {})['loss']:.4f}")
