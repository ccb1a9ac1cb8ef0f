"""Pipeline files run whole: those of tests/pipelines on a pico model, and (slow) the quickstart on the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.pipeline.check import valid_pipeline
from compress.report.figures import figures_of
from compress.runner.record import State
from compress.runner.run import run_pipeline
from compress.stage import Reporter

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests/pipelines").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_pipeline_runs_to_its_end_and_is_cached(file: Path, pico: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / file.name
    text = file.read_text("utf-8").replace("PICO-bert", str(pico("bert"))).replace("PICO", str(pico("llama")))
    copy.write_text(text, "utf-8")
    record = run_pipeline(valid_pipeline(copy), runs=tmp_path / "runs", reporter=Reporter())
    assert record.state is State.DONE, record.verdicts
    assert all(verdict.met for verdict in record.verdicts)
    again = run_pipeline(valid_pipeline(copy), runs=tmp_path / "runs", reporter=Reporter())
    assert {stage.state for stage in again.stages} == {State.CACHED}
    assert figures_of(again) == figures_of(record)


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    """What the README promises: exit status 0 means that size and decode speed are as `require` says."""
    command = [sys.executable, "-c", "from compress.cli.main import main; main()", "run", "--json"]
    file = ROOT / "pipelines/quickstart.yaml"
    done = subprocess.run([*command, str(file)], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout
    run = json.loads(done.stdout)
    assert run["state"] == "done"
    figures = run["figures"]
    assert (Path(tmp_path / run["deploy"]) / "genai_config.json").is_file()
    assert figures["qat"]["kl_to_teacher"] < figures["start"]["kl_to_teacher"]
    assert figures["source"]["tpot_ms@128"] / figures["result"]["tpot_ms@128"] > 2.6
