"""Small stages that run nothing, so that the core is tested without the real ones. A test asks for `fakes`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from compress import registry
from compress.artifact import Format, Metrics
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.stage import SOURCE, Ref, Stage, StageContext

TORCH: frozenset[Format] = frozenset({"torch"})
ANY: frozenset[Format] = frozenset({"torch", "quantized", "onnx"})


class _Fake(Stage):
    def run(self, context: StageContext) -> Metrics:
        return {}


class Shrink(_Fake):
    """Fewer layers."""

    name: ClassVar[str] = "shrink"
    summary: ClassVar[str] = "fewer layers"
    accepts: ClassVar[frozenset[Format]] = TORCH
    returns: ClassVar[Format] = "torch"
    example: ClassVar[Mapping[str, Any]] = {"keep": 2}

    keep: int | float | list[int] = Field(description="Layers to keep")
    by: Literal["first", "last"] = Field("first", description="which")
    rate: float = Field(0.1, ge=0, le=1, description="how fast")
    slow: bool = Field(False, description="whether slowly")

    def check(self, model: ModelShape) -> Iterator[Problem]:
        if isinstance(self.keep, int) and not 0 < self.keep < model.num_hidden_layers:
            yield Problem("keep", f"{self.keep} of {model.num_hidden_layers} layers", "keep fewer")

    def shape(self, model: ModelShape) -> ModelShape:
        return replace(model, num_hidden_layers=self.keep) if isinstance(self.keep, int) else model


class Tune(_Fake):
    """Towards a teacher."""

    name: ClassVar[str] = "tune"
    summary: ClassVar[str] = "towards a teacher"
    accepts: ClassVar[frozenset[Format]] = TORCH
    returns: ClassVar[Format] = "torch"
    kinds: ClassVar[frozenset[str]] = frozenset({"decoder"})

    teacher: str = Field(SOURCE, description="the teacher")

    def inputs(self) -> Mapping[str, Ref]:
        return {"teacher": Ref(self.teacher)}


class Round(_Fake):
    """Codes for weights."""

    name: ClassVar[str] = "round"
    summary: ClassVar[str] = "codes for weights"
    accepts: ClassVar[frozenset[Format]] = TORCH
    returns: ClassVar[Format] = "quantized"

    bits: int = Field(4, ge=2, le=8, description="bits of a code")


class Pack(_Fake):
    """To ONNX."""

    name: ClassVar[str] = "pack"
    summary: ClassVar[str] = "to ONNX"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch", "quantized"})
    returns: ClassVar[Format] = "onnx"

    format: Literal["fp32", "int4"] = Field("fp32", description="of the weights")

    def before(self, accepted: Format) -> Sequence[tuple[str, Mapping[str, Any]]]:
        return [("round", {"bits": 4})] if self.format == "int4" and accepted == "torch" else []

    def check_input(self, previous: Stage) -> Iterator[Problem]:
        if self.format == "int4" and isinstance(previous, Round) and previous.bits != 4:
            yield Problem("format", f"what comes in has {previous.bits} bits", "round to 4")


class Judge(_Fake):
    """Quality."""

    name: ClassVar[str] = "judge"
    summary: ClassVar[str] = "quality"
    accepts: ClassVar[frozenset[Format]] = ANY
    returns: ClassVar[Format] = "measurement"

    against: str = Field(SOURCE, description="compared with")

    def inputs(self) -> Mapping[str, Ref]:
        return {self.against: Ref(self.against)}

    def produces(self) -> Sequence[str]:
        return ("perplexity", "kl")


class Time(_Fake):
    """Speed."""

    name: ClassVar[str] = "time"
    summary: ClassVar[str] = "speed"
    accepts: ClassVar[frozenset[Format]] = frozenset({"onnx"})
    returns: ClassVar[Format] = "measurement"
    measures_hardware: ClassVar[bool] = True

    prompts: tuple[int, ...] = Field((128,), min_length=1, description="prompt lengths")

    def inputs(self) -> Mapping[str, Ref]:
        return {
            "source": Ref(SOURCE, via=(("pack", {}),)),
            "source-int4": Ref(SOURCE, via=(("pack", {"format": "int4"}),)),
        }

    def produces(self) -> Sequence[str]:
        return [f"tpot_ms@{prompt}" for prompt in self.prompts]


STAGES = {cls.name: cls for cls in (Shrink, Tune, Round, Pack, Judge, Time)}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes these the only stages there are."""
    points = {name: EntryPoint(name, f"fake_stages:{cls.__name__}", registry.GROUP) for name, cls in STAGES.items()}
    monkeypatch.setattr(registry, "_points", lambda: points)
