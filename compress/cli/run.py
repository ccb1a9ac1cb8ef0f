"""`compress run`."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.options import RUNS, JsonOption, PipelineArgument, RunsOption
from compress.cli.screen import print_json, reporting
from compress.cli.streams import flush_stdout
from compress.errors import ExitCode


def run(
    pipeline: PipelineArgument,
    runs: RunsOption = RUNS,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and those after it again.")
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin/--no-twin", help="Try the pipeline on a small random model before training.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Run a pipeline file, and go on from where an earlier run of it ended.

    Everything is written to runs/NAME: one directory a stage, run.json, run.log, report.md and report.html. What is
    finished is not computed again, also after a kill or a change of the file: only what a change reaches is.
    Under `torchrun` or `accelerate launch` the first process runs the pipeline and the others train with it; the next
    launch may have another number of them. FSDP, DeepSpeed and the like are refused.

    Exit status: 0 done; 1 a stage failed; 2 invalid input, nothing ran; 3 a requirement was missed; 130 interrupted.
    """
    from compress.cli.show import as_json, print_run
    from compress.pipeline.check import valid_pipeline
    from compress.runner.record import State
    from compress.runner.run import run_pipeline
    from compress.train.distributed import follow, leading
    from compress.train.launch import is_follower

    if is_follower():
        return follow()
    with leading():
        loaded = valid_pipeline(pipeline)
        run_dir = runs / loaded.name
        with reporting() as reporter:
            try:
                record = run_pipeline(loaded, runs=runs, from_stage=from_stage, twin=twin, reporter=reporter)
            except KeyboardInterrupt:
                reporter.log.info("interrupted: what is finished is kept in %s; run it again to go on", run_dir)
                raise typer.Exit(ExitCode.INTERRUPTED) from None
    if json:
        print_json(as_json(record, run_dir))
    else:
        print_run(record, run_dir)
    flush_stdout(kept=f"`compress show {run_dir}` shows it")
    if record.state is State.MISSED:
        raise typer.Exit(ExitCode.REQUIREMENT_MISSED)
