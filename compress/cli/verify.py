"""`compress verify`."""

from __future__ import annotations

from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Any

import typer

from compress.cli.options import RUNS, JsonOption, RunArgument, RunsOption, find_run
from compress.cli.screen import print_json, print_line, reporting
from compress.errors import ExitCode, InvalidInput


def verify(run: RunArgument, runs: RunsOption = RUNS, json: JsonOption = False) -> None:
    """Read every file of a run's finished stages, those of earlier versions of its pipeline too, against its digest.

    `compress run` trusts a file whose size and time are as they were; this finds what a disk lost under them. run.json
    and each artifact.json are held against their own digests, and against each other.

    Exit status: 0 all is whole, 1 something is damaged: delete what is named, and run again.
    """
    from compress.runner.plan import stage_directories
    from compress.runner.record import RECORD

    run_dir = find_run(run, runs)
    directories = stage_directories(run_dir)
    if not directories and not (run_dir / RECORD).is_file():
        raise InvalidInput(str(run_dir), "is not a run: it has no run.json", "name a folder that `compress run` wrote")
    with reporting() as reporter, reporter.progress("verify", len(directories)) as advance:
        stages = []
        for directory in directories:
            stages.append(_stage(directory))
            advance(1, directory.name)
    damaged = _damages_of_record(run_dir)
    is_whole = not damaged and not any(stage["damaged"] for stage in stages)
    if json:
        print_json({"run": str(run_dir), "whole": is_whole, "stages": stages, "damaged": damaged})
    else:
        _print(stages, damaged)
    if not is_whole:
        raise typer.Exit(ExitCode.STAGE_FAILED)


def _stage(directory: Path) -> dict[str, Any]:
    """What is found of one stage: `finished`, its files and megabytes (1e6 bytes), and what is damaged."""
    from compress.artifact import MANIFEST, damages, is_finished, read_artifact
    from compress.errors import CompressError

    found: dict[str, Any] = {"directory": directory.name, "finished": is_finished(directory), "damaged": []}
    if not found["finished"]:
        return found
    try:
        artifact = read_artifact(directory)
    except CompressError as error:
        return {**found, "damaged": [{"file": str(directory / MANIFEST), "what": error.problem.what}]}
    return {
        **found, "files": len(artifact.files), "size_mb": sum(each.size for each in artifact.files.values()) / 1e6,
        "damaged": [{"file": str(file), "what": what} for file, what in damages(artifact)],
    }  # fmt: skip


def _damages_of_record(run_dir: Path) -> list[dict[str, str]]:
    """What is wrong with `run.json`: its own digest, or what it says of a stage and that stage does not."""
    from compress.artifact import is_whole, read_artifact
    from compress.errors import CompressError
    from compress.runner.journal import recorded
    from compress.runner.record import RECORD, State, load_record

    file = run_dir / RECORD
    try:
        record = load_record(run_dir)
        whole = is_whole(loads(file.read_text("utf-8")))
    except CompressError as error:
        return [{"file": str(file), "what": error.problem.what}]
    found = [] if whole else ["is not what was written (digest differs)"]
    for stage in record.stages:
        if stage.state in (State.DONE, State.CACHED):
            try:
                artifact = read_artifact(run_dir / stage.directory)
            except CompressError:
                if not (run_dir / stage.directory).is_dir():
                    found.append(f"names {stage.directory}, which is not there")
                continue
            if artifact.key != stage.key or recorded(stage, artifact, stage.state).metrics != stage.metrics:
                found.append(f"says of {stage.id} what {stage.directory} does not")
    return [{"file": str(file), "what": what} for what in found]


def _print(stages: Sequence[dict[str, Any]], damaged: Sequence[dict[str, str]]) -> None:
    for stage in stages:
        if not stage["finished"]:
            print_line(f"unfinished  {stage['directory']}")
        elif stage["damaged"]:
            print_line(f"DAMAGED     {stage['directory']}", style="bold red")
        else:
            print_line(f"whole       {stage['directory']}  {stage['files']} files, {stage['size_mb']:.1f} MB")
    print_line(f"{'DAMAGED' if damaged else 'whole  '}     run.json", style="bold red" if damaged else None)
    for each in (*(each for stage in stages for each in stage["damaged"]), *damaged):
        print_line(f"{each['file']}: {each['what']}", style="bold red")
