"""`compress gc`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from compress.artifact import MANIFEST
from compress.cli.options import RUNS, JsonOption, RunsOption
from compress.cli.screen import print_json, print_line, print_notes
from compress.errors import CompressError, ExitCode, InvalidInput, Problem

LEFT_ALONE = "it is left alone"


def gc(
    runs: RunsOption = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    json: JsonOption = False,
) -> None:
    """List the stage directories that no run refers to any more, and how much deleting them frees.

    They are left by earlier versions of a pipeline file: going back to one would find them again. A directory that a
    run's current file uses, finished or not, a run that is in progress and one whose run.json can't be read are never
    listed, nor is what lies elsewhere and is only linked to. Deletes only with --yes.

    The cache of fetched models and texts is shared by all runs and not listed here: it lies where COMPRESS_CACHE says,
    or in the user's cache directory as compress-pipeline, and any of it may be deleted, to be fetched again.
    """
    if not runs.is_dir():
        raise InvalidInput(str(runs), "no such directory", "name the folder of runs with --runs")
    notes: list[Problem] = []
    failures: list[Problem] = []
    found: list[tuple[Path, float]] = []
    for run_dir in _run_directories(runs):
        try:
            listed = [(path, _size_mb(path)) for path in unreferenced(run_dir)]
            notes += _links(run_dir)
            found += _deleted(run_dir, listed, failures) if yes and listed else listed
        except (CompressError, OSError) as error:  # of one run: the others are none the worse for it
            notes.append(Problem(str(run_dir), _words(error), LEFT_ALONE))
    _print(found, deleted=yes, json=json)
    print_notes(notes)
    if failures:
        print_notes(failures, "error")
        raise typer.Exit(ExitCode.STAGE_FAILED)


def unreferenced(run_dir: Path) -> list[Path]:
    """The stage directories in `run_dir` that its record does not name; none where a run is in progress.

    Raises InvalidInput where the record is damaged.
    """
    from compress.runner.lock import is_locked

    return [] if is_locked(run_dir) else [path for path in _unnamed(run_dir) if not path.is_symlink()]


def _deleted(
    run_dir: Path, listed: Sequence[tuple[Path, float]], failures: list[Problem]
) -> Iterator[tuple[Path, float]]:
    """Delete and give those that are unreferenced still, now that no run can begin; note those that can't be.

    The manifest goes first: whatever happens on the way, half a directory is never taken for a finished one.
    """
    from compress.runner.lock import locked

    with locked(run_dir):
        still = _unnamed(run_dir)
        for path, size_mb in listed:
            if path not in still:
                continue
            try:
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
                yield path, size_mb
            except OSError as error:
                failures.append(Problem(str(path), f"can't be deleted ({error.strerror})", "delete it yourself"))


def _unnamed(run_dir: Path) -> list[Path]:
    from compress.runner.plan import stage_directories
    from compress.runner.record import RECORD, load_record

    if not (run_dir / RECORD).is_file():
        return []
    named = {stage.directory for stage in load_record(run_dir).stages}
    return [path for path in stage_directories(run_dir) if path.name not in named]


def _links(run_dir: Path) -> Iterator[Problem]:
    for path in _unnamed(run_dir):
        if path.is_symlink():
            yield Problem(str(path), f"no run refers to it, and it is a link to {os.readlink(path)}", LEFT_ALONE)


def _run_directories(runs: Path) -> list[Path]:
    """The directories in `runs`, each once, whatever links lead to it."""
    return sorted({path.resolve(): path for path in sorted(runs.iterdir(), reverse=True) if path.is_dir()}.values())


def _words(error: CompressError | OSError) -> str:
    return f"{error.problem.where} {error.problem.what}" if isinstance(error, CompressError) else str(error)


def _size_mb(directory: Path) -> float:
    """1e6 bytes of files, but for those that vanish while it looks."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return size / 1e6


def _print(found: Sequence[tuple[Path, float]], *, deleted: bool, json: bool) -> None:
    total_mb = sum(size_mb for _, size_mb in found)
    if json:
        listed = [{"path": str(path), "size_mb": size_mb} for path, size_mb in found]
        print_json({"directories": listed, "total_mb": total_mb, "deleted": deleted})
        return
    for path, size_mb in found:
        print_line(f"{size_mb:10.1f} MB  {path}")
    if not found:
        print_line("nothing to delete")
    elif deleted:
        print_line(f"freed {total_mb:.1f} MB")
    else:
        print_line(f"{total_mb:10.1f} MB  in all; --yes deletes them")
