"""`distill`: bring a model back to its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.artifact import Format, Metrics
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import counted
from compress.stage import Given, OtherModel, Ref, Reporter, Stage, StageContext
from compress.train.taught import TaughtOptions, figures, shared_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.train.engine import Outcome
    from compress.train.trainer import Sequences


class Distill(TaughtOptions, Stage):
    """Trains the whole model to say what its teacher says.

    What comes out has the weights of the evaluation with the lowest loss on the eval split, be it the one before the
    first step. A killed training goes on from its last complete checkpoint; one that diverges stops, and its last good
    checkpoint is kept.
    """

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 7
    summary: ClassVar[str] = "train the model towards a teacher, by default the source"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    plots: ClassVar[Mapping[str, str]] = {"loss.png": "loss; the dotted line is the step that is kept"}
    seeded: ClassVar[bool] = True

    def inputs(self) -> Mapping[str, Ref | OtherModel]:
        """The teacher, where one is needed."""
        return self.teachers

    def settled(self, given: Given) -> Mapping[str, Any]:
        return counted(self, self.meant(given.shape))

    def computes_with(self, given: Given) -> frozenset[str]:
        return self.libraries | self.taught_by

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together or does not fit the model or its teacher."""
        yield from self.problems(model)

    def twin(self) -> Self:
        """Two steps, and the pipeline's own random twin for a teacher."""
        return self.model_copy(update=self.twin_options())

    def shape(self, model: ModelShape) -> ModelShape:
        """The same model; a step of training is finer than types of two bytes, so that it is kept in float32."""
        return model.in_float32

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter in float32."""
        return model.weight_bytes

    def run(self, context: StageContext) -> Metrics:
        """Train, and write the best weights with `history.json`, `loss.png` and `tensorboard/`."""
        from compress.models.load import save_model
        from compress.train.distributed import everywhere
        from compress.train.record import write_record
        from compress.train.resumable import EVENTS

        job = Job(self, context.input.path, *self.lessons(context), context.work, context.seed)
        student, outcome = everywhere(train_student, job, context.reporter)
        save_model(student, context.input.path, context.out)
        write_record(outcome.log, outcome.best_step, context.work / EVENTS, context.out)
        return {
            "result": {
                "train_tokens": outcome.num_tokens, **shared_positions(job.train_NT), **figures(outcome.best),
            },
            "input": figures(outcome.first),
        }


@dataclass(frozen=True)
class Job:
    """One training, as every process of a launch is told of it."""

    options: Distill
    student: Path
    teacher: Path | None
    train_NT: Sequences
    eval_NT: Sequences
    work: Path
    seed: int


def train_student(job: Job, reporter: Reporter) -> tuple[PreTrainedModel, Outcome]:
    """The student with its best weights, and what its training did. Runs in every process of a launch."""
    from compress.models.load import load_model
    from compress.models.parts import Parts
    from compress.train.engine import recover
    from compress.train.precision import uses_bf16
    from compress.train.teacher import answering_layers, fitting_loss, load_teacher

    student = load_model(job.student)
    teacher = None
    if job.teacher:
        teacher = load_teacher(job.teacher, job.options.teacher_bits, bf16=uses_bf16(job.options.precision))
    options = fitting_loss(job.options, has_logits=bool(Parts(student).prefix))
    layers = answering_layers(student, teacher)
    outcome = recover(student, teacher, job.train_NT, job.eval_NT, options, layers, job.work, job.seed, reporter)
    return student, outcome
