"""A plot that can't be drawn or written is a warning, in every stage and verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.registry import stage_class, stage_names
from compress.report.optional import drawing

ROOT = Path(__file__).parents[2]
IN_A_RUN = ("compress/train", "compress/quant", "compress/models", "stages", "exports", "benchmarks/report.py")
"""Where plots are drawn beside what was computed; what draws a run's report is optional as a whole."""


@drawing
def half_a_plot(words: str, file: Path) -> None:
    file.write_text("half")
    if words:
        raise OSError(28, words) if words == "full" else ValueError(words)


@pytest.mark.parametrize(("words", "why"), [("full", "(full)"), ("no font", "(ValueError: no font)")])
def test_what_fails_is_a_warning_and_leaves_no_half(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str, why: str
) -> None:
    half_a_plot(words, tmp_path / "plot.png")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"warning: the plot {tmp_path / 'plot.png'} can't be written {why}"]
    assert not (tmp_path / "plot.png").exists()
    half_a_plot("", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_text() == "half"


def test_an_interruption_is_none(tmp_path: Path) -> None:
    @drawing
    def interrupted(file: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "plot.png")


def drawers() -> Iterator[tuple[str, ast.FunctionDef, ast.Module]]:
    places = [ROOT / place for place in IN_A_RUN]
    for file in [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]:
        module = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and ".savefig(" in ast.unparse(node):
                yield f"{file.relative_to(ROOT)}:{node.name}", node, module


def test_every_plot_of_a_stage_is_optional() -> None:
    found = {name: [ast.unparse(one) for one in node.decorator_list] for name, node, _ in drawers()}
    assert len(found) >= 7
    assert {name for name, decorators in found.items() if "drawing" not in decorators} == set()


def test_every_plot_of_a_stage_has_a_caption() -> None:
    files = [*(ROOT / "stages").rglob("*.py"), *(ROOT / "compress/train").glob("*.py"), ROOT / "benchmarks/latency.py"]
    drawn = {name for file in files for name in re.findall(r'/ "(\w+\.png)"', file.read_text("utf-8"))}
    assert len(drawn) >= 6
    assert drawn == {name for stage in stage_names() for name in stage_class(stage).plots}


def test_no_import_of_matplotlib_ends_a_stage() -> None:
    """It reads its settings then, and may not like them."""
    at_the_top = {
        name for name, _, module in drawers() for node in module.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matplotlib")
    }  # fmt: skip
    assert at_the_top == set()
