"""Whatever stdout is, a verb does its work and its status says how that went."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fakes
import pytest

Call = Callable[..., tuple[int, str]]

VERBS: dict[str, tuple[str, ...]] = {
    "check": ("check", "pipeline.yaml"),
    "plan": ("plan", "pipeline.yaml", "--no-twin"),
    "run": ("run", "pipeline.yaml", "--no-twin"),
    "show": ("show", "pico"),
    "compare": ("compare", "pico", "pico"),
    "bench": ("bench", "onnx"),
    "eval": ("eval", "model", "--text", "text"),
    "stages": ("stages",),
    "schema": ("schema",),
    "init": ("init", "model", "--output", "new.yaml", "--force"),
    "gc": ("gc",),
    "help": ("--help",),
    "version": ("--version",),
}


@pytest.fixture
def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "ascii", "strict")


@pytest.fixture
def cut_off() -> Iterator[IO[str]]:
    """A pipe whose reader has gone: `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("verb", VERBS)
def test_a_stdout_without_our_characters(here: Path, call: Call, ascii_only: Any, verb: str) -> None:
    status, told = call(*VERBS[verb], stdout=ascii_only)
    assert (status, "Traceback" in told) == (0, False), told
    printed = ascii_only.buffer.getvalue().decode("ascii")
    assert printed.strip()
    if verb in ("run", "show"):
        assert "12.00 +- 0.25" in printed
        assert "1.5x" in printed


@pytest.mark.parametrize("verb", VERBS)
def test_a_stdout_that_nobody_reads(here: Path, call: Call, cut_off: Any, verb: str) -> None:
    for stdout in (cut_off, None):
        status, told = call(*VERBS[verb], stdout=stdout)
        assert (status, "warning" in told, "error" in told.lower()) == (0, False, False), told


@pytest.mark.parametrize("verb", VERBS)
def test_a_stdout_that_is_full(here: Path, call: Call, verb: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        status, told = call(*VERBS[verb], stdout=full)
    last = told.splitlines()[-1]
    what = "stdout: can't be written (No space left on device); "
    if verb == "run":  # the run is done, and recorded
        assert (status, last) == (0, f"warning: {what}`compress show runs/pico` shows it")
    else:
        assert (status, last) == (1, f"error: {what}print to another place")


@pytest.mark.parametrize("kind", ["ascii", "cut off", "closed", "full"])
def test_a_missed_requirement_keeps_its_status(
    here: Path, call: Call, ascii_only: Any, cut_off: Any, kind: str
) -> None:
    fakes.make_pipeline(here, (here / "model").resolve(), require={"perplexity": "<= 1x source"})
    with open("/dev/full", "w", encoding="utf-8") as full:
        stdout = {"ascii": ascii_only, "cut off": cut_off, "closed": None, "full": full}[kind]
        assert call("run", "pipeline.yaml", "--no-twin", stdout=stdout)[0] == 3


def test_what_is_wrong_is_told_whatever_stdout_is(here: Path, call: Call, cut_off: Any) -> None:
    for stdout in (None, cut_off):
        status, told = call("check", "pipelin.yaml", stdout=stdout)
        assert status == 2
        assert told == "error: pipelin.yaml: no such file; did you mean 'pipeline.yaml'?\n"


def test_closed_descriptors_are_not_taken_by_other_files(here: Path) -> None:
    """`>&-`: the first file that is opened would be number 1, and get what a library prints."""
    program = (
        "import sys; sys.argv[1:] = ['init', 'model', '--force']; sys.path.insert(0, sys.argv[0])\n"
        "import compress.pipeline.starter as starter, os\n"
        "starter.starter = lambda *_: os.write(1, b'from a library') and 'the file'\n"
        "from compress.cli.main import main; main()"
    )
    for closed in (">&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program])
        assert done.returncode == 0
        assert Path("pipeline.yaml").read_text() == "the file"


def test_bench_prints_before_it_draws(here: Path, call: Call, ascii_only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        assert b"time to first token" in ascii_only.buffer.getvalue()
        raise ValueError("no such font")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    status, told = call("bench", "onnx", "--plot", "times.png", stdout=ascii_only)
    assert (status, told) == (0, "warning: the plot times.png can't be written (ValueError: no such font)\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--plot", "times.xyz"), "--plot: 'times.xyz' is no .png, .svg, .pdf"),
        (("--plot", "none/times.png"), "--plot: 'none/times.png' can't be a file"),
        (("--plot", "times.png"), "--plot: matplotlib, which draws it, is not installed; pip install matplotlib"),
        (("--runtime", "genai"), "--runtime genai: onnxruntime-genai is not installed"),
        (("--threads", "100000"), "--threads: 100000 threads, but this process may use "),
    ],
)
def test_bench_refuses_before_it_measures_what_it_can_not_do(
    here: Path, call: Call, ascii_only: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    if "not installed" in words:
        monkeypatch.setattr("compress.cli.bench.find_spec", lambda name: None)
    monkeypatch.delattr("compress.benchmarks.latency.race")
    status, told = call("bench", "onnx", *options, stdout=ascii_only)
    assert status == 2
    assert told.startswith(f"error: {words}")
    assert told.count("\n") == 1
