"""`run.json` as it grows: from a plan, through each stage's artifact, to the end of the run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from compress.artifact import Artifact
from compress.hardware import git_commit, this_machine, versions
from compress.pipeline.file import Pipeline
from compress.runner.plan import Plan
from compress.runner.record import RunRecord, SourceRecord, StageRecord, State
from compress.stage import SOURCE

MAKING = "making"
"""The subject, in an artifact's metrics, of what it took to make it: `seconds` and `peak_rss_mb`."""


class Journal:
    """`run.json` as it grows: saved whenever a stage changes its state."""

    def __init__(self, run_dir: Path, record: RunRecord) -> None:
        self.run_dir = run_dir
        self.record = record
        record.save(run_dir)

    def put(self, stage: StageRecord) -> None:
        """Replace the record of a stage."""
        stages = tuple(stage if old.id == stage.id else old for old in self.record.stages)
        self.amend(self.record.model_copy(update={"stages": stages}))

    def amend(self, record: RunRecord) -> None:
        """Replace the record of the run."""
        self.record = record
        record.save(self.run_dir)


def blank_record(pipeline: Pipeline, plan: Plan) -> RunRecord:
    """What is known of a run before anything is computed."""
    return RunRecord(
        name=pipeline.name,
        file=str(pipeline.path.resolve()),
        state=State.RUNNING,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=pipeline.seed,
        versions=versions(),
        hardware=this_machine().as_dict(),
        target=pipeline.target.model_dump(),
        git_commit=git_commit(),
        source=SourceRecord(name=pipeline.model, key=plan.source_key),
        models={
            id: SourceRecord(name=id.partition(":")[2], key=key) for id, key in plan.sources.items() if id != SOURCE
        },
        stages=tuple(
            StageRecord(
                id=step.id, stage=step.stage.name, key=step.key, directory=step.directory.name,
                returns=step.stage.returns, hidden=step.node.hidden, inputs=step.node.inputs,
            )
            for step in plan.steps
        ),
    )  # fmt: skip


def recorded(stage: StageRecord, artifact: Artifact, state: State) -> StageRecord:
    """The record of a stage whose artifact is finished."""
    metrics = {subject: dict(values) for subject, values in artifact.metrics.items() if subject != MAKING}
    making = artifact.metrics.get(MAKING, {})
    return stage.model_copy(
        update={
            "state": state, "metrics": metrics, "error": None,
            "seconds": making.get("seconds"), "peak_rss_mb": making.get("peak_rss_mb"),
        }
    )  # fmt: skip
