"""`transformers.Trainer` as every training here needs it: it can be killed at any time, and wastes no step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from compress.errors import StageFailed
from compress.stage import Reporter
from compress.train.callbacks import DivergenceGuard, Rotation, Telemetry
from compress.train.checkpoints import (
    STATE,
    WEIGHTS,
    has_random_states,
    newest_complete,
    read_state,
    remove_incomplete,
    set_aside_damaged,
)
from compress.train.distributed import agreed
from compress.train.launch import num_processes
from compress.train.options import StepOptions
from compress.train.precision import uses_bf16

EVENTS = "tensorboard"
"""The folder of TensorBoard events inside `work`."""


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints can be gone on from, and whose first step already has a learning rate."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's schedule one step on: its own first step has the learning rate 0, which a short training feels."""
        schedule: Any = super().create_scheduler(num_training_steps + 1, optimizer)
        factor = schedule.lr_lambdas[0]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(schedule.optimizer, lambda step: factor(step + 1))
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint's weights under the names that they have in memory.

        `save_pretrained` gives some of them their old names (GPT-NeoX's head), which Trainer, when it resumes, takes
        for missing and silently leaves as they were.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process's, before the first one says, in `trainer_state.json`, that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Those of as many processes as there are now, or none."""
        if checkpoint is not None and has_random_states(Path(checkpoint), num_processes()):
            super()._load_rng_state(checkpoint)


def optimizer_with_rates(
    arguments: TrainingArguments, parameters: Iterable[tuple[nn.Parameter, float]]
) -> tuple[Any, dict[str, Any]]:
    """Trainer's `optimizer_cls_and_kwargs` for parameters that each have a learning rate; only matrices decay.

    What Trainer logs as the learning rate is the highest.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in parameters:
        groups.setdefault((rate, arguments.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    ordered = sorted(groups, reverse=True)
    settings["params"] = [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in ordered]
    return optimizer, settings


def step_arguments(options: StepOptions, work: Path, seed: int, accumulation_steps: int = 1) -> dict[str, Any]:
    """`options` in TrainingArguments' words. The blocks come in their own order, just enough for one epoch.

    Raises StageFailed where a step can't be divided among the processes.
    """
    for problem in options.indivisible():
        raise StageFailed(problem.where, problem.what, problem.fix)
    return {
        "output_dir": str(work),
        "max_steps": options.num_steps,
        "per_device_train_batch_size": options.batch_size // options.num_parts,
        "gradient_accumulation_steps": accumulation_steps,
        "learning_rate": options.learning_rate,
        "warmup_steps": math.ceil(options.num_steps * options.warmup_ratio),
        "lr_scheduler_type": options.lr_scheduler_type,
        "weight_decay": options.weight_decay,
        "optim": {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}[options.optim],
        "bf16": agreed(partial(uses_bf16, options.precision)),
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def train(
    trainer: ResumableTrainer, callbacks: Sequence[TrainerCallback], what: str, work: Path, reporter: Reporter
) -> TrainerState:
    """Train from the newest complete checkpoint in `work` to the end, unless that checkpoint is the end.

    It may be another number of processes' checkpoint: each step has the same sequences, however they are divided.
    Raises StageFailed where the loss diverges.
    """
    checkpoint = agreed(partial(_start, what, work, reporter))
    if checkpoint and _is_last(checkpoint):
        return cast(TrainerState, TrainerState.load_from_json(str(checkpoint / STATE)))
    trainer.args.eval_on_start = checkpoint is None and trainer.eval_dataset is not None
    trainer.remove_callback(PrinterCallback)
    with reporter.progress(what, trainer.args.max_steps) as advance, Telemetry(advance, work / EVENTS) as telemetry:
        for callback in (DivergenceGuard(work), Rotation(work), telemetry, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state


def _start(what: str, work: Path, reporter: Reporter) -> Path | None:
    """The checkpoint to go on from, in a folder that is tidy then; what can't be used is told."""
    remove_incomplete(work)
    for aside in set_aside_damaged(work):
        reporter.log.warning("%s: a checkpoint is damaged: passed over, and kept as %s", what, aside)
    checkpoint = newest_complete(work)
    if checkpoint is None or _is_last(checkpoint):
        return checkpoint
    reporter.log.info("%s: going on from %s", what, checkpoint.name)
    if not has_random_states(checkpoint, num_processes()):
        reporter.log.warning(
            "%s: %s has no random state for %d process%s (another number of them wrote it, or it is damaged): going on "
            "without it, and what is drawn at random, as in dropout, is another draw", what, checkpoint.name,
            num_processes(), "es" if num_processes() > 1 else "",
        )  # fmt: skip
    return checkpoint


def _is_last(checkpoint: Path) -> bool:
    """Whether training was over when this was written: all steps done, or stopped early."""
    state = read_state(checkpoint) or {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop"))
