"""`distill`: bring a model back to its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.artifact import Format, Metrics
from compress.errors import InvalidInput, Problem, StageFailed
from compress.models.anatomy import ModelShape
from compress.stage import SOURCE, Ref, Reporter, Stage, StageContext
from compress.train.options import TrainingOptions

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from compress.train.engine import Outcome

TEACHER = "teacher"
_FIGURES = {
    "loss": "eval_loss", "kl": "kl_to_teacher", "ce": "cross_entropy", "top1_agreement": "agreement_with_teacher",
}  # fmt: skip


class Distill(TrainingOptions, Stage):
    """Trains the whole model to say what its teacher says.

    What comes out has the weights of the evaluation with the lowest loss on the eval split, be it the one before the
    first step. A killed training goes on
    from its last complete checkpoint; one that diverges stops, and its last good checkpoint is kept.
    """

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "train the model towards a teacher, by default the source"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    data: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train", "eval"})
    seeded: ClassVar[bool] = True

    teacher: str = Field(SOURCE, description="source, or the id of an earlier stage")
    teacher_model: str | None = Field(
        None, description="another model with the same tokenizer, in teacher's place: a source, as `model` names one"
    )
    teacher_bits: Literal[4, 8] | None = Field(None, description="load the teacher in 4 or 8 bits by bitsandbytes")

    def inputs(self) -> Mapping[str, Ref]:
        """The teacher, where it is a stage of this pipeline and one is needed."""
        return {TEACHER: Ref(self.teacher)} if self.loss.needs_teacher and self.teacher_model is None else {}

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together or does not fit the model or its teacher."""
        yield from self.problems(model)
        if self.teacher_bits == 4 and (model.hidden_size % 64 or model.intermediate_size % 64):
            what = f"bitsandbytes's 4 bits take blocks of 64; sizes are {model.hidden_size}, {model.intermediate_size}"
            yield Problem("teacher_bits", what, "use teacher_bits: 8")
        if self.teacher_model is not None:
            yield from _teacher_problems(self.teacher_model, model)

    def twin(self) -> Self:
        """Two steps, and the pipeline's own random twin for a teacher."""
        return self.model_copy(update={**self.twin_options(), "teacher_model": None, "teacher_bits": None})

    def run(self, context: StageContext) -> Metrics:
        """Train, and write the best weights with `history.json`, `loss.png` and `tensorboard/`."""
        from compress.models.load import save_model
        from compress.train.distributed import everywhere
        from compress.train.record import write_record
        from compress.train.resumable import EVENTS

        job = self._job(context)
        student, outcome = everywhere(train_student, job, context.reporter)
        save_model(student, context.input.path, context.out)
        write_record(outcome.log, outcome.best_step, context.work / EVENTS, context.out)
        return {
            "result": {"train_tokens": outcome.num_tokens, **_metrics(outcome.best)},
            "input": _metrics(outcome.first),
        }

    def _job(self, context: StageContext) -> Job:
        from compress.models.load import load_tokenizer
        from compress.train.engine import training_ids
        from compress.train.teacher import check_same_vocabulary

        teacher = self._teacher_folder(context)
        tokenizer = load_tokenizer(context.input.path)
        if teacher is not None:
            check_same_vocabulary(tokenizer, load_tokenizer(teacher))
        ids = training_ids(self, tokenizer, context)
        return Job(self, context.input.path, teacher, *ids, context.work, context.seed)

    def _teacher_folder(self, context: StageContext) -> Path | None:
        if self.teacher_model is not None:
            from compress.models.sources import parse_source

            return parse_source(self.teacher_model, "teacher_model").fetch(context.reporter)
        artifact = context.inputs.get(TEACHER)
        if artifact is not None and artifact.format != "torch":
            what = f"{self.teacher!r} is of the format {artifact.format}"
            raise StageFailed(TEACHER, what, "name a stage that returns a torch model")
        return artifact.path if artifact else None


@dataclass(frozen=True)
class Job:
    """One training, as every process of a launch is told of it."""

    options: Distill
    student: Path
    teacher: Path | None
    train_NT: np.ndarray[Any, np.dtype[np.int64]]
    eval_NT: np.ndarray[Any, np.dtype[np.int64]]
    work: Path
    seed: int


def train_student(job: Job, reporter: Reporter) -> tuple[PreTrainedModel, Outcome]:
    """The student with its best weights, and what its training did. Runs in every process of a launch."""
    from compress.models.load import load_model
    from compress.models.parts import Parts
    from compress.train.engine import recover
    from compress.train.teacher import dropped_layers, fitting_loss, layer_map, load_teacher

    student = load_model(job.student)
    teacher = load_teacher(job.teacher, job.options.teacher_bits) if job.teacher else None
    options = fitting_loss(job.options, has_logits=bool(Parts(student).prefix))
    layers: list[tuple[int, int]] = []
    if teacher is not None:
        num_student, num_teacher = len(Parts(student).layers), len(Parts(teacher).layers)
        layers = list(layer_map(num_student, num_teacher, dropped_layers(job.student)))
    outcome = recover(student, teacher, job.train_NT, job.eval_NT, options, layers, job.work, job.seed, reporter)
    return student, outcome


def _teacher_problems(text: str, model: ModelShape) -> Iterator[Problem]:
    from compress.models.sources import parse_source

    try:
        config = parse_source(text, "teacher_model").config()
    except InvalidInput as error:
        yield from error.problems
        return
    if config is not None and config.get("vocab_size", model.vocab_size) != model.vocab_size:
        what = f"has a vocabulary of {config['vocab_size']} tokens, and the model {model.vocab_size}"
        yield Problem("teacher_model", what, "choose a teacher with the same tokenizer")


def _metrics(evaluation: Mapping[str, float]) -> dict[str, float]:
    metrics = {}
    for short, name in _FIGURES.items():
        if f"eval_{short}" in evaluation:
            metrics[name], metrics[f"{name}_se"] = evaluation[f"eval_{short}"], evaluation[f"eval_{short}_se"]
    return metrics
