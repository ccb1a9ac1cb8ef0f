"""What a stage is: one frozen pydantic class whose fields are its YAML keys.

`run` reads one artifact (and others by role) and writes one. Everything else here is said without torch, so that
`compress check` and `compress plan` know a pipeline's shape before anything is computed.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from compress.artifact import Artifact, Format, Metrics
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import counted, limited

if TYPE_CHECKING:
    from compress.data.text import TextData

SOURCE = "source"
"""The name of the untouched model in `teacher:`, `require:` and the like."""
INPUT = "input"
"""The role of the artifact that the stage before hands on."""


class Target(BaseModel):
    """Where latency is measured: an ONNX Runtime execution provider and the number of intra-op threads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: Literal["CPUExecutionProvider"] = Field("CPUExecutionProvider", description="ONNX Runtime's name")
    threads: int = Field(2, ge=1, le=1024, description="intra-op threads, pinned, the same for every peer")


@dataclass(frozen=True)
class Ref:
    """An artifact that a stage reads beside its input: an earlier stage's (or `source`), taken through hidden stages.

    `Ref("source", via=(("export-onnx", {"format": "int4"}),))` is the source model's own int4 export: an ordinary
    cached node of the plan that the file does not spell out. `Ref("input", via=…)` is what becomes of the stage's own
    input that way.
    """

    of: str
    via: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class OtherModel:
    """A model from outside the pipeline that a stage reads, known by its content.

    text: names it as a pipeline's `model` does. readable: the methods of quantisation that its weights may have.
    """

    text: str
    readable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """What is known of a stage's inputs before anything runs.

    shape: of the model that it works on. formats: of all inputs, by role. rounding: the roles of those whose
    activations ONNX Runtime rounds, or will once they are exported.
    """

    shape: ModelShape
    formats: Mapping[str, Format]
    rounding: frozenset[str] = frozenset()


def unjudged(where: str, model: ModelShape) -> Iterator[Problem]:
    """What is wrong where a model is judged or taught by the softmax of its logits and its head is of another kind."""
    if model.unjudged:
        what = f"the model has {model.unjudged}, which a softmax says nothing of"
        yield Problem(where, what, "rows and tasks for such heads do not exist yet; export-onnx and latency take them")


class Progress(Protocol):
    """Moves a progress bar on: `advance(steps, note)`."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@dataclass(frozen=True)
class Reporter:
    """Where a stage says what it does. Progress goes to stderr, and only to a terminal; the log gets everything."""

    log: logging.Logger = field(default_factory=lambda: logging.getLogger("compress"))
    bar: Callable[[str, int], contextlib.AbstractContextManager[Progress]] | None = None

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Progress]:
        """A bar of `total` steps named `what`, with its ETA; silent where there is no terminal."""
        if self.bar is None:
            yield lambda steps=1, note="": None
        else:
            with self.bar(what, total) as advance:
                yield advance


@dataclass(frozen=True)
class StageContext:
    """What a stage is given to run.

    out: an empty directory for the artifact's files. work: a directory that survives kills (for checkpoints and
    `compress.units`), deleted when the stage is done. inputs: artifacts by role, `input` among them. data: the
    pipeline's text. A stage writes nowhere else.
    """

    out: Path
    work: Path
    inputs: Mapping[str, Artifact]
    data: TextData
    seed: int
    target: Target
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def input(self) -> Artifact:
        """The artifact that the stage before handed on."""
        return self.inputs[INPUT]


class Stage(BaseModel, ABC):
    """One step of a pipeline. Subclasses declare the class variables and `run`; their fields are their YAML keys.

    name: as in the pipeline file. version: raised when the same options give another artifact. accepts / returns:
    formats of the input and of what is written (`measurement` leaves the model as it is for the next stage).
    kinds: `decoder`, `encoder` or both. splits: those of the text that it reads, whatever its options.
    measures_hardware: its figures belong to this machine, so the machine is part of its key. reads_target: so does what
    it writes to `target`. seeded: its result depends on the seed, whatever its options. libraries: those that it
    computes with, whatever its options. plots: what it draws, a caption by file name. example: options of a small
    typical use, for the support matrix; needed only where the defaults alone are not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str]
    accepts: ClassVar[frozenset[Format]]
    returns: ClassVar[Format]
    kinds: ClassVar[frozenset[str]] = frozenset({"decoder", "encoder"})
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset()
    measures_hardware: ClassVar[bool] = False
    reads_target: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    libraries: ClassVar[frozenset[str]] = frozenset({"torch", "transformers"})
    plots: ClassVar[Mapping[str, str]] = {}
    example: ClassVar[Mapping[str, Any]] = {}

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The splits of the text that it reads with these options."""
        return self.splits

    def uses_seed(self) -> bool:
        """Whether its result depends on the seed with these options."""
        return self.seeded

    def settled(self, given: Given) -> Mapping[str, Any]:
        """The options that its result depends on, as its key has them: see `counted`.

        What null and auto stand for is in their place, what has no say or is told by an input's key is left out.
        """
        return counted(self)

    def computes_with(self, given: Given) -> frozenset[str]:
        """The libraries whose minor versions its result depends on; `python` is the interpreter."""
        return self.libraries

    def rounds_activations(self, given: Given) -> bool:
        """Whether ONNX Runtime rounds the activations of what it returns, or will once it is exported."""
        return INPUT in given.rounding

    def depends_on_cpu(self, given: Given) -> bool:
        """Whether its result depends on the CPU's vector instructions beyond float32's last digits."""
        return False

    def before(self, accepted: Format) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Stages that this one is short for, put before it, given the format that it would otherwise receive."""
        return ()

    def inputs(self) -> Mapping[str, Ref | OtherModel]:
        """The artifacts read beside the input, by role."""
        return {}

    def fitted(self, model: ModelShape) -> Self:
        """The same for such a model: a default that is too long for it becomes what it reads; what is given stays."""
        return limited(self, model.max_position_embeddings)

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """What is wrong with these options for this model; `where` is the option's name alone (`keep`)."""
        yield from ()

    def hides_tokens(self) -> bool:
        """Whether it has a masked language model read text with hidden tokens, so that there must be a mask token."""
        return False

    def check_input(self, previous: Stage) -> Iterator[Problem]:
        """What is wrong with these options for what `previous` makes: it is this stage's input."""
        yield from ()

    def measure_first(self, log: logging.Logger) -> None:
        """Measure what null stands for on this machine, where the shape of what comes out depends on it.

        Called before a plan is made; what it finds is kept in the user's cache. `check` measures nothing.
        """

    def shape(self, model: ModelShape) -> ModelShape:
        """The shape of the model that comes out."""
        return model

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Estimated bytes of the weights of what comes out, given its shape and the bytes of what came in."""
        return before

    def held_bytes(self, model: ModelShape) -> float | None:
        """Estimated bytes that it holds at once; None where that is each model that it reads, in float32."""
        return None

    def forward_tokens(self, model: ModelShape) -> float:
        """Tokens that it runs forward through each model that it reads, roughly: for the estimate of its time."""
        if not self.reads() and not self.measures_hardware:
            return 1_000
        tokens = getattr(self, "tokens", None)
        return tokens if isinstance(tokens, int) else 20_000

    def produces(self) -> Sequence[str]:
        """The figures that it measures, as `require` names them (`perplexity`, `tpot_ms@128`)."""
        return ()

    def twin(self) -> Self:
        """The same stage made small enough to run on a two-layer random twin in seconds."""
        return self

    def check_source(self, folder: Path, data: TextData) -> None:
        """Raises StageFailed for what the source's own tokenizer and text say against these options.

        Said before the dry run, whose twin has a few tokens only.
        """

    @abstractmethod
    def run(self, context: StageContext) -> Metrics:
        """Write the artifact's files into `context.out` and return its figures by subject.

        Raises StageFailed for what the user can fix.
        """
