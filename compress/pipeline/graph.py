"""The pipeline as a graph of artifacts: what each stage reads, the stages that the file does not spell out, the shapes.

The file is a list. `Stage.before` and `Ref.via` add hidden stages; identical ones are one node. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.artifact import Format
from compress.errors import InvalidInput, Problem
from compress.models.anatomy import ModelShape
from compress.pipeline.document import shown
from compress.pipeline.file import Entry, Pipeline, in_order
from compress.pipeline.require import unproven
from compress.registry import did_you_mean, stage_class, stage_names
from compress.stage import INPUT, SOURCE, OtherModel, Ref, Stage


@dataclass(frozen=True)
class GraphNode:
    """One stage to run.

    inputs: ids of what it reads, by role. hidden: not spelt out in the file; its id has a slash (`source/export-onnx`).
    shape: of the model that it makes, or for a measurement works on; None where it is not known.
    """

    id: str
    stage: Stage
    inputs: Mapping[str, str]
    hidden: bool
    place: str
    shape: ModelShape | None = None


@dataclass(frozen=True)
class Graph:
    """The nodes in an order in which they can run. The node `source`, of that shape (None: unknown), is implied.

    models: the other models that nodes read, by an id that no stage can have (`teacher:org/name`).
    """

    nodes: tuple[GraphNode, ...]
    source_shape: ModelShape | None = None
    models: Mapping[str, OtherModel] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """The id of the last artifact that holds a model: what the pipeline is for."""
        return next((n.id for n in reversed(self.nodes) if n.stage.returns != "measurement" and not n.hidden), SOURCE)


def resolve(pipeline: Pipeline, shape: ModelShape | None) -> Graph:
    """The graph of a pipeline for a source model of that shape (None: unknown, so not checked against).

    Raises InvalidInput with every problem: formats that do not meet, names of no stage, options that do not fit the
    model, figures in `require` that nothing measures.
    """
    graph, problems = build_graph(pipeline.stages, shape)
    problems += unproven(graph, pipeline.require)
    if problems:
        raise InvalidInput.of(in_order(problems))
    return graph


def build_graph(entries: Sequence[Entry], shape: ModelShape | None) -> tuple[Graph, list[Problem]]:
    """The graph of these stages, as far as it makes sense, and what is wrong with it."""
    builder = _Builder(entries, shape)
    for entry in entries:
        builder.append(entry)
    return Graph(tuple(builder.nodes), shape, builder.models), builder.problems


class _Builder:
    def __init__(self, entries: Sequence[Entry], shape: ModelShape | None) -> None:
        self._all_ids = [entry.id for entry in entries]
        self.nodes: list[GraphNode] = []
        self.models: dict[str, OtherModel] = {}
        self.problems: list[Problem] = []
        self._current = SOURCE
        self._formats: dict[str, Format] = {SOURCE: "torch"}
        self._shapes: dict[str, ModelShape | None] = {SOURCE: shape}
        self._entries: list[Entry] = []

    def append(self, entry: Entry) -> None:
        """Put a stage of the file, and the hidden ones that it needs, behind those that are there."""
        input_id = self._through(self._current, entry.stage.before(self._formats[self._current]), entry)
        self._check_format(entry, entry.stage, input_id)
        stage = self._fitted(entry.stage, input_id)
        self._add(entry.id, stage, self._inputs(entry, stage, input_id), entry, hidden=False)
        self._entries.append(entry)
        if entry.stage.returns != "measurement":
            self._current = entry.id

    def _through(self, id_: str, stages: Sequence[tuple[str, Mapping[str, Any]]], entry: Entry) -> str:
        """The id of what comes out where the artifact `id_` goes through hidden stages."""
        for name, options in stages:
            stage = stage_class(name).model_validate(dict(options))
            id_ = self._through(id_, stage.before(self._formats[id_]), entry)
            self._check_format(entry, stage, id_)
            stage = self._fitted(stage, id_)
            inputs = self._inputs(entry, stage, id_)
            same = [node.id for node in self.nodes if node.stage == stage and node.inputs == inputs]
            id_ = same[0] if same else self._add(self._free_id(f"{id_}/{name}"), stage, inputs, entry, hidden=True)
        return id_

    def _free_id(self, wanted: str) -> str:
        count = sum(node.id == wanted or node.id.startswith(f"{wanted}-") for node in self.nodes)
        return f"{wanted}-{count + 1}" if count else wanted

    def _add(self, id_: str, stage: Stage, inputs: Mapping[str, str], entry: Entry, *, hidden: bool) -> str:
        makers = (node.stage for node in self.nodes if node.id == inputs[INPUT])
        self.problems += [_placed(p, entry, stage, hidden) for maker in makers for p in stage.check_input(maker)]
        shape = self._shapes[inputs[INPUT]]
        if shape is not None:
            found = _misfits(entry, stage, shape, hidden)
            self.problems += found
            shape = shape if found else stage.shape(shape)
        self.nodes.append(GraphNode(id_, stage, inputs, hidden, entry.place, shape))
        self._formats[id_] = stage.returns
        self._shapes[id_] = shape
        return id_

    def _fitted(self, stage: Stage, input_id: str) -> Stage:
        shape = self._shapes[input_id]
        return stage if shape is None else stage.fitted(shape)

    def _check_format(self, entry: Entry, stage: Stage, input_id: str) -> None:
        format_ = self._formats[input_id]
        if format_ not in stage.accepts:
            makers = [name for name in stage_names() if _turns(stage_class(name), format_, stage.accepts)]
            fix = f"move it before {input_id!r}" if stage.returns != format_ else f"leave out this or {input_id!r}"
            fix = f"put {' or '.join(map(repr, makers))} before it" if makers else fix
            what = f"takes {_listed(stage.accepts)}, but what {input_id!r} hands on is {format_}"
            self.problems.append(Problem(entry.place, what, fix))

    def _inputs(self, entry: Entry, stage: Stage, input_id: str) -> dict[str, str]:
        """The ids of all that `stage` reads, by role."""
        found = {INPUT: input_id}
        for role, ref in stage.inputs().items():
            if isinstance(ref, OtherModel):
                found[role] = f"{role}:{ref.text}"
                self.models[found[role]] = ref
            elif ref.of == INPUT and self._formats[input_id] in stage.accepts:
                found[role] = self._through(input_id, ref.via, entry)
            elif ref.of != INPUT and self._is_usable(entry, stage, role, ref):
                found[role] = self._through(ref.of, ref.via, entry)
        return found

    def _is_usable(self, entry: Entry, stage: Stage, role: str, ref: Ref) -> bool:
        place = _place_of_reference(entry, role, ref)
        earlier = [other.id for other in self._entries]
        if ref.of != SOURCE and ref.of not in earlier:
            why = " (it comes later)" if ref.of in self._all_ids else ""
            why = " (that is this one itself)" if ref.of == entry.id else why
            fix = did_you_mean(ref.of, [SOURCE, *self._models()])
            self.problems.append(Problem(place, f"{shown(ref.of)} is no earlier stage{why}", fix))
            return False
        twins = [other.id for other in self._entries if other.stage.name == ref.of]
        if f"{ref.of}-2" in twins:
            what = f"{ref.of!r} may mean {' or '.join(map(repr, twins))}"
            self.problems.append(Problem(place, what, "give the one that is meant an `id:` of its own"))
            return False
        format_ = self._formats[ref.of]
        if format_ == "measurement" or (not ref.via and format_ not in stage.accepts | {"torch"}):
            holds = "holds figures and no model" if format_ == "measurement" else f"is {format_}"
            what = f"{ref.of!r} {holds}, and {stage.name} can't read that as {role}"
            usable = [id_ for id_ in self._models() if self._formats[id_] in stage.accepts | {"torch"}]
            self.problems.append(Problem(place, what, f"name one of {', '.join([SOURCE, *usable])}"))
            return False
        return True

    def _models(self) -> list[str]:
        return [entry.id for entry in self._entries if entry.stage.returns != "measurement"]


def _misfits(entry: Entry, stage: Stage, shape: ModelShape, hidden: bool) -> list[Problem]:
    """What is wrong with a stage for a model of that shape, placed."""
    if shape.family.kind not in stage.kinds:
        what = f"{stage.name} works on {_listed(stage.kinds)} models, and {shape.model_type} is an {shape.family.kind}"
        return [Problem(entry.place, what, "`compress stages` shows what works on what")]
    return [_placed(problem, entry, stage, hidden) for problem in stage.check(shape)]


def _placed(problem: Problem, entry: Entry, stage: Stage, hidden: bool) -> Problem:
    """A stage's own problem at its place in the file: that of the entry that a hidden stage is there for."""
    if hidden:
        return Problem(entry.place, f"its hidden {stage.name}: {problem.where}: {problem.what}", problem.fix)
    return Problem(entry.place_of(problem.where), problem.what, problem.fix)


def _place_of_reference(entry: Entry, role: str, ref: Ref) -> str:
    """Where the file names the artifact: at the option that has its name as value, else at the stage."""
    naming = (option for option in entry.places if getattr(entry.stage, option, None) == ref.of)
    return entry.place_of(next(naming, role))


def _turns(stage: type[Stage], format_: Format, wanted: frozenset[Format]) -> bool:
    return format_ in stage.accepts and stage.returns in wanted and stage.returns != "measurement"


def _listed(words: frozenset[str] | frozenset[Format]) -> str:
    return " or ".join(sorted(words))
