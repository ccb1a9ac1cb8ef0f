"""Bad input, each in a process of its own: one clear message, the right status, nothing finished lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fakes
import pytest

TESTS = Path(__file__).parents[1]
Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a model and a pipeline that has run."""
    fakes.make_model(tmp_path / "model")
    fakes.make_pipeline(tmp_path, tmp_path / "model")
    assert compress(tmp_path, "run", "pipeline.yaml", "--no-twin").returncode == 0
    return tmp_path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


def compress(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "fakes.py"), *arguments], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**os.environ, "COMPRESS_CACHE": str(folder / "cache"), **environment},
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
    *_, last = lines = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    for word in words:
        assert word in last


def finished(runs: Path) -> set[Path]:
    return set(runs.glob("pico/*/artifact.json"))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _shrunk(folder: Path) -> Path:
    return next(folder.glob("runs/pico/*-fake-shrink-*"))


def _replace(folder: Path, old: str, new: str) -> None:
    file = folder / "pipeline.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def _same_text(folder: Path) -> None:
    _replace(folder, "max_overlap: 1.0", "max_overlap: 0.0")
    shutil.copyfile(folder / "text/train.txt", folder / "text/eval.txt")


CASES: dict[str, tuple[Damage, int, list[str]]] = {
    "a cut model": (lambda f: _cut(f / "model/model.safetensors"), 2, ["model.safetensors", "cut short"]),
    "no weights": (lambda f: (f / "model/model.safetensors").unlink(), 2, ["no .safetensors"]),
    "no model": (lambda f: shutil.rmtree(f / "model"), 2, ["pipeline.yaml:2 model", "no such model"]),
    "no text": (lambda f: (f / "text/train.txt").unlink(), 2, ["data.train", "no file matches"]),
    "an empty text": (lambda f: (f / "text/train.txt").write_text(""), 2, ["data.train", "is empty"]),
    "a blank text": (lambda f: (f / "text/eval.txt").write_text(" \n\n"), 2, ["data.eval", "holds no text"]),
    "a text in Latin-1": (lambda f: (f / "text/eval.txt").write_bytes(b"caf\xe9"), 2, ["data.eval", "not UTF-8"]),
    "text to train and to judge on": (_same_text, 2, ["data.eval", "also stands in data.train"]),
    "an unknown key": (lambda f: _replace(f, "stages:", "stagse:"), 2, ["did you mean 'stages'"]),
    "a wrong type": (lambda f: _replace(f, "value: 12.0", "value: twelve"), 2, ["a number", "'twelve'"]),
    "a wrong format": (lambda f: _replace(f, "- fake-export", "- fake-export\n- fake-shrink"), 2, ["takes torch"]),
    "no file": (lambda f: (f / "pipeline.yaml").unlink(), 2, ["pipeline.yaml: no such file"]),
    "a flipped bit": (lambda f: _flip(_shrunk(f) / "model.safetensors"), 1, ["digest differs", "delete runs/pico/01"]),
    "a cut artifact": (lambda f: _cut(_shrunk(f) / "model.safetensors"), 1, ["digest differs", "delete runs/pico/01"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(folder: Path, case: str) -> None:
    damage, status, words = CASES[case]
    before = finished(folder / "runs")
    damage(folder)
    assert_refused(compress(folder, "run", "pipeline.yaml", "--no-twin"), status, *words)
    assert finished(folder / "runs") == before


def test_a_tokenizer_of_another_model(folder: Path, pico: Callable[[str], Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pico("llama") / name, folder / "model" / name)
    words = ("tokenizer: gives token 511", "to a model of 32 embeddings")
    assert_refused(compress(folder, "run", "pipeline.yaml"), 2, *words)
    assert_refused(compress(folder, "plan", "pipeline.yaml", "--json"), 2, *words)


def test_half_an_artifact_is_made_again(folder: Path) -> None:
    (_shrunk(folder) / "artifact.json").unlink()
    done = compress(folder, "run", "pipeline.yaml", "--no-twin")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached") == 4


def test_from_an_unknown_stage_loses_nothing(folder: Path) -> None:
    before = finished(folder / "runs")
    refused = compress(folder, "run", "pipeline.yaml", "--from", "fake-shrnk")
    assert_refused(refused, 2, "--from", "did you mean 'fake-shrink'")
    assert finished(folder / "runs") == before


def test_from_a_stage_whose_source_is_gone_loses_nothing(folder: Path) -> None:
    before = finished(folder / "runs")
    _cut(folder / "model/model.safetensors")
    assert_refused(compress(folder, "run", "pipeline.yaml", "--from", "fake-shrink", "--no-twin"), 2, "cut short")
    assert finished(folder / "runs") == before


@pytest.mark.parametrize("left_kb", [0, 12, 40])
def test_a_full_disk(folder: Path, disk: Path, left_kb: int) -> None:
    (disk / "other").write_bytes(bytes((1000 - left_kb) * 1024))
    full = compress(folder, "run", "pipeline.yaml", "--no-twin", "--runs", str(disk))
    assert full.returncode in (1, 2)
    assert_refused(full, full.returncode, "disk")
    (disk / "other").unlink()
    assert compress(folder, "run", "pipeline.yaml", "--no-twin", "--runs", str(disk)).returncode == 0


def test_a_disk_that_can_not_be_written(folder: Path, disk: Path) -> None:
    run = ("run", "pipeline.yaml", "--no-twin", "--runs", str(disk))
    assert compress(folder, *run).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert_refused(compress(folder, *run), 2, "can't write the run directory: Read-only file system", "--runs")
    assert "perplexity" in compress(folder, "show", "pico", "--runs", str(disk)).stdout
    assert compress(folder, "run", "pipeline.yaml", "--no-twin", COMPRESS_CACHE=str(disk / "cache")).returncode == 0
