"""The recovery engine: trains a student towards a teacher, resumably, and leaves it with its best weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from compress.errors import StageFailed
from compress.stage import Reporter
from compress.train.callbacks import DivergenceGuard, Telemetry
from compress.train.checkpoints import STATE, WEIGHTS, checkpoint_folder, newest_complete, read_state, remove_incomplete
from compress.train.distributed import is_follower, num_processes
from compress.train.options import TrainingOptions
from compress.train.trainer import Blocks, Objective, RecoveryTrainer

EVENTS = "tensorboard"
"""The folder of TensorBoard events inside `work`."""
START = "start.safetensors"
"""The student's weights before the first step, inside `work`."""

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Outcome:
    """What a training did: tokens trained on, the step whose weights the student has now, Trainer's log of all."""

    num_tokens: int
    best_step: int
    log: Sequence[dict[str, float]]

    @property
    def first(self) -> dict[str, float]:
        """The evaluation before the first step."""
        return next(entry for entry in self.log if "eval_loss" in entry)

    @property
    def best(self) -> dict[str, float]:
        """The evaluation of the weights that are returned."""
        return next(entry for entry in self.log if "eval_loss" in entry and entry["step"] == self.best_step)


def recover(
    student: PreTrainedModel, teacher: PreTrainedModel | None, train_NT: Ids, eval_NT: Ids,
    options: TrainingOptions, layer_map: Sequence[tuple[int, int]], work: Path, seed: int, reporter: Reporter,
) -> Outcome:  # fmt: skip
    """Train `student` in place and leave it with the weights of the evaluation with the lowest loss.

    The evaluation before the first step counts: where none is better, the student is what it was.
    train_NT, eval_NT: sequences of tokens. work: survives kills; a training that was killed goes on from the newest
    complete checkpoint there, to the same weights (on the CPU, bit for bit). layer_map: see Objective.
    Raises StageFailed where the loss diverges or the steps can't be divided among the processes.
    """
    if not is_follower():
        work.mkdir(parents=True, exist_ok=True)
        save_weights(student, str(work / START))
    order = training_order(len(train_NT), options.num_steps * options.batch_size, seed)
    objective = Objective(options.loss, options.temperature, options.hidden_distance, layer_map)
    arguments = training_arguments(options, work, seed, bool(student.config.use_cache))
    trainer = RecoveryTrainer(
        student, teacher, objective, arguments, Blocks(train_NT, order), Blocks(eval_NT, range(len(eval_NT)))
    )
    trainer.remove_callback(PrinterCallback)
    _place(teacher, trainer.args.device)
    state = _train(trainer, options, work, reporter)
    trainer.accelerator.wait_for_everyone()
    best_step = _best_step(state, reporter)
    load_weights(student, str(checkpoint_folder(work, best_step) / WEIGHTS if best_step else work / START))
    trainer.accelerator.wait_for_everyone()
    num_tokens = state.global_step * options.batch_size * train_NT.shape[1]
    return Outcome(num_tokens, best_step, state.log_history)


def training_order(num_blocks: int, num_needed: int, seed: int) -> list[int]:
    """Which block is trained on when: shuffled passes over all of them, one after the other."""
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(num_blocks) for _ in range(-(-num_needed // num_blocks))]
    return cast(list[int], np.concatenate(passes)[:num_needed].tolist())


def training_arguments(options: TrainingOptions, work: Path, seed: int, use_cache: bool) -> TrainingArguments:
    """`options` as Trainer has them. The blocks come in their own order, and are just enough for one epoch.

    use_cache: what the model's config says, and shall go on saying (Trainer writes its own wish into it).
    """
    on_cpu = not torch.cuda.is_available()
    has_bf16 = not on_cpu and torch.cuda.is_bf16_supported()
    parts = options.gradient_accumulation_steps * num_processes()
    if options.batch_size % parts:
        raise StageFailed(
            "batch_size", f"{options.batch_size} sequences can't be divided into {parts} equal parts",
            f"{num_processes()} processes × {options.gradient_accumulation_steps} accumulation steps must divide it",
        )  # fmt: skip
    eval_steps = options.eval_steps or -(-options.num_steps // 4)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=options.num_steps,
        per_device_train_batch_size=options.batch_size // parts,
        per_device_eval_batch_size=options.batch_size // parts,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        warmup_steps=math.ceil(options.num_steps * options.warmup_ratio),
        lr_scheduler_type=options.lr_scheduler_type,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim={"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}[options.optim],
        bf16=options.precision == "bf16" or (options.precision == "auto" and has_bf16),
        activation_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_steps=eval_steps,
        save_total_limit=2,
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cache=use_cache,
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used through torchrun, never through DataParallel
    return arguments


def _train(trainer: RecoveryTrainer, options: TrainingOptions, work: Path, reporter: Reporter) -> TrainerState:
    """Train from the newest complete checkpoint to the end, unless that checkpoint is the end."""
    if not is_follower():
        remove_incomplete(work, num_processes())
    trainer.accelerator.wait_for_everyone()
    checkpoint = newest_complete(work, num_processes())
    if checkpoint and _is_last(checkpoint):
        return cast(TrainerState, TrainerState.load_from_json(str(checkpoint / STATE)))
    if checkpoint:
        reporter.log.info("going on from %s", checkpoint.name)
    trainer.args.eval_on_start = checkpoint is None
    with reporter.progress("train", options.num_steps) as advance:
        for callback in _callbacks(options, work, advance):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state


def _best_step(state: TrainerState, reporter: Reporter) -> int:
    """The step of the evaluation with the lowest loss: 0, with a warning, where training made nothing better."""
    first = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
    if state.best_metric is not None and state.best_metric < first:
        return int(state.best_global_step or state.global_step)
    reporter.log.warning(
        "training did not help: the loss on the eval split was %.4g before and %.4g at best, so the weights stay as "
        "they were; give more tokens or another learning_rate", first, state.best_metric,
    )  # fmt: skip
    return 0


def _callbacks(options: TrainingOptions, work: Path, advance: Any) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [DivergenceGuard(work), Telemetry(advance, work / EVENTS)]
    if options.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    return callbacks


def _is_last(checkpoint: Path) -> bool:
    """Whether training was over when this was written: all steps done, or stopped early."""
    state = read_state(checkpoint) or {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop"))


def _place(teacher: PreTrainedModel | None, device: torch.device) -> None:
    """Move a teacher to where the student is; bitsandbytes has put a quantised one there already."""
    if teacher is not None:
        teacher.train(False)
        teacher.requires_grad_(False)
        if not getattr(teacher, "is_quantized", False):
            cast(torch.nn.Module, teacher).to(device)
