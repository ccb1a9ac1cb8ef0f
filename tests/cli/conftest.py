"""The command line in this process: its verbs on a run of fake stages, with whatever stdout there is."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest

from compress import registry
from compress.cli.main import main
from compress.pipeline.file import load_pipeline
from compress.runner.run import run_pipeline
from compress.stage import Reporter

Call = Callable[..., tuple[int, str]]


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
