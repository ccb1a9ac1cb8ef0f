"""`compress plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import RUNS, JsonOption, PipelineArgument, RunsOption
from compress.cli.screen import print_json, print_line, print_table, reporting

if TYPE_CHECKING:
    from compress.report.tables import Table
    from compress.runner.changes import News
    from compress.runner.estimate import Estimate
    from compress.runner.plan import Step


def plan(
    pipeline: PipelineArgument,
    runs: RunsOption = RUNS,
    twin: Annotated[
        bool, typer.Option("--twin/--no-twin", help="Run the whole pipeline on a small random model, in seconds.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Show what a run would do: its stages, what is cached, and rough estimates of size, memory and time.

    Of a stage that was computed before and has to be again it says what changed: an option, a text, a library.
    Then the whole pipeline is run on a random twin of the model with a few layers, in a temporary folder, so that an
    export that can't work fails now and not after hours of training. Nothing is written to the run directory.
    """
    from compress.pipeline.check import valid_pipeline
    from compress.runner.changes import news_of
    from compress.runner.estimate import estimate
    from compress.runner.prepare import prepare
    from compress.runner.twin import try_twin

    loaded = valid_pipeline(pipeline)
    with reporting() as reporter:
        prepared = prepare(loaded, runs / loaded.name, reporter)
        estimates = estimate(prepared)
        steps = prepared.plan.steps
        news = {step.id: news_of(prepared.plan, step) for step in prepared.plan.todo}
        if not json:
            print_table(_table(loaded.name, steps, estimates))
            for id, each in news.items():
                if each.changes:
                    print_line(f"{id}: {each}")
        if twin:
            try_twin(prepared)
    if json:
        stages = [_as_json(step, estimates[step.id]) | _told(news.get(step.id)) for step in steps]
        print_json({"name": loaded.name, "stages": stages})
    elif twin:
        print_line("dry run on a random twin: every stage works")


def _as_json(step: Step, estimate: Estimate) -> dict[str, Any]:
    return {
        "id": step.id, "stage": step.stage.name, "key": step.key, "directory": str(step.directory),
        "state": _state(step), "hidden": step.node.hidden, "inputs": dict(step.node.inputs),
        "ingredients": step.ingredients,
        "num_hidden_layers": estimate.shape.num_hidden_layers, "parameters": estimate.shape.num_parameters,
        "estimated": estimate.figures(),
    }  # fmt: skip


def _told(news: News | None) -> dict[str, Any]:
    return {"changes": list(news.changes) if news else [], "compared_with": news.earlier if news else None}


def _table(name: str, steps: tuple[Step, ...], estimates: dict[str, Estimate]) -> Table:
    from compress.report.tables import Table, duration

    rows = []
    for step in steps:
        cost = estimates[step.id]
        size = (str(cost.shape.num_hidden_layers), f"{cost.shape.num_parameters / 1e6:.1f}")
        writes = f"{cost.size_mb:.0f}" if cost.size_mb else ""
        spent = (f"{cost.ram_mb:.0f}", f"{cost.disk_mb:.0f}", duration(cost.seconds))
        rows.append((step.id, _state(step), *size, writes, *(("", "", "") if step.is_cached else spent)))
    columns = ("stage", "state", "layers", "params (M)", "≈ MB", "≈ RAM (MB)", "≈ disk (MB)", "≈ time")
    return Table(f"{name}: what each stage writes and needs; estimates are rough", columns, tuple(rows))


def _state(step: Step) -> str:
    return "cached" if step.is_cached else "todo"
