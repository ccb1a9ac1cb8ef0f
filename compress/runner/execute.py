"""Walking a plan: every step is opened where it is finished and run where it is not, atomically and resumably."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.artifact import CHECKPOINTS, MANIFEST, Artifact, Metrics, finish, open_artifact
from compress.data.text import TextData
from compress.errors import CompressError, is_full_disk
from compress.hardware import PeakMemory
from compress.pipeline.require import RESULT
from compress.runner.changes import news_of
from compress.runner.journal import MAKING, Journal, recorded
from compress.runner.plan import Plan, Step
from compress.runner.record import State
from compress.runner.weights import own_figures
from compress.stage import INPUT, SOURCE, Reporter, StageContext, Target


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share. `model` fetches one that the plan starts from, by id, when a step needs it."""

    model: Callable[[str], Artifact]
    data: TextData
    seed: int
    target: Target
    reporter: Reporter
    prefix: str = ""
    """Before what is said of a step."""


def execute(plan: Plan, setting: Setting, journal: Journal) -> None:
    """Finish every step of `plan` in order.

    Raises CompressError where a stage fails in a way that the user can fix or a finished artifact is damaged. Whatever
    ends it, KeyboardInterrupt and bugs too, is recorded in the journal, and what is finished stays finished.
    """
    artifacts: dict[str, Artifact] = {}
    log = setting.reporter.log
    for position, step in enumerate(plan.steps, start=1):
        was = journal.record.stage(step.id)
        heading = f"{setting.prefix}[{position}/{len(plan.steps)}] {step.id}"
        try:
            if step.is_cached:
                state, artifact = State.CACHED, _open(step)
            else:
                log.info("%s%s", heading, f": {news}" if (news := str(news_of(plan, step))) else "")
                journal.put(was.model_copy(update={"state": State.RUNNING}))
                state, artifact = State.DONE, _run(step, plan, artifacts, setting)
        except BaseException as error:
            state = State.INTERRUPTED if isinstance(error, KeyboardInterrupt) else State.FAILED
            log.error("%s: %s", heading, state, exc_info=error)  # the log has the traceback, the screen has not
            with contextlib.suppress(OSError):  # the disk may be full, and that is not what to report
                told = _disk_full(step.id, plan.run_dir) if is_full_disk(error) else error
                journal.put(was.model_copy(update={"state": state, "error": str(told) or type(told).__name__}))
            if is_full_disk(error):
                raise _disk_full(step.id, plan.run_dir) from error
            error.add_note(f"(in stage {step.id!r}; what came before it is kept in {plan.run_dir})")
            raise
        artifacts[step.id] = artifact
        record = recorded(was, artifact, state)
        journal.put(record)
        log.info("%s: %s", heading, "cached" if state is State.CACHED else f"done in {record.seconds:.1f} s")


def undo(step: Step) -> None:
    """Make a finished step unfinished, so that it runs again."""
    (step.directory / MANIFEST).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_explained(run_dir: Path) -> Iterator[None]:
    """Turn a full disk, wherever it is met, into one clear message."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise _disk_full(str(run_dir), run_dir) from error


def _open(step: Step) -> Artifact:
    artifact = open_artifact(step.directory)
    if artifact.key != step.key:
        raise CompressError(
            str(step.directory / MANIFEST), f"has the key {artifact.key!r}, not the one that its name says",
            f"delete {step.directory} and run again",
        )  # fmt: skip
    shutil.rmtree(step.directory / CHECKPOINTS, ignore_errors=True)  # killed between finishing and tidying
    return artifact


def _run(step: Step, plan: Plan, artifacts: Mapping[str, Artifact], setting: Setting) -> Artifact:
    """Run one stage in its directory, which keeps nothing of an earlier attempt but its checkpoints."""
    inputs = {
        role: setting.model(of) if of in plan.sources else artifacts[of] for role, of in step.node.inputs.items()
    }
    out, work = step.directory, step.directory / CHECKPOINTS
    work.mkdir(parents=True, exist_ok=True)
    _clear(out, keep=CHECKPOINTS)
    context = StageContext(out, work, inputs, setting.data, setting.seed, setting.target, setting.reporter)
    start = time.perf_counter()
    with PeakMemory() as memory:
        metrics = step.stage.run(context)
        making = {"seconds": time.perf_counter() - start, "peak_rss_mb": memory.peak_mb()}
    _sync(out)
    artifact = finish(
        out, format=step.stage.returns, stage=step.stage.name, key=step.key,
        lineage=tuple(f"{role}: {of} {inputs[role].key}" for role, of in sorted(step.node.inputs.items())),
        metrics={**_completed(metrics, step, out, inputs.get(INPUT)), MAKING: making}, id=step.id,
        ingredients=step.ingredients,
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return artifact


def _completed(metrics: Metrics, step: Step, out: Path, input: Artifact | None) -> dict[str, Mapping[str, float]]:
    """A stage's figures with those that every model has."""
    if step.stage.returns == "measurement":
        return dict(metrics)
    handed_on = None
    if input is not None:
        handed_on = input.metrics.get(RESULT, {}).get("parameters")
        if handed_on is None and input.stage == SOURCE:
            handed_on = own_figures(input.path, input.format, None).get("parameters")
    own = own_figures(out, step.stage.returns, handed_on)
    return {**metrics, RESULT: {**own, **metrics.get(RESULT, {})}}


def _clear(directory: Path, keep: str) -> None:
    for path in directory.iterdir():
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(directory: Path) -> None:
    """Have the disk hold what was written before `artifact.json` says that it does."""
    for path in (*directory.rglob("*"), directory):
        if CHECKPOINTS in path.relative_to(directory).parts[:1] or not (path.is_file() or path == directory):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_full(where: str, run_dir: Path) -> CompressError:
    free_mb = shutil.disk_usage(run_dir).free / 1e6
    fix = "free some and run again: it goes on from here; `compress gc` lists what may go"
    return CompressError(where, f"no space is left on the disk of {run_dir} ({free_mb:.0f} MB free)", fix)
