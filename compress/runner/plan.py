"""What is to be computed and what is there already: the key of every stage, and the directory that answers to it.

A key is a SHA-256 over everything that the result depends on, the keys of a stage's inputs among it, so that a change
anywhere reaches all that comes after it and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.artifact import Format, is_finished
from compress.errors import InvalidInput
from compress.registry import did_you_mean
from compress.runner.key import Ingredients, ingredients_of, key_of
from compress.stage import INPUT, SOURCE, Given, Stage, Target

if TYPE_CHECKING:
    from compress.data.text import TextData
    from compress.models.anatomy import ModelShape
    from compress.pipeline.graph import Graph, GraphNode

KEY_LENGTH = 12
"""Hexadecimal digits of a key in a directory's name; the whole key is in `artifact.json`."""
_DIRECTORY = re.compile(rf"\d+-(?P<stage>.+)-(?P<key>[0-9a-f]{{{KEY_LENGTH}}})")


@dataclass(frozen=True)
class Step:
    """One node of the graph, its key (hex), what that is made of, and the directory of its artifact, made or not."""

    node: GraphNode
    key: str
    directory: Path
    ingredients: Ingredients

    @property
    def id(self) -> str:
        """The node's id."""
        return self.node.id

    @property
    def stage(self) -> Stage:
        """The node's stage."""
        return self.node.stage

    @property
    def is_cached(self) -> bool:
        """Whether the artifact is there, finished."""
        return is_finished(self.directory)


@dataclass(frozen=True)
class Plan:
    """The steps in the order in which they run, and the keys of the models that they start from, by id."""

    run_dir: Path
    sources: Mapping[str, str]
    steps: tuple[Step, ...]

    @property
    def source_key(self) -> str:
        """The key of the model that the pipeline is about."""
        return self.sources[SOURCE]

    @property
    def todo(self) -> tuple[Step, ...]:
        """The steps without a finished artifact."""
        return tuple(step for step in self.steps if not step.is_cached)

    @property
    def digest(self) -> str:
        """One key for the whole plan."""
        return key_of([step.key for step in self.steps])

    def from_step(self, name: str) -> tuple[Step, ...]:
        """The step called `name` and those after it, leaving out hidden ones that don't depend on it.

        Raises InvalidInput where there is no such step.
        """
        ids = [step.id for step in self.steps]
        if name not in ids:
            raise InvalidInput("--from", f"the pipeline has no stage {name!r}", did_you_mean(name, ids))
        later: dict[str, Step] = {}
        for step in self.steps[ids.index(name) :]:
            if not step.node.hidden or step.id == name or any(of in later for of in step.node.inputs.values()):
                later[step.id] = step
        return tuple(later.values())


def make_plan(
    graph: Graph, *, sources: Mapping[str, str], data: TextData, seed: int, target: Target, run_dir: Path
) -> Plan:
    """Give every node of `graph` its key and its directory in `run_dir`, which need not exist.

    sources: the keys of `source` and of the other models that the graph reads, by id.
    """
    known = _Known(graph, dict(sources))
    directories = _directories(run_dir)
    steps = []
    for position, node in enumerate(graph.nodes, start=1):
        ingredients = ingredients_of(
            node.stage, known.given(node),
            {role: known.keys[of] for role, of in node.inputs.items()},
            text={split: data.digest(split) for split in sorted(node.stage.reads())},
            seed=seed, target=target,
        )  # fmt: skip
        known.add(node, key := key_of(ingredients))
        short = (node.stage.name, key[:KEY_LENGTH])
        directory = directories.setdefault(short, run_dir / "-".join((f"{position:02d}", *short)))
        steps.append(Step(node, key, directory, ingredients))
    return Plan(run_dir, sources, tuple(steps))


class _Known:
    """What is known of the artifacts of nodes, by id, as the graph is walked."""

    def __init__(self, graph: Graph, keys: dict[str, str]) -> None:
        self.keys = keys
        self._shapes: dict[str, ModelShape | None] = {SOURCE: graph.source_shape}
        self._formats: dict[str, Format] = dict.fromkeys(keys, "torch")
        self._rounding: set[str] = set()

    def given(self, node: GraphNode) -> Given:
        """What the stage of `node` is told of its inputs."""
        shape = self._shapes[node.inputs[INPUT]]
        assert shape is not None, "a plan is made for a model whose shape is known"
        formats = {role: self._formats[of] for role, of in node.inputs.items()}
        return Given(shape, formats, frozenset(role for role, of in node.inputs.items() if of in self._rounding))

    def add(self, node: GraphNode, key: str) -> None:
        """Note what `node` makes."""
        self.keys[node.id], self._shapes[node.id], self._formats[node.id] = key, node.shape, node.stage.returns
        if node.stage.rounds_activations(self.given(node)):
            self._rounding.add(node.id)


def stage_directories(run_dir: Path) -> list[Path]:
    """The directories in `run_dir` that hold, or held, an artifact."""
    if not run_dir.is_dir():
        return []
    return sorted(path for path in run_dir.iterdir() if path.is_dir() and _DIRECTORY.fullmatch(path.name))


def _directories(run_dir: Path) -> dict[tuple[str, str], Path]:
    """Directories by stage and short key, whatever number they begin with; finished ones before others."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(stage_directories(run_dir), key=is_finished):
        match = _DIRECTORY.fullmatch(path.name)
        assert match is not None
        found[match["stage"], match["key"]] = path
    return found
