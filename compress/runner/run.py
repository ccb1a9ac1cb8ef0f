"""`compress run`: prepare, check the disk, try the pipeline on a twin, execute, judge, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from compress.errors import InvalidInput, Problem
from compress.pipeline.file import Pipeline
from compress.pipeline.require import Requirement
from compress.report.figures import figures_of
from compress.report.optional import optional
from compress.report.write import has_report, remove_report, write_report
from compress.runner.estimate import check_disk, estimate, todo_estimates
from compress.runner.execute import Setting, disk_explained, execute, undo
from compress.runner.journal import Journal, blank_record
from compress.runner.lock import locked
from compress.runner.logs import logged, terminable
from compress.runner.plan import Plan, Step
from compress.runner.prepare import Prepared, before_any_stage, prepare
from compress.runner.record import PIPELINE, RunRecord, State, VerdictRecord, load_record
from compress.runner.twin import try_twin
from compress.runner.weights import own_figures
from compress.stage import Reporter
from compress.train.launch import check_launch
from compress.train.options import StepOptions


def run_pipeline(
    pipeline: Pipeline, *, runs: Path, reporter: Reporter, from_stage: str | None = None, twin: bool = True
) -> RunRecord:
    """Run `pipeline` in `runs/<name>` and return its record, whose state is `done` or `missed`.

    from_stage: run this stage and those after it again. twin: try the pipeline on a small random model before a stage
    trains. Raises InvalidInput where nothing can run, CompressError where a stage fails, KeyboardInterrupt on SIGINT
    and SIGTERM; what is finished by then is kept, and the next call goes on from it.
    """
    run_dir = runs / pipeline.name
    with disk_explained(run_dir), locked(run_dir), logged(run_dir), terminable():
        started = time.perf_counter()
        prepared = prepare(pipeline, run_dir, reporter)
        again = prepared.plan.from_step(from_stage) if from_stage else ()
        _check_means(prepared, again)
        (run_dir / PIPELINE).write_bytes(pipeline.text.encode())
        earlier = _earlier(run_dir)
        journal = Journal(run_dir, first_record(prepared, earlier))
        try:
            if twin and _needs_twin(prepared.plan, earlier):
                reporter.log.info("dry run on a random twin")
                try_twin(prepared)
                journal.amend(journal.record.model_copy(update={"twin": prepared.plan.digest}))
            for step in again:
                undo(step)
            execute(prepared.plan, _setting(prepared), journal)
            journal.amend(weighed(journal.record, prepared))
            record = judged(journal.record, pipeline.require)
        except BaseException as error:
            state = State.INTERRUPTED if isinstance(error, KeyboardInterrupt) else State.FAILED
            with contextlib.suppress(OSError):
                journal.amend(closed(journal.record, state, started))
            raise
        journal.amend(closed(record, record.state, started))
        if earlier is None or _told(earlier) != _told(journal.record) or not has_report(run_dir):
            with optional("the report"):
                remove_report(run_dir)  # one of other figures: where this can't be written, the next run tries again
                write_report(run_dir, journal.record)
        return journal.record


@before_any_stage()
def _check_means(prepared: Prepared, again: tuple[Step, ...]) -> None:
    """Raises InvalidInput for a source that can't be had or used, for a disk that can't hold what is to come, and for
    trainings that this launch can't do or divide."""
    check_launch()
    todo = tuple(step for step in prepared.plan.steps if not step.is_cached or step in again)
    if problems := [problem for step in todo for problem in _indivisible(step)]:
        raise InvalidInput.of(problems)
    check_disk(prepared.plan.run_dir, todo_estimates(estimate(prepared), todo))
    read = {of for step in todo for of in step.node.inputs.values()}
    for id in sorted(read & prepared.plan.sources.keys()):
        own_figures(prepared.model(id).path, "torch", None)  # reads what its weights say of themselves


def _indivisible(step: Step) -> Iterator[Problem]:
    """Of the trainings that a stage is or has, those whose steps can't be divided among the processes."""
    for name, options in (("", step.stage), *step.stage):
        if isinstance(options, StepOptions):
            for problem in options.indivisible():
                where = ".".join(filter(None, (step.id, name, problem.where)))
                yield replace(problem, where=where)


def judged(record: RunRecord, require: Iterable[Requirement]) -> RunRecord:
    """The record with the verdicts on `require`, and `done` or `missed`."""
    figures = figures_of(record)
    verdicts = tuple(
        VerdictRecord(
            metric=verdict.metric, measured=verdict.measured, limit=verdict.limit, met=verdict.met,
            sentence=verdict.sentence,
        )
        for verdict in (requirement.verdict(figures) for requirement in require)
    )  # fmt: skip
    state = State.DONE if all(verdict.met for verdict in verdicts) else State.MISSED
    return record.model_copy(update={"verdicts": verdicts, "state": state})


def weighed(record: RunRecord, prepared: Prepared) -> RunRecord:
    """The record with the source's parameters and size, and with what names were resolved to."""
    record = record.model_copy(update={"resolved": prepared.resolved()})
    figures = own_figures(prepared.source.fetch(prepared.reporter), "torch", None)
    return record.model_copy(update={"source": record.source.model_copy(update=figures)})


def closed(record: RunRecord, state: State, started: float) -> RunRecord:
    """The record of a run that ends now."""
    return record.model_copy(update={"state": state, "seconds": round(time.perf_counter() - started, 3)})


def first_record(prepared: Prepared, earlier: RunRecord | None) -> RunRecord:
    """What is known before anything runs."""
    record, estimates = blank_record(prepared.pipeline, prepared.plan), estimate(prepared)
    stages = [stage.model_copy(update={"estimated": estimates[stage.id].figures()}) for stage in record.stages]
    record = record.model_copy(update={"stages": tuple(stages)})
    if earlier is not None and earlier.source.key == record.source.key:
        record = record.model_copy(update={"source": earlier.source, "twin": earlier.twin})
    return record


def _setting(prepared: Prepared) -> Setting:
    pipeline = prepared.pipeline
    return Setting(
        prepared.model, prepared.data, pipeline.seed, pipeline.target, prepared.reporter
    )


def _told(record: RunRecord) -> object:
    """What a report tells: where this is as it was, the one that is there still holds."""
    return record.state, record.source, record.verdicts, [(stage.key, stage.metrics) for stage in record.stages]


def _needs_twin(plan: Plan, earlier: RunRecord | None) -> bool:
    """Whether a stage is still to be trained or calibrated, and this very plan has not passed its dry run before."""
    trains = any(step.stage.reads() and step.stage.returns != "measurement" for step in plan.todo)
    return trains and (earlier is None or earlier.twin != plan.digest)


def _earlier(run_dir: Path) -> RunRecord | None:
    """The record of the last run in this directory; None where there is none that can be read."""
    try:
        return load_record(run_dir)
    except InvalidInput:
        return None
