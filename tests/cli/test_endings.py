"""How a verb ends that is interrupted, killed, or given a pipe, a place that can't be written or too many threads."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import psutil
import pytest

Call = Callable[..., tuple[int, str]]
TESTS = Path(__file__).parents[1]


@pytest.fixture
def nowhere() -> io.TextIOWrapper:
    """A stdout that is not looked at."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8")


def start(*command: object, **environment: str) -> subprocess.Popen[str]:
    """As from a terminal: a shell's background job, which tests may be run in, would have it ignore SIGINT."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment}, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_its_first_instants(number: signal.Signals) -> None:
    """While the command line itself is imported, by the script that pip installs."""
    (point,) = entry_points(group="console_scripts", name="compress")
    program = (
        "import sys, os\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'typer': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Interrupt()); sys.argv = ['compress', 'check', 'pipeline.yaml']\n"
        f"from {point.module} import {point.attr} as main; sys.exit(main())"
    )
    process = start("-c", program)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("function", "command"),
    [
        ("compress.pipeline.check.check_file", ("check", "pipeline.yaml")),
        ("compress.pipeline.check.valid_pipeline", ("run", "pipeline.yaml")),
        ("compress.pipeline.check.valid_pipeline", ("plan", "pipeline.yaml")),
        ("compress.benchmarks.latency.race", ("bench", "onnx")),
        ("compress.benchmarks.judging.judge", ("eval", "onnx", "--text", "python-docs")),
        ("compress.runner.record.load_record", ("show", "onnx")),
        ("compress.models.sources.parse_source", ("init", "model")),
    ],
)
def test_every_verb_is_interrupted_in_one_line(
    tmp_path: Path, call: Call, nowhere: Any, monkeypatch: pytest.MonkeyPatch, function: str, command: Any
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").touch()
    monkeypatch.chdir(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(function, lambda *_, number=number, **__: signal.raise_signal(number))
        assert call(*command, stdout=nowhere) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_no_download_outlives_us(tmp_path: Path) -> None:
    """npm may be a script that starts another program."""
    npm, started = tmp_path / "bin" / "npm", tmp_path / "started"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\nsleep 300 &\necho $$ $! > {started}.new; mv {started}.new {started}; wait\n")
    npm.chmod(0o755)
    text = "name: n\nmodel: npm://none/1.0.0/model\nstages: [fake-export]\n"
    (tmp_path / "pipeline.yaml").write_text(text)
    path = f"{npm.parent}{os.pathsep}{os.environ['PATH']}"
    process = start(TESTS / "fakes.py", "plan", tmp_path / "pipeline.yaml", PATH=path, COMPRESS_CACHE=str(tmp_path))
    wait_for(started.exists)
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "interrupted")
    assert wait_for(lambda: not [pid for pid in map(int, started.read_text().split()) if alive(pid)])


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def piped(text: bytes) -> str:
    """A path that can be read once: `<(cat file)`."""
    reader, writer = os.pipe()
    threading.Thread(target=lambda: (os.write(writer, text), os.close(writer))).start()
    return f"/dev/fd/{reader}"


@pytest.mark.parametrize("command", [("check",), ("plan", "--no-twin"), ("run", "--no-twin")])
def test_a_pipeline_file_from_a_pipe(a_run: Path, call: Call, nowhere: Any, command: tuple[str, ...]) -> None:
    file = piped((a_run / "pipeline.yaml").read_bytes())
    runs = () if command == ("check",) else ("--runs", a_run / "runs")
    assert call(*command, file, *runs, stdout=nowhere)[0] == 0
    os.close(int(file.rpartition("/")[2]))
    empty = piped(b"")
    status, told = call(*command, empty, *runs, stdout=nowhere)
    assert (status, told) == (2, f"error: {empty}: is empty; `compress init MODEL` writes a file to begin with\n")


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/none"])
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_cache_that_can_not_be_written(
    a_run: Path, tmp_path: Path, call: Call, nowhere: Any, monkeypatch: pytest.MonkeyPatch, place: str, command: str
) -> None:
    """What only remembers goes without."""
    (tmp_path / "a file").touch()
    for file in a_run.rglob("*.safetensors"):  # too new, its digest would not be remembered
        os.utime(file, (0, 0))
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / place.replace("below a file", "a file/x")))
    monkeypatch.setattr("compress.fetch.cache._RACY_NS", -1)
    options = () if command == "check" else ("--no-twin", "--runs", a_run / "runs")
    status, told = call(command, a_run / "pipeline.yaml", *options, stdout=nowhere)
    assert (status, "Traceback" in told) == (0, False), told


def test_no_home(a_run: Path, call: Call, nowhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for command in ("plan", "run"):
        status, told = call(command, a_run / "pipeline.yaml", "--no-twin", stdout=nowhere)
        assert status == 2
        assert told == "error: COMPRESS_CACHE: there is no home directory to keep the cache in; set it to a folder\n"


@pytest.mark.parametrize("command", ["plan", "run"])
def test_more_threads_than_this_machine_can_do(
    tmp_path: Path, call: Call, nowhere: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("compress.hardware.this_machine", lambda: SimpleNamespace(num_cpus=2))
    file = partial(fakes.make_pipeline, tmp_path, fakes.make_model(tmp_path / "model"))
    options = ("--no-twin", "--runs", tmp_path / "runs")
    status, told = call(command, file(target={"threads": 17}), *options, stdout=nowhere)
    assert status == 2
    assert told == "error: target.threads: 17 threads, but this process may use 2 CPUs; write 2, one for each\n"
    assert call("check", file(target={"threads": 17}), stdout=nowhere)[0] == 0  # it may run on another machine
    status, told = call("check", file(target={"threads": 100000}), stdout=nowhere)
    assert (status, "threads" in told, "1024" in told) == (2, True, True)


def test_eval_refuses_too_many_threads(tmp_path: Path, call: Call, nowhere: Any) -> None:
    status, told = call("eval", tmp_path, "--text", "python-docs", "--threads", "100000", stdout=nowhere)
    assert status == 2
    assert told.startswith("error: --threads: 100000 threads, but this process may use ")
