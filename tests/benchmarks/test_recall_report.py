"""Recall as the report shows it: a table by context and depth, and a plot, of the source and of every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.benchmarks.recall import Recall
from compress.report.plots import draw
from compress.report.tables import as_markdown, recall_table, result_table
from compress.runner.record import RunRecord, SourceRecord, StageRecord, State

RECALL = Recall(contexts=(256, 1024), needle_depths=(0, 0.5))


def figures(value: float) -> dict[str, float]:
    measured = {name: value for figure in RECALL.figures() for name in (figure, f"{figure}_se")}
    return {**measured, "mqar_chance": 1 / RECALL.mqar_pairs}


def record(metrics: dict[str, Any]) -> RunRecord:
    convert = StageRecord(
        id="convert", stage="convert", key="k", directory="01-convert", returns="torch", hidden=False,
        inputs={"input": "source"},
    )  # fmt: skip
    inputs = {"input": "convert", "source": "source"}
    measured = convert.model_copy(
        update={"id": "evaluate", "returns": "measurement", "inputs": inputs, "metrics": metrics}
    )
    return RunRecord(
        name="r", state=State.DONE, started="", seed=0, versions={}, hardware={}, target={}, git_commit=None,
        source=SourceRecord(name="m", key="s"), stages=(convert, measured),
    )  # fmt: skip


@pytest.fixture
def asked() -> RunRecord:
    return record({"result": figures(0.25), "source": figures(0.75)})


def test_the_table_has_every_task_and_depth_beside_the_source_at_every_length(asked: RunRecord) -> None:
    table = recall_table(asked)
    assert table is not None
    assert table.columns == ("", "source @ 256", "result @ 256", "source @ 1024", "result @ 1024")
    assert [row[0] for row in table.rows] == [
        "MQAR: next token right", "MQAR: right among the values", "MQAR: log p", "needle: all digits right",
        "needle: all digits right, at depth 0", "needle: all digits right, at depth 0.5", "needle: log p",
        "perplexity",
    ]  # fmt: skip
    assert {row[1:] for row in table.rows} == {("0.75 ± 0.75", "0.25 ± 0.25") * 2}
    assert "guessing among the values is right 0.0625 of the time" in table.note


def test_the_result_lists_the_headline_figures_only(asked: RunRecord) -> None:
    names = [row[0] for row in result_table(asked).rows]
    assert names == [f"{words} {length}" for words in ("pairs recalled (MQAR) over", "needle found in")
                     for length in RECALL.contexts]  # fmt: skip
    assert "depth" not in as_markdown(result_table(asked))


def test_recall_is_drawn_where_it_was_measured(asked: RunRecord, tmp_path: Path) -> None:
    drawn = draw(asked, tmp_path)
    assert [plot.name for plot in drawn] == ["recall.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")
    unasked = record({"result": {"perplexity": 2.0}, "source": {"perplexity": 1.0}})
    assert recall_table(unasked) is None
    assert [plot.name for plot in draw(unasked, tmp_path)] == ["quality.png"]
