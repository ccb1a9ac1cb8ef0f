"""`compress compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.options import RUNS, JsonOption, RunsOption, find_run
from compress.cli.screen import print_json, print_table


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run's name, or its directory.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run to hold against it.")],
    runs: RunsOption = RUNS,
    json: JsonOption = False,
) -> None:
    """Put the results of two runs side by side, with the ratio B / A of each figure.

    Times are comparable only where both runs measured on the same machine with the same threads.
    """
    from compress.pipeline.require import RESULT
    from compress.report.figures import figures_of
    from compress.report.tables import comparison_table
    from compress.runner.record import load_record

    first, second = (load_record(find_run(run, runs)) for run in (a, b))
    if not json:
        print_table(comparison_table(first, second))
        return
    figures = [figures_of(record)[RESULT] for record in (first, second)]
    ratios = {name: figures[1][name] / value for name, value in figures[0].items() if value and name in figures[1]}
    print_json({"a": figures[0], "b": figures[1], "ratio": ratios})
