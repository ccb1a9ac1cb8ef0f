"""What stages that train towards a teacher have in common: who it is, what fits it, and what is told of the result.

Imports no torch unless asked for a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import InvalidInput, Problem, StageFailed
from compress.models.anatomy import ModelShape, shape_of
from compress.quant.bnb import METHOD, misfits
from compress.stage import SOURCE, OtherModel, Ref, StageContext
from compress.train.options import LossWeights, TrainingOptions

if TYPE_CHECKING:
    from compress.data.text import TextData
    from compress.models.sources import Source
    from compress.train.trainer import Sequences

TEACHER = "teacher"
_FIGURES = {
    "loss": "eval_loss", "kl": "kl_to_teacher", "ce": "cross_entropy", "top1_agreement": "agreement_with_teacher",
}  # fmt: skip


class TaughtOptions(TrainingOptions):
    """Keys of the recovery engine and of its teacher."""

    teacher: str = Field(SOURCE, description="source, or the id of an earlier stage")
    teacher_model: str | None = Field(
        None,
        description="another model with the same tokenizer, in teacher's place: a source, as `model` names one, or a "
        "folder that `quantize` wrote with a bnb- scheme",
    )
    teacher_bits: Literal[4, 8] | None = Field(None, description="load the teacher in 4 or 8 bits by bitsandbytes")

    @property
    def teachers(self) -> Mapping[str, Ref | OtherModel]:
        """The teacher by its role, where one is needed."""
        if not self.needs_teacher:
            return {}
        return {TEACHER: Ref(self.teacher) if self.teacher_model is None else _other(self.teacher_model)}

    @property
    def taught_by(self) -> frozenset[str]:
        """The libraries that train, and those that hold the teacher."""
        in_bits = self.teacher_bits or (self.teacher_model and _is_in_bits(self.teacher_model))
        return self.trained_by | ({"bitsandbytes"} if in_bits and self.needs_teacher else set())

    def hides_tokens(self) -> bool:
        """Of a masked language model."""
        return True

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The splits of the text that are read: none to train on where the teacher writes it."""
        return frozenset({"eval"}) if self.data == "generated" else frozenset({"train", "eval"})

    def meant(self, model: ModelShape) -> dict[str, Any]:
        """What null and auto mean for that model, and None for what has no say; who teaches is told by an input."""
        bits = self.teacher_bits if self.needs_teacher else None
        return {**super().meant(model), "teacher": None, "teacher_model": None, "teacher_bits": bits}

    def problems(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together, or does not fit `model` or its teacher; `where` is the option's name."""
        yield from super().problems(model)
        try:
            teacher = model if self.teacher_model is None else _shape(self.teacher_model)
        except InvalidInput as error:
            yield from error.problems
            return
        if teacher is None:  # told when it is fetched
            return
        if self.teacher_bits is not None:
            yield from misfits("teacher_bits", self.teacher_bits, teacher)
        if self.teacher_model is not None:
            yield from _misfits(teacher, model, self.loss)

    def check_source(self, folder: Path, data: TextData) -> None:
        """Raises StageFailed where neither the source's tokens nor the teacher's are among the other's.

        Either may be padded to a rounder number of embeddings, which says nothing of the tokens.
        """
        if self.teacher_model is None or not self.needs_teacher:
            return
        from compress.models.load import load_tokenizer
        from compress.train.teacher import check_same_vocabulary
        from compress.train.vocabularies import is_part_of

        source, teacher = load_tokenizer(folder), load_tokenizer(_source(self.teacher_model).fetch())
        if not is_part_of(source, teacher) and not is_part_of(teacher, source):
            check_same_vocabulary(source, teacher)

    def twin_options(self) -> dict[str, object]:
        """Changes that make a training two steps long, with the pipeline's own random twin for a teacher."""
        return {**super().twin_options(), "teacher_model": None, "teacher_bits": None}

    def lessons(self, context: StageContext) -> tuple[Path | None, Sequences, Sequences]:
        """The teacher to learn from, None where none is needed, and what to train on and to judge on.

        Raises StageFailed where there is too little text, or for a teacher that is no torch model or whose tokenizer
        is another one.
        """
        from compress.models.load import load_tokenizer
        from compress.train.engine import training_ids

        teacher = self._teacher_folder(context)
        tokenizer = load_tokenizer(context.input.path)
        ids = training_ids(self, tokenizer, context, teacher, self.teacher_bits)
        return teacher if self.loss.needs_teacher else None, *ids

    def _teacher_folder(self, context: StageContext) -> Path | None:
        artifact = context.inputs.get(TEACHER)
        if artifact is not None and artifact.format != "torch":
            what = f"{self.teacher!r} is of the format {artifact.format}"
            raise StageFailed(TEACHER, what, "name a stage that returns a torch model")
        return artifact.path if artifact else None


def shared_positions(train_NT: Sequences) -> dict[str, float]:
    """Of how much of what is predicted a teacher with more tokens says something; nothing where it has the same."""
    share = getattr(train_NT, "shared_positions", None)
    return {} if share is None else {"shared_positions": share}


def figures(evaluation: Mapping[str, float]) -> dict[str, float]:
    """An evaluation of the engine's log, in the words of a report."""
    named = {}
    for short, name in _FIGURES.items():
        if f"eval_{short}" in evaluation:
            named[name], named[f"{name}_se"] = evaluation[f"eval_{short}"], evaluation[f"eval_{short}_se"]
    return named


def _shape(teacher_model: str) -> ModelShape | None:
    """None where its config has to be fetched. Raises InvalidInput for what is no model that can be read."""
    config = _source(teacher_model).config()
    return None if config is None else shape_of(config, "teacher_model")


def _misfits(teacher: ModelShape, model: ModelShape, loss: LossWeights) -> Iterator[Problem]:
    if teacher.family.kind != model.family.kind:
        what = f"is of the kind {teacher.family.kind}, and the model {model.family.kind}"
        yield Problem("teacher_model", what, "choose a teacher of the same kind")
        return
    if teacher.num_labels != model.num_labels:
        what = f"tells {teacher.num_labels} classes apart, and the model {model.num_labels}"
        yield Problem("teacher_model", what, "choose a teacher with the same classes")
    yield from loss.misfits(model, teacher)


def _is_in_bits(teacher_model: str) -> bool:
    """Whether that teacher's weights are bitsandbytes' (only a folder's can be). Raises InvalidInput as `_shape`."""
    return bool((_source(teacher_model).config() or {}).get("quantization_config"))


def _source(teacher_model: str) -> Source:
    """Where that teacher comes from."""
    from compress.models.sources import parse_source

    other = _other(teacher_model)
    return parse_source(other.text, "teacher_model", readable=other.readable)


def _other(teacher_model: str) -> OtherModel:
    """That teacher, whose weights may be bitsandbytes'."""
    return OtherModel(teacher_model, (METHOD,))
