"""What is to be computed and what is there already: the key of every stage, and the directory that answers to it.

A key is a SHA-256 over everything that the result depends on, the keys of a stage's inputs among it, so that a change
anywhere reaches all that comes after it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact import is_finished
from compress.errors import InvalidInput
from compress.hardware import this_machine
from compress.registry import did_you_mean
from compress.stage import SOURCE, Stage, Target

if TYPE_CHECKING:
    from compress.data.text import TextData
    from compress.pipeline.graph import Graph, GraphNode

KEY_LENGTH = 12
"""Hexadecimal digits of a key in a directory's name; the whole key is in `artifact.json`."""
_DIRECTORY = re.compile(rf"\d+-(?P<stage>.+)-(?P<key>[0-9a-f]{{{KEY_LENGTH}}})")


@dataclass(frozen=True)
class Step:
    """One node of the graph, its key (hex) and the directory that holds, or will hold, its artifact."""

    node: GraphNode
    key: str
    directory: Path

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
    """The steps in the order in which they run, and the key of the source model."""

    run_dir: Path
    source_key: str
    steps: tuple[Step, ...]

    @property
    def todo(self) -> tuple[Step, ...]:
        """The steps without a finished artifact."""
        return tuple(step for step in self.steps if not step.is_cached)

    @property
    def digest(self) -> str:
        """One key for the whole plan."""
        return _sha256([step.key for step in self.steps])

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


def make_plan(graph: Graph, *, source_key: str, data: TextData, seed: int, target: Target, run_dir: Path) -> Plan:
    """Give every node of `graph` its key and its directory in `run_dir`, which need not exist."""
    keys = {SOURCE: source_key}
    existing = _directories(run_dir)
    steps = []
    for position, node in enumerate(graph.nodes, start=1):
        key = stage_key(
            node.stage,
            {role: keys[of] for role, of in node.inputs.items()},
            data={split: data.digest(split) for split in sorted(node.stage.reads())},
            seed=seed,
            target=target,
        )
        keys[node.id] = key
        short = (node.stage.name, key[:KEY_LENGTH])
        directory = existing.get(short, run_dir / "-".join((f"{position:02d}", *short)))
        steps.append(Step(node, key, directory))
    return Plan(run_dir, source_key, tuple(steps))


def stage_key(stage: Stage, inputs: Mapping[str, str], *, data: Mapping[str, str], seed: int, target: Target) -> str:
    """SHA-256 (hex) of all that the artifact of `stage` depends on.

    inputs: keys by role. data: digests of the splits of text that it reads, and of how they are cut. The seed counts
    only where the stage is `seeded`; the target where it `reads_target`; the target, the machine and ONNX Runtime's
    version where it `measures_hardware`.
    """
    ingredients: dict[str, Any] = {
        "stage": stage.name,
        "version": stage.version,
        "config": stage.model_dump(),
        "inputs": dict(inputs),
        "data": dict(data),
    }
    if stage.seeded:
        ingredients["seed"] = seed
    if stage.reads_target or stage.measures_hardware:
        ingredients["target"] = target.model_dump()
    if stage.measures_hardware:
        ingredients["machine"] = this_machine().fingerprint()
        ingredients["onnxruntime"] = _onnxruntime_version()
    return _sha256(ingredients)


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


def _onnxruntime_version() -> str:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return ""


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    """What JSON has no word for, in an order that does not depend on the process."""
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else str(value)
