"""`gc`: what it lists, what it leaves alone, and that one run's trouble is none of the others'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from compress import registry
from compress.cli.main import app
from compress.pipeline.file import load_pipeline
from compress.runner.lock import is_locked, locked
from compress.runner.run import run_pipeline
from compress.stage import Reporter


@pytest.fixture(scope="module", autouse=True)
def _fake_stages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_points", fakes.points)
        patch.setattr("compress.runner.run.write_report", lambda run_dir, record: None)
        yield


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` and `b`, each with a stage directory that its file had no more use for."""
    folder = tmp_path_factory.mktemp("two")
    model = fakes.make_model(folder / "model")
    for name in ("a", "b"):
        for by in (2.0, 3.0):
            file = fakes.make_pipeline(folder, model, name=name, stages=[{"fake-shrink": {"by": by}}])
            run_pipeline(load_pipeline(file), runs=folder / "runs", reporter=Reporter(), twin=False)
    return folder / "runs"


@pytest.fixture
def runs(two_runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the two runs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(two_runs, tmp_path / "runs"))


def gc(*options: str, status: int = 0) -> tuple[list[str], str]:
    """The runs (or folders) that something is listed in, and what stderr says."""
    done = CliRunner().invoke(app, ["gc", "--json", *options], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return [Path(entry["path"]).parent.name for entry in json.loads(done.stdout)["directories"]], done.stderr


def leftovers(run_dir: Path) -> list[Path]:
    named = {stage["directory"] for stage in json.loads((run_dir / "run.json").read_text())["stages"]}
    return [path for path in run_dir.glob("01-*") if path.name not in named]


def _link_elsewhere(runs: Path) -> None:
    (left,) = leftovers(runs / "a")
    shutil.move(left, runs.parent / "elsewhere")
    left.symlink_to(runs.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a record": (lambda runs: (runs / "a/run.json").write_text("{"), "run.json is damaged"),
    "a record that is no text": (lambda runs: (runs / "a/run.json").write_bytes(b"\xff\0"), "run.json is damaged"),
    "a linked stage folder": (_link_elsewhere, "is a link to"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_one_run_in_disorder_is_left_alone_and_the_others_are_not(runs: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    damage(runs)
    before = sorted(runs.glob("a/*"))
    for options in ([], ["--yes"]):
        listed, told = gc(*options)
        assert listed == ["b"]
        assert words in told
        assert "it is left alone" in told
        assert "runs/a" in told
    assert sorted(runs.glob("a/*")) == before
    assert not leftovers(runs / "b")


def test_what_is_linked_to_is_never_deleted(runs: Path) -> None:
    _link_elsewhere(runs)
    gc("--yes")
    assert (runs.parent / "elsewhere/model.safetensors").is_file()


def test_a_run_that_two_names_lead_to_counts_once(runs: Path) -> None:
    (runs / "z").symlink_to(runs / "a")
    assert gc()[0] == ["a", "b"]
    assert gc("--yes")[0] == ["a", "b"]


def test_it_holds_the_lock_while_it_deletes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, held = shutil.rmtree, []

    def watched(path: Path) -> None:
        held.append(is_locked(path.parent))
        assert not (path / "artifact.json").exists(), "killed here, what is left would be taken for finished"
        rmtree(path)

    monkeypatch.setattr("compress.cli.gc.shutil.rmtree", watched)
    gc("--yes")
    assert held == [True, True]


def test_a_run_that_begins_after_the_listing_keeps_its_directories(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and deleting, the file goes back to what it was: the old directory is in use again."""
    record = runs / "a/run.json"
    (left,) = leftovers(runs / "a")

    def goes_back(path: Path) -> float:
        if path == left.relative_to(runs.parent):
            changed = json.loads(record.read_text())
            changed["stages"][0]["directory"] = left.name
            record.write_text(json.dumps(changed))
        return 1.0

    monkeypatch.setattr("compress.cli.gc._size_mb", goes_back)
    assert gc("--yes")[0] == ["b"]
    assert left.is_dir()


def test_a_run_in_progress_is_skipped_and_the_others_are_not(runs: Path) -> None:
    with locked(runs / "a"):
        assert gc("--yes")[0] == ["b"]


def test_what_can_not_be_deleted_is_told_at_the_end(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def stubborn(path: Path) -> None:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied")
        rmtree(path)

    monkeypatch.setattr("compress.cli.gc.shutil.rmtree", stubborn)
    listed, told = gc("--yes", status=1)
    assert listed == ["b"]
    assert "can't be deleted (Permission denied)" in told


def test_looking_at_a_run_does_not_keep_it_from_beginning(runs: Path) -> None:
    """`gc` looks whether a run is in progress at the moment at which one begins."""
    import fcntl
    import threading

    with (runs / "a/.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with locked(runs / "a"):
            assert is_locked(runs / "a")


def shared(tmp_path: Path, verb: str, file: Path, **changes: Any) -> str:
    """What a verb says of `file`, a pipeline named `pico`."""
    written = fakes.make_pipeline(tmp_path, tmp_path / "model", **changes)
    if written != file:
        shutil.move(written, file)
    done = CliRunner().invoke(app, [verb, str(file), "--no-twin"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stderr


def test_two_files_with_one_name_are_told_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    fakes.make_model(tmp_path / "model")
    a, b, c = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
    assert "warning" not in shared(tmp_path, "run", a)
    assert "warning" not in shared(tmp_path, "run", a, shrink={"by": 3.0}), "a file that was changed is still the same"
    for verb in ("plan", "run"):
        told = shared(tmp_path, verb, b, shrink={"by": 4.0})
        assert f"warning: {b} and {a} are both named 'pico' and share runs/pico" in told.splitlines()[0]
    assert "warning" not in shared(tmp_path, "run", b, shrink={"by": 4.0})
    assert f"warning: {a} and {b}" in shared(tmp_path, "run", a)
    a.rename(c)
    assert "warning" not in shared(tmp_path, "run", c), "a file that was moved goes on"
    assert set(json.loads((tmp_path / "runs/pico/run.json").read_text())) >= {"file", "name"}
