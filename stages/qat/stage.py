"""`qat`: train a model through its own quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from compress.artifact import Format, Metrics
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import counted
from compress.quant.options import QuantizeOptions, SchemeKey
from compress.quant.schemes import SCHEMES, Scheme
from compress.stage import Given, OtherModel, Ref, Stage, StageContext
from compress.train.taught import TaughtOptions, figures, shared_positions


class Qat(TaughtOptions, QuantizeOptions, Stage):
    """Trains the weights, and how they are rounded, towards a teacher, in the arithmetic that will be exported.

    Starts from what `quantize` makes with the same options, whose codes the first evaluation is of: where training
    makes nothing better, they come out. What comes out is what the best evaluation computed with, and the export takes
    it as it is: integer codes around an integer zero point, so ParetoQ's stretched levels are none of them. Norms,
    biases and what stays float32 are trained too. Goes on after a kill, and stops where it diverges, as `distill` does.
    """

    name: ClassVar[str] = "qat"
    version: ClassVar[int] = 5
    summary: ClassVar[str] = "train through the quantisation (straight-through, LSQ), towards a teacher"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "quantized"
    plots: ClassVar[Mapping[str, str]] = {"loss.png": "loss; the dotted line is the step that is kept"}
    seeded: ClassVar[bool] = True

    learn: Literal["weights", "scales", "both"] = Field(
        "both",
        description="weights: scales stay as they were found; scales: codes do, and only scales and what is not "
        "quantised are trained; both: LSQ, with zero points where there are any",
    )
    scale_learning_rate: float = Field(
        1e-3, gt=0, le=1,
        description="peak learning rate of scales, as a share of each tensor's median scale; zero points move by such "
        "a share of all codes",
    )  # fmt: skip
    warm_start: tuple[SchemeKey, ...] = Field(
        (), description="schemes with more levels to train through first, [w8-block32, w4-block32]; tokens are divided"
    )
    accuracy_level: Literal[0, 4] = Field(
        0,
        description="of training steps; 4: activations of block-wise projections are rounded as MatMulNBits does, too; "
        "evaluations always round them, as the export does",
    )  # fmt: skip
    calibration_tokens: int = Field(8192, ge=0, description="training tokens that the start is fitted on")

    def inputs(self) -> Mapping[str, Ref | OtherModel]:
        """The teacher, where one is needed."""
        return self.teachers

    def settled(self, given: Given) -> Mapping[str, Any]:
        return counted(self, self.meant(given.shape))

    def computes_with(self, given: Given) -> frozenset[str]:
        return self.libraries | self.taught_by

    def rounds_activations(self, given: Given) -> bool:
        return self.rounds

    def meant(self, model: ModelShape) -> dict[str, Any]:
        """What null and auto mean for that model, and None for what has no say in any phase."""
        starts = [self.start(scheme) for scheme in (*self.warm_start, self.scheme)]
        phases = [start.meant(model) for start in starts]
        silent = {name for name in phases[0] if all(name in phase and phase[name] is None for phase in phases)}
        tables = {name: tuple(dict.fromkeys(phase[name] for phase in phases)) for name in ("embeddings", "head")}
        return {
            **tables, **dict.fromkeys(silent - {"tokens", "sequence_length"}), **super().meant(model),
            "calibration_tokens": self.calibration_tokens if any(start.needs_text for start in starts) else None,
            "scale_learning_rate": None if self.learn == "weights" else self.scale_learning_rate,
            "eval_steps": self.eval_steps or ("a quarter" if self.warm_start else self.num_steps_between),
        }  # fmt: skip

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together, or does not fit the model or its teacher."""
        yield from self.problems(model)
        for problem in self.start().problems(model):
            if problem.where != "sequence_length":  # said already
                yield replace(problem, where="calibration_tokens") if problem.where == "tokens" else problem
        if self.learn == "weights" and "scale_learning_rate" in self.model_fields_set:
            yield Problem("scale_learning_rate", "has no say where learn is weights", "remove it")
        if "calibration_tokens" in self.model_fields_set and not self.start().needs_text:
            yield Problem(
                "calibration_tokens", "has no say where weights are rounded to nearest without text", "remove it"
            )
        if self.accuracy_level and not self.base.blockwise:
            what = f"MatMulNBits has accuracy levels, and {self.scheme} is not for it"
            yield Problem("accuracy_level", what, "remove it")
        yield from self._warm_start_problems()

    def start(self, scheme: SchemeKey | None = None) -> QuantizeOptions:
        """How the model is quantised that training starts from: by these options, or with another scheme."""
        own = {name: getattr(self, name) for name in QuantizeOptions.model_fields if name in self.model_fields_set}
        own |= {"tokens": self.calibration_tokens, "sequence_length": self.sequence_length}
        return QuantizeOptions.model_validate({**own, "scheme": scheme or self.scheme})

    def phases(self) -> Sequence[tuple[SchemeKey, Self]]:
        """The schemes that are trained through, each with its options; the tokens are divided among them."""
        schemes = (*self.warm_start, self.scheme)
        each = self.num_steps // len(schemes)
        steps = [each] * len(self.warm_start) + [self.num_steps - each * len(self.warm_start)]
        tokens = self.batch_size * self.sequence_length
        return [
            (scheme, self.model_copy(update={"tokens": num * tokens}))
            for scheme, num in zip(schemes, steps, strict=True)
        ]

    def shape(self, model: ModelShape) -> ModelShape:
        """The same model; what is trained and stays floats is kept in float32."""
        return model.in_float32

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """What is written with these options."""
        return self.stored_bytes(model)

    def twin(self) -> Self:
        """Two steps of each phase on short blocks, with the pipeline's own random twin for a teacher."""
        small = self.twin_options()
        tokens = int(str(small["tokens"])) * (1 + len(self.warm_start))
        return self.model_copy(update={**small, "tokens": tokens, "calibration_tokens": 64})

    def run(self, context: StageContext) -> Metrics:
        """Train, and write codes and scales with `history.json`, `loss.png` and `tensorboard/`, of warm starts too.

        The figures of `start` are those of the quantised model before the first step.
        """
        from compress.quant.store import save_quantized
        from compress.stages.qat.training import prepare, train
        from compress.train.distributed import everywhere
        from compress.train.record import write_record
        from compress.train.resumable import EVENTS

        job = prepare(self, context)
        trained = everywhere(train, job, context.reporter)
        save_quantized(trained.model, trained.tensors, self.base, context.input.path, context.out)
        for folder, outcome in trained.outcomes.items():
            out = context.out if outcome is trained.last else context.out / folder.name
            out.mkdir(exist_ok=True)
            write_record(outcome.log, outcome.best_step, folder / EVENTS, out)
        num_weights = sum(tensor.codes.numel() for tensor in trained.tensors.values())
        num_bits = sum(8 * part.nbytes for tensor in trained.tensors.values() for part in tensor.pack().values())
        return {
            "result": {
                "train_tokens": sum(outcome.num_tokens for outcome in trained.outcomes.values()),
                "bits_per_weight": num_bits / num_weights,
                **shared_positions(job.train_NT), **figures(trained.last.best),
            },
            "start": figures(trained.last.first),
        }  # fmt: skip

    def _warm_start_problems(self) -> Iterator[Problem]:
        if not self.warm_start:
            return
        if self.learn == "scales":
            yield Problem("warm_start", "has no say where learn is scales: codes stay as they are", "remove it")
        schemes = [SCHEMES[name] for name in (*self.warm_start, self.scheme)]
        if any(scheme.activations != schemes[-1].activations for scheme in schemes):
            what = f"not every scheme rounds activations as {self.scheme} does"
            yield Problem("warm_start", what, "block-wise schemes warm up for block-wise ones; else leave it out")
        elif any(_levels(wide) <= _levels(narrow) for wide, narrow in pairwise(schemes)):
            listed = ", ".join(scheme.name for scheme in schemes)
            yield Problem(
                "warm_start",
                f"each scheme must have fewer levels than the one before: {listed}",
                "put wider ones first",
            )
        if self.num_steps < len(schemes):
            what = f"{self.num_steps} steps can't be divided among {len(schemes)} schemes"
            yield Problem("tokens", what, f"at least {len(schemes) * self.batch_size * self.sequence_length}")


def _levels(scheme: Scheme) -> int:
    return scheme.limits[1] - scheme.limits[0] + 1
