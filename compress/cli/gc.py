"""`compress gc`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import RUNS, JsonOption, RunsOption
from compress.cli.screen import print_json, print_line
from compress.errors import InvalidInput


def gc(
    runs: RunsOption = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    json: JsonOption = False,
) -> None:
    """List the stage directories that no run refers to any more, and how much deleting them frees.

    They are left by earlier versions of a pipeline file: going back to one would find them again. A directory that a
    run's current file uses, finished or not, and a run that is in progress are never listed. Deletes only with --yes.

    The cache of fetched models and texts is shared by all runs and not listed here: it lies where COMPRESS_CACHE says,
    or in the user's cache directory as compress-pipeline, and any of it may be deleted, to be fetched again.
    """
    if not runs.is_dir():
        raise InvalidInput(str(runs), "no such directory", "name the folder of runs with --runs")
    found = [(path, _size_mb(path)) for run_dir in sorted(runs.iterdir()) for path in unreferenced(run_dir)]
    total_mb = sum(size_mb for _, size_mb in found)
    if yes:
        for path, _ in found:
            shutil.rmtree(path)
    if json:
        listed = [{"path": str(path), "size_mb": size_mb} for path, size_mb in found]
        print_json({"directories": listed, "total_mb": total_mb, "deleted": yes})
        return
    for path, size_mb in found:
        print_line(f"{size_mb:10.1f} MB  {path}")
    if not found:
        print_line("nothing to delete")
    elif yes:
        print_line(f"freed {total_mb:.1f} MB")
    else:
        print_line(f"{total_mb:10.1f} MB  in all; --yes deletes them")


def unreferenced(run_dir: Path) -> list[Path]:
    """The stage directories in `run_dir` that its record does not name; none where a run is in progress."""
    from compress.runner.lock import is_locked
    from compress.runner.plan import stage_directories
    from compress.runner.record import RECORD, load_record

    if not (run_dir / RECORD).is_file() or is_locked(run_dir):
        return []
    named = {stage.directory for stage in load_record(run_dir).stages}
    return [path for path in stage_directories(run_dir) if path.name not in named]


def _size_mb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
