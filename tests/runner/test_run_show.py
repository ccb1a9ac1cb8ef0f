"""`show`, `compare`, `gc` and `plan` on runs of fake stages, within this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from compress import __version__, registry
from compress.cli.main import app
from compress.errors import ExitCode, InvalidInput


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_points", fakes.points)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fakes.make_model(tmp_path / "model")


def cli(*arguments: str) -> str:
    """What the command line prints to stdout; the error that it raises is raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def from_json(*arguments: str) -> Any:
    return json.loads(cli(*arguments, "--json"))


def run(**changes: Any) -> str:
    fakes.make_pipeline(Path.cwd(), Path.cwd() / "model", **changes)
    return cli("run", "pipeline.yaml", "--no-twin")


def test_show_prints_what_run_printed() -> None:
    printed = run(require={"perplexity": "<= 2x source"})
    assert cli("show", "pico") == printed
    for words in ("12.00 ± 0.25", "1.5×", "fake-shrink", "deploy: runs/pico/04-fake-export-", "met, 25.0% to spare"):
        assert words in printed


def test_show_json_has_figures_by_subject() -> None:
    run()
    shown = from_json("show", "runs/pico")
    figures = shown["figures"]
    assert figures["result"]["perplexity"] == 12
    assert figures["fake-export"]["perplexity"] == 12
    assert figures["fake-shrink"]["perplexity"] == 10  # measured by the stage after it
    assert figures["source"] == {
        "parameters": 68, "size_mb": pytest.approx(0.000416, rel=0.2), "perplexity": 8, "perplexity_se": 0.2,
        "tpot_ms@128": 20, "loss": 3,
    }  # fmt: skip
    assert Path(shown["deploy"], "model.onnx").is_file()
    with pytest.raises(InvalidInput, match="runs/nothing: is not a run"):
        cli("show", "nothing")


def test_compare_puts_two_results_side_by_side() -> None:
    run()
    run(name="other", stages=["fake-export", {"fake-measure": {"value": 9.0}}])
    assert from_json("compare", "pico", "other")["ratio"]["perplexity"] == 0.75
    assert "0.75×" in cli("compare", "pico", "other")


def test_gc_lists_what_no_run_refers_to_and_deletes_it_when_told() -> None:
    run()
    assert from_json("gc") == {"deleted": False, "directories": [], "total_mb": 0}
    run(shrink={"by": 3.0})
    listed = [Path(entry["path"]) for entry in from_json("gc")["directories"]]
    assert len(listed) == 4
    assert "--yes deletes them" in cli("gc")
    assert all(path.exists() for path in listed)
    assert "freed" in cli("gc", "--yes")
    assert not any(path.exists() for path in listed)
    run(shrink={"by": 3.0})
    assert {stage["state"] for stage in from_json("show", "pico")["stages"]} == {"cached"}


def test_plan_tells_cached_from_todo_and_writes_nothing() -> None:
    fakes.make_pipeline(Path.cwd(), Path.cwd() / "model")
    planned = from_json("plan", "pipeline.yaml", "--no-twin")
    assert {stage["state"] for stage in planned["stages"]} == {"todo"}
    assert not Path("runs").exists()
    shrink = planned["stages"][0]
    assert shrink["num_hidden_layers"] == 4
    assert shrink["parameters"] == 4 * (4 * 64 + 3 * 8 * 16) + 2 * 32 * 8
    assert shrink["estimated"]["size_mb"] == pytest.approx(4 * shrink["parameters"] / 1e6)
    assert planned["stages"][3]["estimated"]["size_mb"] == pytest.approx(shrink["parameters"] / 2 / 1e6)
    run()
    run(stages=[{"fake-shrink": {}}, "fake-export"])
    table = cli("plan", "pipeline.yaml", "--no-twin")
    assert table.count("cached") == 2
    assert "estimates are rough" in table


def test_the_report_holds_all_it_shows() -> None:
    run(require={"perplexity": "<= 2x source"})
    html = Path("runs/pico/report.html").read_text()
    assert html.count("data:image/png;base64,") == 2  # quality of the stages, speed over the prompt's length
    assert "src=\"plots" not in html
    assert "12.00 ± 0.25" in html
    assert "fake-shrink: {}" in html
    markdown = Path("runs/pico/report.md").read_text()
    assert "| perplexity | 8.00 ± 0.20 | 12.00 ± 0.25 | 1.5× |" in markdown
    caption = "Quality after each stage where it was measured, with standard errors; lower is better"
    assert f"![{caption}](plots/quality.png)\n\n*{caption}.*" in markdown
    assert f"<figcaption>{caption}.</figcaption>" in html
    assert Path("runs/pico/plots/quality.png").stat().st_size > 5000


def test_the_report_begins_with_the_result_and_its_headings_are_words() -> None:
    fakes.make_pipeline(Path.cwd(), Path.cwd() / "model", require={"perplexity": "<= 2x source", "tpot_ms@128": "<= 1"})
    assert CliRunner().invoke(app, ["run", "pipeline.yaml", "--no-twin"]).exit_code == ExitCode.REQUIREMENT_MISSED
    markdown = Path("runs/pico/report.md").read_text()
    headings = [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")]
    assert headings == ["Result", "Requirements", "After each stage", "Time and memory", "Plots", "Circumstances"]
    assert "1 of 2 met.\n\n- perplexity 12, required" in markdown
    html = Path("runs/pico/report.html").read_text()
    assert html.count("<h2>") == len(headings) + 1, "and the pipeline"
    assert html.count('<li class="missed">tpot_ms@128 5') == 1
    rows = [line.split(" | ")[0] for line in markdown.splitlines() if line.startswith("| ")]
    shown = ("| perplexity", "| weights on disk (MB)", "| each token, after 128 (ms)")
    assert [row for row in rows if row in shown] == [*shown], "quality, size, time"


def test_the_report_holds_each_stages_time_and_memory_beside_what_was_estimated() -> None:
    run()
    shown = from_json("show", "pico")
    planned = {stage["id"]: stage["estimated"] for stage in from_json("plan", "pipeline.yaml", "--no-twin")["stages"]}
    assert {stage["id"]: stage["estimated"] for stage in shown["stages"]} == planned
    markdown = Path("runs/pico/report.md").read_text()
    for stage in shown["stages"]:
        assert stage["peak_rss_mb"] > 20
        memory = f"{stage['peak_rss_mb']:.0f} | {stage['estimated']['ram_mb']:.0f} |"
        assert f"| {stage['id']} | <1 s | {stage['estimated']['seconds']:.0f} s | {memory}" in markdown


def test_version() -> None:
    assert cli("--version") == f"compress {__version__}\n"
