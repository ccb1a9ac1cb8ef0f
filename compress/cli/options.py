"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PipelineArgument = Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline file (YAML).")]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its directory.")]
RUNS = Path("runs")


def find_run(run: str, runs: Path) -> Path:
    """The directory of a run by its path or its name."""
    named = Path(run)
    return named if named.is_dir() and (named.is_absolute() or "/" in run or not (runs / run).is_dir()) else runs / run
