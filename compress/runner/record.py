"""`run.json`: what a run did, stage by stage, and what it measured. Written by the runner, read by everything else."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.artifact import sealed, write_json
from compress.errors import InvalidInput

RECORD, PIPELINE = "run.json", "pipeline.yaml"


class State(StrEnum):
    """Of a stage: todo, running, done, cached, failed, interrupted. Of a run: those but todo and cached, and missed."""

    TODO = "todo"
    RUNNING = "running"
    DONE = "done"
    CACHED = "cached"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    MISSED = "missed"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class SourceRecord(_Record):
    """The untouched model: as the pipeline names it, its key and, once fetched, its size. MB are 1e6 bytes."""

    name: str
    key: str
    parameters: float | None = None
    size_mb: float | None = None


class StageRecord(_Record):
    """One stage of a run. `directory` is relative to the run's; `inputs` are node ids by role.

    estimated: `ram_mb`, `seconds` and the like, as `compress plan` has them; empty in older records.
    """

    id: str
    stage: str
    key: str
    directory: str
    returns: str
    hidden: bool
    inputs: Mapping[str, str]
    state: State = State.TODO
    seconds: float | None = None
    peak_rss_mb: float | None = None
    estimated: Mapping[str, float] = {}
    metrics: Mapping[str, Mapping[str, float]] = {}
    error: str | None = None


class VerdictRecord(_Record):
    """How one requirement came out, in words too. `measured` and `limit` are in the metric's own unit."""

    metric: str
    measured: float | None
    limit: float | None
    met: bool
    sentence: str


class RunRecord(_Record):
    """One run: what, where and when it ran, its stages and verdicts.

    file: the pipeline file's absolute path; None in records older than this. twin: the plan whose dry run passed.
    models: the other models that stages read, by the id that their inputs have. resolved: by what the pipeline names,
    what that was when it was fetched: the SHA-256 of a package's archive, the commit of a hub's model.
    """

    name: str
    file: str | None = None
    state: State
    started: str
    seconds: float = 0.0
    seed: int
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    target: Mapping[str, Any]
    git_commit: str | None
    source: SourceRecord
    models: Mapping[str, SourceRecord] = {}
    resolved: Mapping[str, Mapping[str, str]] = {}
    stages: tuple[StageRecord, ...]
    verdicts: tuple[VerdictRecord, ...] = ()
    twin: str | None = None

    def stage(self, id: str) -> StageRecord:
        """The stage called `id`."""
        return next(stage for stage in self.stages if stage.id == id)

    @property
    def deploy(self) -> StageRecord | None:
        """The stage whose folder is the result: the last that writes a model."""
        models = [stage for stage in self.stages if stage.returns != "measurement" and not stage.hidden]
        return models[-1] if models else None

    def save(self, run_dir: Path) -> None:
        """Put it in place as `run.json`, whole or not at all."""
        write_json(run_dir / RECORD, sealed(self.model_dump(mode="json")))


def load_record(run_dir: Path) -> RunRecord:
    """The record of the run in `run_dir`. Raises InvalidInput where there is none, or a damaged one."""
    file = run_dir / RECORD
    if not file.is_file():
        raise InvalidInput(str(run_dir), "is not a run: it has no run.json", "name a folder that `compress run` wrote")
    try:
        return RunRecord.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(str(file), f"is damaged ({place}: {first['msg']})", "delete it and run again") from error
