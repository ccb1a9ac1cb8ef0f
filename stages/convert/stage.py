"""`convert-attention`: linear-time mixers in place of the softmax attention of some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.artifact import Format, Metrics
from compress.errors import Problem
from compress.mixers.spec import SPECS, WINDOWED, MixerSpec
from compress.models.anatomy import ModelShape
from compress.models.layer_choice import Layers, LayersOrNone, count
from compress.options import counted, limited
from compress.stage import SOURCE, Given, Ref, Stage, StageContext, unjudged
from compress.stages.convert.layers import (
    To,
    at_random,
    candidates,
    converted_shape,
    evenly,
    impossible,
    misfitting_window,
    misnumbered,
    to_convert,
)
from compress.train.options import AlignOptions, StepOptions, TrainingOptions

TEACHER = "teacher"
FIGURES = ("num_softmax_layers", "state_mb", "kv_cache_mb@4096")
SEEN, NEAR = 128, 64
"""Tokens of a window where none is given: of `sliding`, and beside linear attention."""


class HybridTraining(TrainingOptions):
    """Training of a model with mixers."""

    mixer_learning_rate: float = Field(
        1e-3, gt=0, le=1, description="peak learning rate of what mixers have beside the attention's own projections"
    )


_ALIGN, _TRAINING = AlignOptions.model_validate({}), HybridTraining.model_validate({})


class ConvertAttention(Stage):
    """Gives layers mixers whose cost and memory do not grow with the text, made from the layers' own attention.

    Every layer that can be converted gets a mixer with its attention's projections; all of them learn at once to give
    what the attention gives (align); the layers that lose least by it are converted (select); the model that comes out
    is brought back to its teacher (distill). A killed stage goes on from its last checkpoint. Where layers are
    `linear` already, `to: mamba2` goes on from those, and starts by computing the same.
    """

    name: ClassVar[str] = "convert-attention"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "give layers linear attention, Mamba-2 or a sliding window in place of softmax attention"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    plots: ClassVar[Mapping[str, str]] = {
        "scores.png": "what converting each layer costs; the cheapest are converted",
        "alignment.png": "how each layer's mixer came to say what its attention says",
        "loss.png": "loss of the distillation; the dotted line is the step that is kept",
    }
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train", "eval"})
    example: ClassVar[Mapping[str, Any]] = {"to": "linear", "convert": 1}

    to: To = Field(
        description="linear: linear attention, normalised, with learned Hedgehog features; gated-linear: that with a "
        "decay and a gate for each head; mamba2: that with a convolution, learned steps and decay, and a gate; "
        "gated-delta: the gated delta rule; sliding: softmax over the last `window` tokens"
    )
    keep: LayersOrNone | None = Field(
        None, description="layers that stay softmax: a number, a share (0.2) or a list of indices; left out: none"
    )
    convert: Layers | None = Field(None, description="layers to convert, in place of keep: a number, a share or a list")
    select: Literal["kl-proxy", "kl", "uniform", "random", "explicit"] = Field(
        "kl-proxy",
        description="kl-proxy: convert those whose mixer, alone in the teacher, moves what it says least; kl: give one "
        "layer of the converted model its softmax back, train a little, and keep those with the lowest loss: far "
        "dearer; uniform: softmax layers evenly spaced; random: by the seed; explicit: keep or convert lists them",
    )
    window: int | None = Field(
        None,
        ge=0,
        description=f"tokens, itself included, that a `sliding` layer sees ({SEEN} where left out), or that `linear` "
        f"and `gated-linear` in a decoder see with softmax, beside linear attention to those before ({NEAR} where left "
        "out, or half a text where that is less; 0: none)",
    )
    feature_map: Literal["hedgehog", "softmax"] | None = Field(
        None,
        description="hedgehog: softmax of ±Wx with a W learned for each head, D features from D channels twice over; "
        "softmax: of x as it is, half the state and fewer operators; left out: hedgehog, or what is there already",
    )
    init: Literal["attention", "random"] = Field(
        "attention", description="what mixers begin with; random is a control that knows nothing of the attention"
    )
    teacher: str = Field(SOURCE, description="source, or the id of an earlier stage: what distill learns from")
    align: AlignOptions | None = Field(_ALIGN, description="each mixer alone learns what its attention says; or null")
    select_tokens: int = Field(2048, ge=1, description="tokens of the train split, set apart, that kl-proxy and kl use")
    kl_tokens: int = Field(16_384, ge=1, description="tokens that `select: kl` trains on, for each layer")
    distill: HybridTraining | None = Field(
        _TRAINING, description="the whole model learns what its teacher says, as in the stage distill; or null"
    )

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.keep is not None and self.convert is not None:
            raise ValueError("give either keep or convert")
        if self.window is not None and self.to not in {"sliding", *WINDOWED}:
            raise ValueError(f"window is for sliding, linear and gated-linear, and {self.to} has none: remove it")
        if self.to == "sliding" and self.window == 0:
            raise ValueError("a window of 0 tokens shows a sliding layer nothing: give at least 1")
        if self.feature_map is not None and self.to not in WINDOWED:
            raise ValueError(f"feature_map is for linear and gated-linear, and {self.to} has none to choose: remove it")
        if self.select == "explicit" and not self._listed:
            raise ValueError("select: explicit needs a list of layers: give keep or convert as a list")
        if self._listed and self.select != "explicit" and "select" in self.model_fields_set:
            raise ValueError("select has no say where the layers are listed: remove it, or give a number")
        return self

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """No training text where none is trained or judged on; the eval split where the whole model is trained."""
        sources = [*self.trainings.values(), *([self.align or _ALIGN] if self._may_measure else [])]
        written = all(each.data == "generated" for each in sources)
        return self.splits - ({"train"} if written else set()) - (set() if self.distill else {"eval"})

    def hides_tokens(self) -> bool:
        """Where anything is trained or judged on."""
        return bool(self.trainings) or self._may_measure

    def uses_seed(self) -> bool:
        """Where anything is trained or drawn."""
        drawn = self.init == "random" or (self.select == "random" and not self._every and not self._listed)
        return drawn or bool(self.trainings) or (self.select == "kl" and self._may_measure)

    def settled(self, given: Given) -> Mapping[str, Any]:
        """With numbers of layers for shares, and the teacher told by an input."""
        model, total = given.shape, given.shape.num_hidden_layers
        asked = {name: value for name in ("keep", "convert") if (value := getattr(self, name))}
        number = {name: sorted(v) if isinstance(v, tuple) else count(v, total) for name, v in asked.items()}
        is_open = model.layers_guessed or isinstance(to_convert(model, self.to, self.keep, self.convert), int)
        chosen = is_open and not self._every and not self._listed
        measures = is_open and self._may_measure
        meant = {
            "keep": None, "convert": None, **number, "teacher": None, "window": self.window_in(model) or None,
            "feature_map": (self.feature_map or "hedgehog") if self.to in WINDOWED else None,
            "select": self.select if chosen else None, "select_tokens": self.select_tokens if measures else None,
            "kl_tokens": self.kl_tokens if measures and self.select == "kl" else None,
            **{name: options.settled_for(model) for name, options in self.trainings.items()},
        }  # fmt: skip
        if measures and not self.distill and (self.select == "kl" or not self.align):  # judged as by default, then
            return {**counted(self, meant), "judge": HybridTraining.model_validate({}).settled_for(model)}
        return counted(self, meant)

    def computes_with(self, given: Given) -> frozenset[str]:
        trained = [*self.trainings.values(), *([_TRAINING] if self.select == "kl" and self._may_measure else [])]
        return self.libraries.union(*(each.trained_by for each in trained))

    def inputs(self) -> Mapping[str, Ref]:
        """The teacher."""
        return {TEACHER: Ref(self.teacher)}

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the model has such layers, its attention can be carried over, and the text is long enough."""
        wrong = list(impossible(model, self.to)) or list(misnumbered(model, self.to, self.keep, self.convert))
        yield from wrong
        for name, options in self.trainings.items():
            for problem in options.problems(model):
                yield replace(problem, where=f"{name}.{problem.where}")
        length = self.align_options(model).sequence_length
        if not wrong and self.preselected(model, 0) is None and self.select_tokens < length:
            what = f"{self.select_tokens} tokens do not fill one block of {length}"
            yield Problem("select_tokens", what, f"at least {length}")
        if self._may_measure and self.preselected(model, 0) is None:
            yield from unjudged("select", model)
        lengths = {f"{name}.sequence_length": each.sequence_length for name, each in self.trainings.items()}
        yield from misfitting_window(model, self.to, self.window_in(model), lengths)
        if self.feature_map == "softmax" and model.family.kind == "encoder":
            what = f"{model.model_type} takes hedgehog's matrices into its projections, where they cost nothing"
            yield Problem("feature_map", what, "remove it")

    def shape(self, model: ModelShape) -> ModelShape:
        """The model with mixers; in which of its layers is a guess where that is measured or drawn."""
        known = None if self.select == "random" else self.preselected(model, 0)
        mixed = converted_shape(model, known or self._spread(model), self.mixer(model), guessed=known is None)
        return mixed.in_float32

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter in float32: at most."""
        return model.weight_bytes

    def forward_tokens(self, model: ModelShape) -> float:
        """Those of the trainings and of the choice, which runs half of the layers, on average, for each candidate."""
        tokens = sum(each.num_tokens for each in self.trainings.values())
        each = {"kl": self.kl_tokens, "kl-proxy": self.select_tokens / 6}.get(self.select, 0)
        return tokens + model.num_hidden_layers * each

    def produces(self) -> Sequence[str]:
        """How many layers attend with softmax, and what a sequence keeps in memory, in MB (1e6 bytes)."""
        return FIGURES

    def twin(self) -> Self:
        """One layer converted, or all of them, in two steps of each training."""
        align = self.align and self.align.twin()
        changes = {
            "keep": None, "convert": None if self._every else 1,
            "window": 8 if self.sliding_window else self.window and 8,
            "select": "uniform" if self.select == "explicit" else self.select, "kl_tokens": 1,
            "select_tokens": (align or _ALIGN).sequence_length, "align": align,
            "distill": self.distill and self.distill.model_copy(update=self.distill.twin_options()),
        }  # fmt: skip
        return self.model_copy(update=changes)

    def run(self, context: StageContext) -> Metrics:
        """Convert, and write the model with the scores, losses and plots of how it came about."""
        from compress.models.load import save_model
        from compress.stages.convert.conversion import convert, prepare
        from compress.stages.convert.record import metrics, write_records
        from compress.train.distributed import everywhere

        conversion = everywhere(convert, prepare(self, context), context.reporter)
        save_model(conversion.model, context.input.path, context.out)
        write_records(self, conversion, context)
        return metrics(conversion, context)

    @property
    def _listed(self) -> bool:
        """Whether the options say which layers, and not how many."""
        return isinstance(self.keep, tuple) or isinstance(self.convert, tuple)

    @property
    def _every(self) -> bool:
        """Whether every layer that can be converted is."""
        return self.convert is None and self.keep in (None, 0)

    @property
    def _may_measure(self) -> bool:
        """Whether it is measured which layers to convert, unless their number leaves no choice."""
        return self.select in ("kl", "kl-proxy") and not self._listed and not self._every

    @property
    def trainings(self) -> Mapping[str, StepOptions]:
        """The trainings that are asked for, by option."""
        both = {"align": self.align, "distill": self.distill}
        return {name: options for name, options in both.items() if options is not None}

    def align_options(self, model: ModelShape) -> AlignOptions:
        """How blocks of text for `model` are made to be aligned or judged on, also where only judging needs them."""
        return self.align or limited(_ALIGN, model.max_position_embeddings)

    def mixer(self, model: ModelShape) -> MixerSpec | None:
        """What layers of `model` get; None for a sliding window."""
        if self.to == "sliding":
            return None
        spec = replace(SPECS[self.to], window=self.window_in(model))
        return replace(spec, feature_map=self.feature_map) if self.feature_map else spec

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a `sliding` layer sees; None where there is no such layer."""
        return (self.window or SEEN) if self.to == "sliding" else None

    def window_in(self, model: ModelShape) -> int:
        """Tokens of the window that layers of `model` get; 0 where they get none."""
        given = self.sliding_window or self.window
        if given is not None:
            return given
        if self.to not in WINDOWED or model.family.kind == "encoder":
            return 0
        lengths = (model.max_position_embeddings, *(each.sequence_length for each in self.trainings.values()))
        return min(NEAR, min(lengths) // 2)

    def preselected(self, model: ModelShape, seed: int) -> list[int] | None:
        """The layers to convert, where nothing has to be measured for it."""
        chosen = to_convert(model, self.to, self.keep, self.convert)
        if isinstance(chosen, list):
            return chosen
        if self.select == "random":
            return at_random(candidates(model, self.to), chosen, seed)
        return self._spread(model) if self.select == "uniform" else None

    def _spread(self, model: ModelShape) -> list[int]:
        free, chosen = candidates(model, self.to), to_convert(model, self.to, self.keep, self.convert)
        return chosen if isinstance(chosen, list) else evenly(free, len(free) - chosen)
