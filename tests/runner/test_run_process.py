"""`compress run` as a process: killed, interrupted, locked, judged by its exit status, fast when all is cached."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fakes.make_model(tmp_path / "model")
    return tmp_path


def compress(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with the fake stages to its end."""
    process = start(folder, *arguments)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """As from a terminal: a shell's background job, which tests may be run in, would have it ignore SIGINT."""
    environment = {**os.environ, "COMPRESS_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, str(TESTS / "fakes.py"), *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def cpu_seconds() -> float:
    """What the processes that we waited for have computed until now."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pipeline(folder: Path, **changes: Any) -> None:
    fakes.make_pipeline(folder, folder / "model", **changes)


def steps_done(folder: Path) -> list[int]:
    file = folder / "runs/pico/steps.txt"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def start_and_wait_for_step(folder: Path, step: int) -> subprocess.Popen[str]:
    process = start(folder, "run", "pipeline.yaml", "--no-twin")
    deadline = time.monotonic() + 30
    while step not in steps_done(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_in_a_stage_it_goes_on_from_the_checkpoint_to_the_same_result(folder: Path) -> None:
    pipeline(folder, name="undisturbed", shrink={"steps": 6, "sleep": 0.1})
    undisturbed = json.loads(compress(folder, "run", "pipeline.yaml", "--no-twin", "--json").stdout)
    pipeline(folder, shrink={"steps": 6, "sleep": 0.1})
    process = start_and_wait_for_step(folder, 2)
    process.kill()
    process.communicate()
    assert not list(folder.glob("runs/pico/*/artifact.json"))
    done = compress(folder, "run", "pipeline.yaml", "--no-twin", "--json")
    assert done.returncode == 0, done.stderr
    assert steps_done(folder) in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 3, 4, 5])  # killed after or before its checkpoint
    record = json.loads(done.stdout)
    assert record["figures"] == undisturbed["figures"]
    assert [stage["key"] for stage in record["stages"]] == [stage["key"] for stage in undisturbed["stages"]]
    assert sorted(path.name for path in Path(folder / record["deploy"]).iterdir()) == ["artifact.json", "model.onnx"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_what_is_kept(folder: Path, number: signal.Signals) -> None:
    pipeline(folder, shrink={"steps": 100, "sleep": 0.1})
    process = start_and_wait_for_step(folder, 1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("interrupted: what is finished is kept in runs/pico")
    assert "Traceback" not in stderr
    assert json.loads((folder / "runs/pico/run.json").read_text())["state"] == "interrupted"
    assert "interrupted" in compress(folder, "show", "pico").stdout


def test_the_second_of_two_runs_is_refused(folder: Path) -> None:
    pipeline(folder, shrink={"steps": 100, "sleep": 0.1})
    process = start_and_wait_for_step(folder, 0)
    second = compress(folder, "run", "pipeline.yaml", "--no-twin")
    assert second.returncode == 2
    assert second.stderr == (
        f"error: runs/pico: another run is in it (process {process.pid}); wait for it, or stop it first\n"
    )
    assert json.loads(compress(folder, "gc", "--json").stdout)["directories"] == []
    process.kill()
    process.communicate()


def test_failures_are_one_line_and_have_their_status(folder: Path) -> None:
    pipeline(folder, shrink={"fail": "user"})
    failed = compress(folder, "run", "pipeline.yaml", "--no-twin")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: fake-shrink: can't shrink this; use another"
    assert "Traceback" not in failed.stderr
    pipeline(folder, shrink={"fail": "bug"})
    bug = compress(folder, "run", "pipeline.yaml", "--no-twin")
    assert bug.returncode == 1
    assert "ZeroDivisionError: a bug\n(in stage 'fake-shrink'" in bug.stderr
    missing = compress(folder, "run", "pipelin.yaml")
    assert missing.returncode == 2
    assert "did you mean 'pipeline.yaml'" in missing.stderr


def test_a_missed_requirement_has_its_own_status(folder: Path) -> None:
    pipeline(folder, require={"perplexity": "<= 1.4x source"})
    missed = compress(folder, "run", "pipeline.yaml", "--no-twin")
    assert missed.returncode == 3
    assert "perplexity 12, required <= 11.2 (1.4x source): missed by 7.1%" in missed.stdout
    assert "deploy: runs/pico/04-fake-export-" in missed.stdout


def test_a_cached_run_is_quick_and_imports_no_torch(folder: Path) -> None:
    pipeline(folder)
    assert compress(folder, "run", "pipeline.yaml", "--no-twin").returncode == 0
    script = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); sys.argv = ['compress', 'run', 'pipeline.yaml']\n"
        "import fakes; from compress import registry; registry._points = fakes.points\n"
        "from compress.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "COMPRESS_CACHE": str(folder / "cache")}
    began = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert cpu_seconds() - began < 4  # of the 5 s that it may take: a busy machine does not count
    assert done.returncode == 0, done.stderr
    assert "[5/5] fake-measure-2: cached" in done.stderr
    assert "perplexity" in done.stdout


def test_help_is_quick() -> None:
    began = cpu_seconds()
    code = "from compress.cli.main import app; import sys; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert cpu_seconds() - began < 0.5


def test_bars_of_libraries_are_silent() -> None:
    code = "from compress.cli.main import quiet_libraries as q; q(); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
