"""What every stage that trains lets a user choose. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import counted
from compress.stage import unjudged
from compress.train.launch import num_processes
from compress.train.precision import uses_bf16

Precision = Literal["auto", "fp32", "bf16"]


class LossWeights(BaseModel):
    """The weight of each loss in the sum that is minimised, per predicted token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float = Field(1.0, ge=0, description="forward KL to the teacher, T²·KL(p^{1/T} ‖ q^{1/T})")
    ce: float = Field(0.0, ge=0, description="cross-entropy with the text itself (decoders, masked LMs)")
    hidden: float = Field(0.0, ge=0, description="distance of each layer's output to the teacher's")
    skew_kl: float = Field(0.0, ge=0, description="DistiLLM's KL(p ‖ 0.1p + 0.9q)")
    attention_map: float = Field(
        0.0, ge=0, description="KL of what each token attends to, over heads and layers; not of layers with a mixer"
    )
    attention_output: float = Field(
        0.0, ge=0, description="‖s−t‖²/‖t‖² per token of what each layer's attention block gives"
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the text is learnt from."""
        return any(weight for name, weight in self if name != "ce")

    def misfits(self, student: ModelShape, teacher: ModelShape, known: Collection[str] = ()) -> Iterator[Problem]:
        """What can't be compared of two models of these shapes.

        known: losses of which it is known what of the teacher each part of the student answers to.
        """
        if self.attention_map and student.mixers and all(student.mixers):
            what = "every layer has a mixer in its attention's place, and a mixer has no map"
            yield Problem("loss.attention_map", what, "use attention_output")
        heads = teacher.num_attention_heads, student.num_attention_heads
        if self.attention_map and "attention_map" not in known and heads[0] != heads[1]:
            what = f"{heads[0]} heads a layer in the teacher, and {heads[1]} here"
            yield Problem("loss.attention_map", what, "use attention_output, which compares no heads")
        if teacher.hidden_size != student.hidden_size:
            for name in ("hidden", "attention_output"):
                if getattr(self, name) and name not in known:
                    what = f"the teacher's layers are {teacher.hidden_size} wide, and the model's {student.hidden_size}"
                    yield Problem(f"loss.{name}", what, "use kl, which compares logits")


HEADLESS_LOSS = LossWeights.model_validate({"kl": 0.0, "hidden": 1.0})
"""What is minimised where nothing was asked for and the model has no logits to compare."""


class StepOptions(BaseModel):
    """How many steps a training takes, and how: in the words of `transformers.TrainingArguments` where it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Literal["text", "generated"] = Field(
        "text", description="what to train on: the pipeline's train text, or text that the teacher writes (decoders)"
    )
    tokens: int = Field(100_000, ge=1, description="budget: at most so many tokens are trained on (at least one step)")
    sequence_length: int = Field(256, ge=2, description="tokens of one training sequence")
    batch_size: int = Field(4, ge=1, description="sequences of one optimiser step, over all processes")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = Field("cosine", description="after it")
    weight_decay: float = Field(0.0, ge=0, le=1, description="of AdamW, on matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is clipped to this norm")
    optim: Literal["adamw", "adamw_8bit"] = Field("adamw", description="AdamW of torch, or of bitsandbytes in 8 bits")
    precision: Precision = Field("auto", description="auto: bf16 where the GPU or CPU multiplies in it")

    @property
    def num_steps(self) -> int:
        """Optimiser steps that the budget allows, at least one."""
        return max(1, self.tokens // (self.batch_size * self.sequence_length))

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps together."""
        return self.num_steps * self.batch_size * self.sequence_length

    @property
    def trained_by(self) -> frozenset[str]:
        """The libraries that train: numpy draws the order of the text."""
        return frozenset({"accelerate", "numpy"} | ({"bitsandbytes"} if self.optim == "adamw_8bit" else set()))

    def meant(self, model: ModelShape) -> dict[str, Any]:
        """What null and auto mean for that model, and None for what has no say, by option: for a stage's key."""
        return {"precision": "bf16" if uses_bf16(self.precision) else "fp32"}

    def settled_for(self, model: ModelShape) -> dict[str, Any]:
        """The options that count, as a group of a stage's."""
        return counted(self, self.meant(model))

    @property
    def num_parts(self) -> int:
        """How many parts a step is divided into in this launch."""
        return num_processes()

    def indivisible(self) -> Iterator[Problem]:
        """Whether the sequences of a step can't be divided among the processes of this launch."""
        if self.batch_size % self.num_parts:
            what = f"{self.batch_size} sequences can't be divided into {self.num_parts} equal parts"
            each = f"{num_processes()} processes × {self.num_parts // num_processes()} accumulation steps"
            yield Problem("batch_size", what, f"{each} must divide it")

    def problems(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit `model`; `where` is the option's name."""
        if self.sequence_length > model.max_position_embeddings:
            what = f"{self.sequence_length} is more than the model's {model.max_position_embeddings} positions"
            yield Problem("sequence_length", what)
        if self.data == "generated" and model.family.kind == "encoder":
            what = f"{model.model_type} is an encoder, which writes no text"
            yield Problem("data", what, "use data: text")


class AlignOptions(StepOptions):
    """How mixers are taught, each alone, to say what the attention says that they replace."""

    tokens: int = Field(50_000, ge=1, description="budget: at most so many tokens are aligned on (at least one step)")
    batch_size: int = Field(2, ge=1, description="sequences of one optimiser step, over all processes")
    learning_rate: float = Field(
        3e-3, gt=0, le=1, description="peak learning rate of what is new; the copied projections have a tenth of it"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="each layer's gradient is clipped to this norm")

    def twin(self) -> Self:
        """The same, two steps long."""
        length = min(self.sequence_length, 16)
        changes = {"sequence_length": length, "batch_size": self.num_parts, "tokens": 2 * length * self.num_parts}
        return self.model_copy(update=changes)


class TrainingOptions(StepOptions):
    """Keys of the recovery engine."""

    loss: LossWeights = Field(
        LossWeights.model_validate({}), description="weights of the losses; left out: kl 1, or hidden 1 without a head"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="softens both distributions in `kl`")
    hidden_distance: Literal["cosine", "mse"] = Field("cosine", description="1 − cosine, or ‖s−t‖²/‖t‖² per token")
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts that a step is split into, to save memory")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third slower")
    eval_tokens: int = Field(
        2048, ge=2,
        description="tokens of the eval split that choose the best weights: always the same ones, so few do; student "
        "and teacher read them before the first step and at every evaluation",
    )  # fmt: skip
    eval_steps: int | None = Field(
        None, ge=1, description="evaluate and write a checkpoint every so many steps (default: a quarter of them)"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one"
    )

    @property
    def num_steps_between(self) -> int:
        """Steps from one evaluation to the next: a quarter of them where nothing is said."""
        return self.eval_steps or -(-self.num_steps // 4)

    @property
    def num_parts(self) -> int:
        """How many parts a step is divided into in this launch, one after the other or at once."""
        return self.gradient_accumulation_steps * num_processes()

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is learnt from, or writes the text."""
        return self.loss.needs_teacher or self.data == "generated"

    def meant(self, model: ModelShape) -> dict[str, Any]:
        """What null and auto mean for that model, and None for what has no say, by option: for a stage's key."""
        loss = self.loss if "loss" in self.model_fields_set or model.has_head else HEADLESS_LOSS
        return {
            **super().meant(model), "eval_steps": self.num_steps_between, "loss": loss,
            "temperature": self.temperature if loss.kl else None,
            "hidden_distance": self.hidden_distance if loss.hidden else None,
        }  # fmt: skip

    def problems(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together, or does not fit `model`; `where` is the option's name."""
        if not any(self.loss.model_dump().values()):
            yield Problem("loss", "every weight is 0, so there is nothing to learn", "set kl: 1.0")
        if self.loss.ce and model.family.kind == "encoder" and not model.fills_masks:
            what = f"{model.model_type} is an encoder, which predicts no next token"
            yield Problem("loss.ce", what, "use kl or hidden")
        if self.loss.kl or self.loss.skew_kl:
            yield from unjudged("loss", model)
        yield from self.loss.misfits(model, model)
        yield from super().problems(model)
        if self.batch_size % self.gradient_accumulation_steps:
            yield Problem(
                "gradient_accumulation_steps",
                f"{self.gradient_accumulation_steps} does not divide batch_size {self.batch_size}",
                "sequences of a step are split into equal parts",
            )

    def twin_options(self) -> dict[str, object]:
        """Changes that make a training two steps long."""
        length = min(self.sequence_length, 16)
        return {
            "sequence_length": length, "batch_size": self.num_parts, "eval_steps": None,
            "tokens": 2 * length * self.num_parts, "eval_tokens": 2 * length,
        }  # fmt: skip
