"""The command line in this process: its verbs on a run of fake stages, with whatever stdout there is."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import pytest

from compress import registry
from compress.benchmarks import report
from compress.benchmarks.contest import Measured
from compress.cli.main import main
from compress.pipeline.file import load_pipeline
from compress.runner.run import run_pipeline
from compress.stage import Reporter

Call = Callable[..., tuple[int, str]]
MACHINE = {
    "cpu": "a CPU", "threads": 1, "cpus": [0], "load_average": None, "versions": {}, "busy_percent": 0.0,
    "governor": None, "runtime": "ort",
}  # fmt: skip


@pytest.fixture(scope="session")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a pipeline and a finished run of it."""
    folder = tmp_path_factory.mktemp("a_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_points", fakes.points)
        pipeline = load_pipeline(fakes.make_pipeline(folder, fakes.make_model(folder / "model")))
        run_pipeline(pipeline, runs=folder / "runs", reporter=Reporter(), twin=False)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("check", "file", stdout=…)`: the exit status, and what stderr says."""
    monkeypatch.setattr(registry, "_points", fakes.points)

    def run(*arguments: object, stdout: Any) -> tuple[int, str]:
        stderr = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["compress", *map(str, arguments)])
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            with pytest.raises(SystemExit) as end:
                main()
        stderr.flush()
        return int(end.value.code or 0), stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]

    return run


@pytest.fixture
def here(a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which every verb has something to do; what is measured is made up."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "text", "runs"):
        (tmp_path / name).symlink_to(a_run / name)
    shutil.copyfile(a_run / "pipeline.yaml", tmp_path / "pipeline.yaml")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(b"onnx")
    one = Measured("decoder", 1.0, 1.0, True, 2.0, {"ttft_ms@128": [[1.0]] * 3, "tpot_ms@128": [[2.0]] * 3})
    found = report.assemble({"onnx": one}, MACHINE, {"onnx": tmp_path / "onnx"})
    monkeypatch.setattr("compress.benchmarks.latency.race", lambda *_, **__: found)
    judged = SimpleNamespace(
        result=lambda: {"perplexity": 7.0, "perplexity_se": float("nan")}, num_predictions_N=[8, 8],
        to_json=lambda: {"num_blocks": 2},
    )
    monkeypatch.setattr("compress.benchmarks.judging.judge", lambda *_, **__: judged)
    return tmp_path
