"""The conversion as every process of a launch does it: new mixers, alignment, choice of layers, distillation."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import StageFailed
from compress.mixers.spec import FULL
from compress.models.anatomy import shape_of
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.stage import Reporter, StageContext
from compress.stages.convert.choose import Choice, best_restored, least_moved, proxy_scores
from compress.stages.convert.init import forget_attention, new_mixers, new_parameters, windowed, with_mixers
from compress.stages.convert.layers import candidates, kinds, to_convert
from compress.stages.convert.stage import TEACHER, ConvertAttention, HybridTraining
from compress.train.align import Aligned, align
from compress.train.distributed import agreed
from compress.train.engine import Ids, Outcome, hidden_in, masking_of, place, recover, training_ids
from compress.train.generated import train_blocks
from compress.train.options import AlignOptions
from compress.train.precision import uses_bf16
from compress.train.teacher import answering_layers, check_same_vocabulary, fitting_loss, load_teacher
from compress.train.trainer import Blocks, Masked, Sequences
from compress.units import Unit, Units

_NUM_BATCH_TOKENS = 1024
DISTILL = "distill"
"""The folder of the end-to-end training inside `work`."""


@dataclass(frozen=True)
class Job:
    """One conversion, as every process of a launch is told of it.

    chosen: the layers to convert, None where they are to be measured. align_NT, held_NT: sequences of tokens of the
    train split to align on, and to judge on, with some hidden of a masked language model. distill_ids: of the train and
    the eval split, for the whole model.
    """

    options: ConvertAttention
    chosen: list[int] | None
    input: Path
    teacher: Path
    align_NT: Ids | Masked
    held_NT: Ids | Masked
    distill_ids: tuple[Sequences, Sequences] | None
    work: Path
    seed: int


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about."""

    model: PreTrainedModel
    choice: Choice
    aligned: Aligned | None
    outcome: Outcome | None


def prepare(options: ConvertAttention, context: StageContext) -> Job:
    """Read the text. Raises StageFailed where there is too little, the teacher's tokenizer is another one, or the
    options do not fit the model after all: of stages that choose layers, `check` knew only their number."""
    shape = shape_of(context.input.config)
    problem = next(options.check(shape), None)
    if problem is not None:
        raise StageFailed(problem.where, problem.what, problem.fix)
    tokenizer = load_tokenizer(context.input.path)
    teacher = context.inputs[TEACHER]
    if teacher.format != "torch":
        raise StageFailed(TEACHER, f"{options.teacher!r} is of the format {teacher.format}", "name a torch model")
    check_same_vocabulary(tokenizer, load_tokenizer(teacher.path))
    chosen = options.preselected(shape, context.seed)
    held_tokens = options.select_tokens if chosen is None else 0
    num_tokens = options.align.num_tokens if options.align else 0
    if chosen is None and options.select == "kl":
        num_tokens = max(num_tokens, options.kl_tokens)
    align_ids = _held_out(options.align_options(shape), num_tokens, held_tokens, tokenizer, context)
    distill_ids = training_ids(options.distill, tokenizer, context, teacher.path) if options.distill else None
    return Job(options, chosen, context.input.path, teacher.path, *align_ids, distill_ids, context.work, context.seed)


def _held_out(
    options: AlignOptions, num_tokens: int, held_tokens: int, tokenizer: PreTrainedTokenizerBase, context: StageContext
) -> tuple[Ids | Masked, Ids | Masked]:
    """Blocks to train on, and others, evenly spaced between them, to judge on."""
    length = options.sequence_length
    if not num_tokens + held_tokens:
        return np.empty((0, length), np.int64), np.empty((0, length), np.int64)
    blocks_NT = train_blocks(options, num_tokens + held_tokens, tokenizer, context, context.inputs[TEACHER].path)
    num_held = min(held_tokens // length, len(blocks_NT) // 2 if num_tokens else len(blocks_NT))
    if held_tokens and not num_held:
        what = f"has one block of {length} tokens, and another is needed to judge on"
        raise StageFailed("data.train", what, "add text, or shorten align.sequence_length")
    held = [row * len(blocks_NT) // num_held for row in range(num_held)]
    masking = masking_of(tokenizer, context)
    return hidden_in(np.delete(blocks_NT, held, axis=0), masking), hidden_in(blocks_NT[held], masking)


def convert(job: Job, reporter: Reporter) -> Conversion:
    """Convert. Raises StageFailed where the layers asked for can't be, or where a training diverges."""
    options, source = job.options, load_model(job.input)
    shape = Parts(source).shape
    kind = options.mixer(shape), options.sliding_window
    teacher = source if job.teacher == job.input else load_teacher(job.teacher)
    tried = candidates(shape, options.to) if job.chosen is None else job.chosen
    mixers = new_mixers(source, tried, *kind)
    if options.init == "random":
        forget_attention(mixers, source, job.seed)
    shown = source if kinds(shape)[tried[0]] == FULL else _fitting(teacher, source)
    with windowed(mixers, options.sliding_window) if options.sliding_window else contextlib.nullcontext():
        aligned = None
        if options.align is not None:
            aligned = align(mixers, shown, job.align_NT, options.align, job.work / "align", job.seed, reporter)
        choice = Choice(tried) if job.chosen else _choose(job, source, shown, teacher, mixers, reporter)
    reporter.log.info("convert-attention: %s in layers %s", options.to, ", ".join(map(str, choice.converted)))
    cast(nn.Module, source).cpu()
    teaches = options.distill is not None and teacher is source
    model = with_mixers(source, mixers, choice.converted, *kind, own_weights=teaches)
    del source, shown, mixers  # a copy where they do not teach
    outcome = None
    if options.distill is not None and job.distill_ids is not None:
        work = job.work / DISTILL
        outcome = _train(model, teacher, job.distill_ids, options.distill, work, job.seed, reporter)
    return Conversion(model, choice, aligned, outcome)


def _choose(
    job: Job, source: PreTrainedModel, shown: PreTrainedModel, teacher: PreTrainedModel,
    mixers: Mapping[int, nn.Module], reporter: Reporter,
) -> Choice:  # fmt: skip
    """The layers with the best scores; what a killed run measured is not measured again.

    Of a launch, the first process measures, and the others are told: each one's scores would be a little different.
    """
    options, units = job.options, Units("convert-attention", job.work / "scores", log=reporter.log)
    shape = Parts(source).shape
    number = to_convert(shape, options.to, options.keep, options.convert)
    assert isinstance(number, int)
    if options.select == "kl":
        training = _short_training(options, options.align_options(shape).sequence_length)
        reporter.log.warning("select: kl trains %d times on %d tokens", len(mixers), options.kl_tokens)

        def loss_with(index: int, work: Path) -> float:
            others = [other for other in mixers if other != index]
            student = with_mixers(source, mixers, others, options.mixer(shape), options.sliding_window)
            ids = job.align_NT, job.held_NT
            outcome = _train(student, teacher, ids, training, work, job.seed, reporter)
            return [entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry][-1]

        losses = {}
        for index in mixers:
            work = job.work / f"restore-{index}"
            losses[index] = _measured(units, f"layer {index}", partial(loss_with, index, work), work)
        return best_restored(losses, number, math.prod(job.held_NT.shape))
    scores = agreed(partial(_moved, job, shown, mixers, units, reporter))
    return least_moved(scores, number, math.prod(job.held_NT.shape), has_logits=bool(Parts(shown).prefix))


def _measured(units: Units, name: str, measure: Callable[[], float], work: Path) -> float:
    """What `measure`, in which all processes of a launch take part, finds in the first one; then `work` may go."""
    known = agreed(partial(units.find, name))
    if known is None:
        found = Unit(measure())
        units.keep(name, found)
        known = agreed(lambda: found)
    agreed(partial(shutil.rmtree, work, ignore_errors=True))
    return float(known.figures)


def _moved(
    job: Job, shown: PreTrainedModel, mixers: Mapping[int, nn.Module], units: Units, reporter: Reporter
) -> dict[int, float]:
    """`proxy_scores` of all mixers on what was held out for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place(shown, device)
    held = Blocks(job.held_NT, range(len(job.held_NT)))
    held_NT = torch.stack([held[row]["input_ids"] for row in range(len(held))]).to(device)
    batches = torch.split(held_NT, max(1, _NUM_BATCH_TOKENS // held_NT.shape[1]))
    bf16 = uses_bf16(next((each.precision for each in job.options.trainings.values()), "auto"))
    there = {index: mixer.to(device) for index, mixer in mixers.items()}
    with (
        reporter.progress("choosing layers", len(batches) * len(mixers)) as advance,
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        return proxy_scores(Parts(shown), there, batches, advance, units)


def _train(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: tuple[Sequences, Sequences], options: HybridTraining,
    work: Path, seed: int, reporter: Reporter,
) -> Outcome:  # fmt: skip
    parts = Parts(student)
    layers = answering_layers(student, teacher)
    fitting = fitting_loss(options, has_logits=bool(parts.prefix))
    rates = dict.fromkeys(new_parameters(student), options.mixer_learning_rate)
    return recover(student, teacher, *ids, fitting, layers, work, seed, reporter, rates)


def _short_training(options: ConvertAttention, length: int) -> HybridTraining:
    """Training as for `distill`, shorter, and evaluated at the end."""
    training = options.distill or HybridTraining.model_validate({})
    changes = {"tokens": options.kl_tokens, "sequence_length": length, "early_stopping_patience": None}
    short = training.model_copy(update=changes)
    return short.model_copy(update={"eval_steps": short.num_steps})


def _fitting(teacher: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """`teacher`, whose layers' attention the mixers of `source`, which has none, are to learn."""
    theirs, ours = Parts(teacher).shape, Parts(source).shape
    if (theirs.num_hidden_layers, theirs.hidden_size) != (ours.num_hidden_layers, ours.hidden_size):
        what = "its layers are not those of the model, whose mixers are to be aligned with them"
        raise StageFailed(TEACHER, what, "name the model that was converted first, or set align: null")
    return teacher
