"""The recovery engine: trains a student towards a teacher, resumably, and leaves it with its best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
)

from compress.data.masking import Masking
from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_tokenizer
from compress.models.origins import answering_channels
from compress.stage import Reporter, StageContext
from compress.train.checkpoints import WEIGHTS, checkpoint_folder
from compress.train.generated import train_blocks
from compress.train.launch import is_follower
from compress.train.objective import Objective
from compress.train.options import TrainingOptions
from compress.train.resumable import step_arguments, train
from compress.train.teacher import check_same_vocabulary, origins_of
from compress.train.trainer import Blocks, Masked, RecoveryTrainer, Sequences
from compress.train.trainer import Ids as Ids
from compress.train.vocabularies import check_objective, is_part_of, two_ways

_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate leaves in a model that it prepared: its own forward, and the mark by which it skips the next time."""
START = "start.safetensors"
"""The student's weights before the first step, inside `work`."""
_PARTIAL = f"{START}.partial"


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
    student: PreTrainedModel, teacher: PreTrainedModel | None, train_NT: Sequences, eval_NT: Sequences,
    options: TrainingOptions, layer_map: Sequence[tuple[int, int]], work: Path, seed: int, reporter: Reporter,
    rates: Mapping[str, float] | None = None,
) -> Outcome:  # fmt: skip
    """Train `student` in place and leave it with the weights of the evaluation with the lowest loss.

    The evaluation before the first step counts: where none is better, the student is what it was.
    train_NT, eval_NT: sequences of tokens, in two vocabularies, with some hidden, or padded ones with a label each.
    Every evaluation hides the same tokens, whatever the seed. work: survives kills; a training that was killed goes on
    from the newest complete checkpoint there, to the same weights (on the CPU, bit for bit). layer_map: see Objective.
    rates: learning rates of parameters that have one of their own, by name. Raises StageFailed where the loss diverges
    or the steps can't be divided among the processes.
    """
    if not is_follower():
        work.mkdir(parents=True, exist_ok=True)
        if not (work / START).exists():
            save_weights(student, str(work / _PARTIAL))
            (work / _PARTIAL).rename(work / START)
    order = training_order(len(train_NT), options.num_steps * options.batch_size, seed)
    channels = None if teacher is None else answering_channels(origins_of(student), origins_of(teacher))
    if teacher is not None and channels == list(range(teacher.config.hidden_size)):
        channels = None
    objective = Objective(options.loss, options.temperature, options.hidden_distance, layer_map, channels)
    arguments = training_arguments(options, work, seed, bool(student.config.use_cache))
    trainer = RecoveryTrainer(
        student, teacher, objective, arguments, Blocks(train_NT, order, seed), Blocks(eval_NT, range(len(eval_NT))),
        rates or {},
    )  # fmt: skip
    place(teacher, trainer.args.device)
    patience = options.early_stopping_patience
    state = train(trainer, [EarlyStoppingCallback(patience)] if patience else [], "train", work, reporter)
    trainer.accelerator.wait_for_everyone()
    best_step = _best_step(state, reporter)
    load_weights(student, str(checkpoint_folder(work, best_step) / WEIGHTS if best_step else work / START))
    trainer.accelerator.wait_for_everyone()
    for name in _PREPARED:  # or the next training of this model in this process would not be in bf16
        vars(student).pop(name, None)
    num_tokens = state.global_step * options.batch_size * train_NT.shape[1]
    return Outcome(num_tokens, best_step, state.log_history)


def training_ids(
    options: TrainingOptions, tokenizer: PreTrainedTokenizerBase, context: StageContext,
    teacher: Path | None = None, teacher_bits: int | None = None,
) -> tuple[Sequences, Sequences]:  # fmt: skip
    """What to train on, of a pipeline's text or written by the model in `teacher`, and what to judge on, of the text.

    In both vocabularies where the teacher has more tokens; with hidden ones where the model says what they are. Raises
    StageFailed where there is too little text, where the teacher can't write any, or where its tokenizer is another
    one, or the model's has no mask token.
    """
    length, max_eval = options.sequence_length, max(options.eval_tokens, 2 * options.sequence_length)
    train_NT: Sequences
    eval_NT: Sequences
    theirs = None if teacher is None else load_tokenizer(teacher)
    if theirs is not None and is_part_of(tokenizer, theirs):
        check_objective(options, shape_of(context.input.config))
        train_NT = two_ways(context.data, "train", tokenizer, theirs, length, options.num_tokens)
        eval_NT = two_ways(context.data, "eval", tokenizer, theirs, length, max_eval)
        context.reporter.log.info(
            "the teacher has more tokens: it says something of %.1f %% of what is predicted",
            100 * train_NT.shared_positions,
        )  # fmt: skip
    else:
        if theirs is not None:
            check_same_vocabulary(tokenizer, theirs)
        train_NT = train_blocks(options, options.num_tokens, tokenizer, context, teacher, teacher_bits)
        eval_NT = context.data.blocks("eval", tokenizer, length, max_eval)
        masking = masking_of(tokenizer, context)
        train_NT, eval_NT = hidden_in(train_NT, masking), hidden_in(eval_NT, masking)
    if len(eval_NT) < 2:
        what = f"has fewer than two blocks of {length} tokens"
        raise StageFailed("data.eval", what, "add text, or shorten sequence_length")
    return train_NT, eval_NT


def masking_of(tokenizer: PreTrainedTokenizerBase, context: StageContext) -> Masking | None:
    """How the model that a stage works on has tokens hidden; None where it is no masked language model.

    Raises StageFailed where it is one, and its tokenizer has no mask token.
    """
    shape = shape_of(context.input.config)
    return Masking.of(tokenizer, shape.vocab_size) if shape.fills_masks else None


def hidden_in(blocks_NT: Ids, masking: Masking | None) -> Ids | Masked:
    """Blocks of text as the model reads them. Raises StageFailed where nothing can be hidden in any of them."""
    return blocks_NT if masking is None or not len(blocks_NT) else Masked(masking.maskable(blocks_NT), masking)


def training_order(num_blocks: int, num_needed: int, seed: int) -> list[int]:
    """Which block is trained on when: shuffled passes over all of them, one after the other."""
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(num_blocks) for _ in range(-(-num_needed // num_blocks))]
    return cast(list[int], np.concatenate(passes)[:num_needed].tolist())


def training_arguments(options: TrainingOptions, work: Path, seed: int, use_cache: bool) -> TrainingArguments:
    """`options` as Trainer has them.

    use_cache: what the model's config says, and shall go on saying (Trainer writes its own wish into it).
    """
    common = step_arguments(options, work, seed, options.gradient_accumulation_steps)
    eval_steps = options.num_steps_between
    arguments = TrainingArguments(
        **common,
        per_device_eval_batch_size=common["per_device_train_batch_size"],
        max_grad_norm=options.max_grad_norm,
        activation_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_steps=eval_steps,
        metric_for_best_model="loss",
        greater_is_better=False,
        use_cache=use_cache,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used through torchrun, never through DataParallel
    return arguments


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


def place(teacher: PreTrainedModel | None, device: torch.device) -> None:
    """Move a teacher to where the student is; bitsandbytes has put a quantised one there already."""
    if teacher is not None:
        teacher.train(False)
        teacher.requires_grad_(False)
        if not getattr(teacher, "is_quantized", False):
            cast(torch.nn.Module, teacher).to(device)
