"""From a pipeline file to a plan: the source's shape, the graph, the keys. Nothing is computed and no torch imported.

The source model is fetched only where its `config.json` is not at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compress.artifact import Artifact
from compress.data.text import TextData, check_special_ids, check_tokenizer
from compress.errors import CompressError, InvalidInput
from compress.hardware import check_threads
from compress.models.anatomy import ModelShape, shape_of
from compress.models.sources import Source, parse_source, source_artifact
from compress.pipeline.file import Pipeline
from compress.pipeline.graph import Graph, resolve
from compress.runner.plan import Plan, make_plan
from compress.runner.record import PIPELINE, load_record
from compress.stage import SOURCE, Reporter

_SHARED = (
    "warning: %s and %s are both named %r and share %s: a run of one replaces the record and the report of the other, "
    "and `compress gc` lists what only the other uses; what is finished stays till then. Give one another name"
)


@dataclass(frozen=True)
class Prepared:
    """A pipeline that is ready to run in `plan.run_dir`. `shape` is the source model's; `others` are by id."""

    pipeline: Pipeline
    source: Source
    others: Mapping[str, Source]
    data: TextData
    graph: Graph
    shape: ModelShape
    plan: Plan
    reporter: Reporter
    _fetched: dict[str, Artifact] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def source_artifact(self) -> Artifact:
        """The source model, fetched when it is first asked for. Raises StageFailed where its tokenizer doesn't fit."""
        from compress.models.load import has_tokenizer, load_tokenizer

        folder = self.source.fetch(self.reporter)
        check_special_ids(folder, self.shape.vocab_size)
        if has_tokenizer(folder):
            check_tokenizer(load_tokenizer(folder), self.shape.vocab_size)
        return source_artifact(folder, self.plan.source_key)

    def model(self, id: str) -> Artifact:
        """The model that the plan starts from under that id, fetched when it is first asked for."""
        if id == SOURCE:
            return self.source_artifact
        if id not in self._fetched:
            self._fetched[id] = source_artifact(self.others[id].fetch(self.reporter), self.plan.sources[id])
        return self._fetched[id]

    def resolved(self) -> dict[str, Mapping[str, str]]:
        """What each model and text turned out to be whose name alone does not say it, as far as it is fetched."""
        found = {source.text: source.resolved() for source in (self.source, *self.others.values())}
        return {name: facts for name, facts in (found | self.data.resolved()).items() if facts}

    def shape_of(self, id: str) -> ModelShape:
        """The shape of that model; of another one that is not fetched yet, the source's stands for it."""
        config = self.others[id].config() if id in self.others else None
        return shape_of(config) if config else self.shape


@contextlib.contextmanager
def before_any_stage() -> Iterator[None]:
    """Turn whatever the user can fix into InvalidInput: nothing ran yet."""
    try:
        yield
    except InvalidInput:
        raise
    except CompressError as error:
        raise InvalidInput.of([error.problem]) from error


@before_any_stage()
def prepare(pipeline: Pipeline, run_dir: Path, reporter: Reporter) -> Prepared:
    """Resolve and plan `pipeline`. Raises InvalidInput for a model, data or options that do not go together, or that
    this machine can't do. Warns where the run in `run_dir` is another file's.
    """
    check_threads(pipeline.target.threads, "target.threads")
    if other := _other_file(pipeline, run_dir):
        reporter.log.warning(_SHARED, pipeline.path, other, pipeline.name, run_dir)
    source = parse_source(pipeline.model, "model")
    config = source.config()
    if config is None:
        source.fetch(reporter)
        config = source.config() or {}
    shape = shape_of(config)
    for entry in pipeline.stages:
        entry.stage.measure_first(reporter.log)
    graph = resolve(pipeline, shape)
    data = TextData(pipeline.data)
    others = {id: parse_source(other.text, id, readable=other.readable) for id, other in graph.models.items()}
    sources = {id: each.key() for id, each in {SOURCE: source, **others}.items()}
    plan = make_plan(
        graph, sources=sources, data=data, seed=pipeline.seed, target=pipeline.target, run_dir=run_dir
    )
    return Prepared(pipeline, source, others, data, graph, shape, plan, reporter)


def _other_file(pipeline: Pipeline, run_dir: Path) -> str | None:
    """The pipeline file that the run in `run_dir` is of, where that is another one.

    A file that was moved is not, nor is a copy: the text is the same, or the old place empty.
    """
    try:
        last = load_record(run_dir).file
    except InvalidInput:
        return None
    if last is None or last == str(pipeline.path.resolve()) or not Path(last).is_file():
        return None
    copy = run_dir / PIPELINE
    return None if copy.is_file() and copy.read_bytes() == pipeline.text.encode() else last
