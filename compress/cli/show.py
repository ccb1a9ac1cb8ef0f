"""`compress show`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.options import RUNS, JsonOption, RunArgument, RunsOption, find_run
from compress.cli.screen import print_json, print_line, print_table

if TYPE_CHECKING:
    from compress.runner.record import RunRecord


def show(run: RunArgument, runs: RunsOption = RUNS, json: JsonOption = False) -> None:
    """Show what a run measured: original and result side by side, the loss of each stage, the verdicts.

    With --json: the whole of run.json, the figures by subject, the folder to deploy and its graph's operators.
    """
    from compress.runner.record import load_record

    run_dir = find_run(run, runs)
    record = load_record(run_dir)
    if json:
        print_json(as_json(record, run_dir))
    else:
        print_run(record, run_dir)


def as_json(record: RunRecord, run_dir: Path) -> dict[str, Any]:
    """A run for programs: `run.json` with `figures` (by subject and name), `deploy` (a path, or null) and `operators`:
    those of the deployed graph, a row for each matrix."""
    from compress.report.figures import figures_of
    from compress.report.operators import deployed_operators

    deploy = None if record.deploy is None else str(run_dir / record.deploy.directory)
    operators = [asdict(use) for use in deployed_operators(run_dir, record)]
    return {**record.model_dump(mode="json"), "figures": figures_of(record), "deploy": deploy, "operators": operators}


def print_run(record: RunRecord, run_dir: Path) -> None:
    """A run for people."""
    from compress.report.operators import operators_table
    from compress.report.tables import recall_table, result_table, stages_table
    from compress.runner.record import State

    print_table(result_table(record))
    print_table(stages_table(record))
    if (operators := operators_table(run_dir, record)) is not None:
        print_table(operators)
    if (recall := recall_table(record)) is not None:
        print_table(recall)
    for verdict in record.verdicts:
        print_line(verdict.sentence, style=None if verdict.met else "bold red")
    for stage in record.stages:
        if stage.error:
            print_line(f"{stage.id}: {stage.state}: {stage.error}", style="bold red")
    finished = record.state in (State.DONE, State.MISSED)
    if not finished:
        print_line(f"this run is {record.state}; `compress run` goes on with it")
    elif record.deploy is not None:
        print_line(f"deploy: {run_dir / record.deploy.directory}")
        print_line(f"report: {run_dir / 'report.html'}")
