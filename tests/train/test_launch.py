"""Several processes: what is refused, who decides, and what is left when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import launches

from compress.errors import InvalidInput
from compress.pipeline.file import load_pipeline
from compress.runner.run import run_pipeline
from compress.stage import Reporter
from compress.stages.convert.stage import ConvertAttention
from compress.stages.distill.stage import Distill
from compress.stages.qat.stage import Qat
from compress.train.distributed import leading
from compress.train.launch import check_launch


def ended(folder: Path, first: Callable[[Path], None], *, kill: bool = False, within: float = 30.0) -> list[int | None]:
    """The exit statuses of two processes, the first of which is killed once it is busy, where that is asked for."""
    processes = launches.launch(first, folder)
    try:
        deadline = time.monotonic() + 60
        while kill and not (folder / "busy").exists():
            assert all(process.is_alive() for process in processes), said(folder)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if kill:
            assert processes[0].pid is not None
            os.kill(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.join(within if kill else 60 + within)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def said(folder: Path) -> list[list[str]]:
    """The lines that either process wrote to stderr."""
    return [(folder / f"{rank}").read_text().splitlines() for rank in range(2)]


@pytest.mark.parametrize("first", [launches.busy, launches.trains, launches.waits_for_one_that_hangs])
def test_when_the_first_process_dies_the_others_end_and_say_so(first: Callable[[Path], None], tmp_path: Path) -> None:
    assert ended(tmp_path, first, kill=True) == [-signal.SIGKILL, 1]
    (message,) = said(tmp_path)[1]
    assert message.startswith("error: process 0: ended without a word; was it killed, or out of memory?")


@pytest.mark.parametrize("first", [launches.is_alone, launches.is_alone_and_hangs])
def test_the_first_process_does_not_wait_for_one_that_died(first: Callable[[Path], None], tmp_path: Path) -> None:
    assert ended(tmp_path, first) == [1, 9]
    (message,) = said(tmp_path)[0]
    assert "process 1: ended without a word; was it killed, or out of memory?" in message


def test_what_another_process_fails_of_is_said_once(tmp_path: Path) -> None:
    assert ended(tmp_path, launches.fails) == [1, 1]
    (message,), silence = said(tmp_path)
    assert message.startswith("error: launch: process 1: teacher: is not the one; take another; run again: ")
    assert silence == []


def test_a_full_disk_of_another_process_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "full").touch()
    assert ended(tmp_path, launches.fails) == [1, 1]
    assert [len(lines) for lines in said(tmp_path)] == [1, 0]
    assert "process 1: no space is left on its disk" in said(tmp_path)[0][0]


def test_the_first_process_decides(tmp_path: Path) -> None:
    assert ended(tmp_path, launches.decides) == [0, 0]


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is switched on"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed is switched on"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "Megatron-LM is switched on"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism is switched on"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "--mixed_precision fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend INDUCTOR"),
    ],
)
def test_what_of_a_launch_is_refused_by_name(
    variable: str, value: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from compress.cli.main import app

    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=name):
        CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")], catch_exceptions=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")], catch_exceptions=False).exit_code == 2


def test_an_ordinary_launch_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"USE_FSDP": "false", "MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO"}.items():
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with leading():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InvalidInput, match="RANK is set and LOCAL_RANK is not"):
        check_launch()


def test_trainings_know_what_a_launch_can_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    (problem,) = Distill(batch_size=8, gradient_accumulation_steps=2).indivisible()
    assert (problem.where, problem.what) == ("batch_size", "8 sequences can't be divided into 6 equal parts")
    assert not list(Distill(batch_size=12, gradient_accumulation_steps=2).indivisible())
    convert = ConvertAttention(to="linear").twin()
    distill, qat = Distill(gradient_accumulation_steps=2).twin(), Qat(scheme="w4-block32").twin()
    for twin in (distill, qat, convert.align, convert.distill):
        assert twin is not None
        assert not list(twin.indivisible())
        assert twin.num_steps == 2



def test_a_run_refuses_steps_that_can_not_be_divided_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    stages = [{"prune-layers": {"drop": [1]}}, {"distill": {}}, {"convert-attention": {"to": "linear"}}]
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps({"name": "pico", "model": str(pico("llama")), "stages": stages}))
    for variable in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidInput) as refusal:
        run_pipeline(load_pipeline(file), runs=tmp_path / "runs", reporter=Reporter())
    places = [problem.where for problem in refusal.value.problems]
    options = ("align.batch_size", "distill.batch_size")
    assert places == ["distill.batch_size", *(f"convert-attention.{option}" for option in options)]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidInput, match="FSDP is switched on"):
        run_pipeline(load_pipeline(file), runs=tmp_path / "runs", reporter=Reporter())
    assert not list((tmp_path / "runs").glob("pico/*-*"))
