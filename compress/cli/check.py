"""`compress check`: what is wrong with a pipeline file, all of it, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.screen import print_json, print_notes
from compress.errors import ExitCode, InvalidInput


def check(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline file (YAML).", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Tell everything that is wrong with a pipeline file, without running it.

    Nothing is fetched or computed, so it takes under a second: spelling and types, options against the model's own
    config.json where that is at hand, formats from stage to stage, names of earlier stages, data files, and whether a
    stage measures each figure in `require`. What needs the model's files is listed as unchecked until fetched.

    Exit status 0 where the file is valid, 2 where it is not: one line for each problem, `where: what; what to do`.
    """
    from compress.pipeline.check import check_file

    found = check_file(pipeline)
    print_notes(found.notes)
    if as_json:
        print_json(found.to_json())
        raise typer.Exit(ExitCode.INVALID_INPUT if found.problems else ExitCode.DONE)
    if found.problems:
        raise InvalidInput.of(found.problems)
    steps = [node for node in found.graph.nodes if not node.hidden]
    hidden = len(found.graph.nodes) - len(steps)
    count = f"{len(steps)} stage{'s' if len(steps) != 1 else ''}{f' and {hidden} hidden' if hidden else ''}"
    print(f"{pipeline}: valid, {count}: {' → '.join(node.id for node in steps)}")
