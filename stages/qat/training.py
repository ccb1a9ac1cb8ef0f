"""The training as every process of a launch does it: quantise, train through the quantisation, and so on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.options import QuantizeOptions
from compress.quant.qtensor import QTensor
from compress.quant.schemes import ACCURACY_LEVEL
from compress.quant.store import read_quantized, save_quantized
from compress.quant.trained import FakeQuantisation
from compress.stage import Reporter, StageContext
from compress.stages.qat.stage import Qat
from compress.train.distributed import agreed
from compress.train.engine import Ids, Outcome, recover
from compress.train.precision import uses_bf16
from compress.train.teacher import answering_layers, fitting_loss, load_teacher
from compress.train.trainer import Sequences
from compress.units import Units

_START = "start"
"""The folder, beside a training's checkpoints, of the quantised model and the float weights that it starts from."""
_WEIGHTS = "float.safetensors"


@dataclass(frozen=True)
class Job:
    """One quantisation-aware training, as every process of a launch is told of it.

    calibration_NT: sequences of the train split, None where nothing is fitted on text.
    """

    options: Qat
    input: Path
    teacher: Path | None
    calibration_NT: Ids | None
    train_NT: Sequences
    eval_NT: Sequences
    work: Path
    seed: int


@dataclass(frozen=True)
class Result:
    """model: its own modules, with the weights that `tensors` stand for. outcomes: one a phase, by its folder."""

    model: PreTrainedModel
    tensors: Mapping[str, QTensor]
    outcomes: Mapping[Path, Outcome]

    @property
    def last(self) -> Outcome:
        """What the training did that the result comes from."""
        return list(self.outcomes.values())[-1]


def prepare(options: Qat, context: StageContext) -> Job:
    """Read the text. Raises StageFailed where there is too little, or the teacher's tokenizer is another one."""
    start, calibration_NT = options.start(), None
    teacher, train_NT, eval_NT = options.lessons(context)
    if start.needs_text and options.data == "generated":
        assert isinstance(train_NT, np.ndarray), "the teacher wrote it, in the tokens of both"
        calibration_NT = train_NT[: start.tokens // start.sequence_length]
    elif start.needs_text:
        tokenizer = load_tokenizer(context.input.path)
        calibration_NT = context.data.blocks("train", tokenizer, start.sequence_length, start.tokens)
    return Job(options, context.input.path, teacher, calibration_NT, train_NT, eval_NT, context.work, context.seed)


def train(job: Job, reporter: Reporter) -> Result:
    """Train through every scheme in turn. Raises StageFailed where a training diverges."""
    model = load_model(job.input)
    teacher = None
    if job.teacher:
        teacher = load_teacher(job.teacher, job.options.teacher_bits, bf16=uses_bf16(job.options.precision))
    layers = answering_layers(model, teacher)
    has_logits = bool(Parts(model).prefix)
    outcomes: dict[Path, Outcome] = {}
    tensors: dict[str, QTensor] = {}
    for index, (scheme, phase) in enumerate(job.options.phases()):
        work = job.work / f"{index}-{scheme}"
        start = _start(model, job, phase.start(scheme), work / _START, reporter)
        fakes = FakeQuantisation(model, *start, phase.learn, phase.accuracy_level, ACCURACY_LEVEL)
        del start  # float weights, which the training has a copy of
        rates = fakes.rates(phase.scale_learning_rate)
        options = fitting_loss(phase, has_logits=has_logits)
        outcomes[work] = recover(
            model, teacher, job.train_NT, job.eval_NT, options, layers, work, job.seed + index, reporter, rates
        )
        cast(nn.Module, model).cpu()
        tensors = fakes.remove(rounded=scheme == job.options.scheme)
    return Result(model, tensors, outcomes)


def _start(
    model: PreTrainedModel, job: Job, options: QuantizeOptions, folder: Path, reporter: Reporter
) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
    """Codes and scales to start from and the float weights that they stand for; the rest is in `model` then.

    They are kept in `folder`: a killed training does not quantise again, nor a killed quantisation a finished layer.
    """
    if not agreed(folder.is_dir):
        agreed(lambda: _quantise(model, job, options, folder, reporter))
    _, stored = read_quantized(folder)
    plain = {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    cast(nn.Module, model).load_state_dict(plain, strict=False)
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, QTensor)}
    return tensors, load_file(folder / _WEIGHTS)


def _quantise(model: PreTrainedModel, job: Job, options: QuantizeOptions, folder: Path, reporter: Reporter) -> None:
    ids = None if job.calibration_NT is None else torch.from_numpy(job.calibration_NT)
    parts = Parts(model)
    units = Units(f"qat {options.scheme}", folder.with_name("layers"), log=reporter.log)
    with reporter.progress("quantising layers", len(parts.layers)) as advance:
        found = quantize_model(parts, options, ids, advance, keep_latents=True, units=units)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_quantized(model, found.tensors, options.base, job.input, partial)
    save_file(found.latents, partial / _WEIGHTS)
    partial.rename(folder)

