"""`compress verify`: what a disk lost under an unchanged size and time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from compress import registry
from compress.cli.main import app
from compress.errors import InvalidInput


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A finished run."""
    monkeypatch.setattr(registry, "_points", fakes.points)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.runner.run.write_report", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    fakes.make_pipeline(tmp_path, fakes.make_model(tmp_path / "model"))
    cli(0, "run", "pipeline.yaml", "--no-twin")
    return Path("runs/pico")


def cli(status: int, *arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


def flip(file: Path) -> None:
    """One bit, with the size and the time as they were."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)


def test_a_whole_run_is_whole(run_dir: Path) -> None:
    printed = cli(0, "verify", "pico")
    assert printed.count("whole ") == 6
    assert "01-fake-shrink-" in printed
    found = json.loads(cli(0, "verify", str(run_dir), "--json"))
    assert found["whole"]
    assert found["damaged"] == []
    assert len(found["stages"]) == 5
    assert all(stage["finished"] and stage["files"] and not stage["damaged"] for stage in found["stages"])


def test_a_flipped_bit_is_found_that_a_run_does_not_see(run_dir: Path) -> None:
    file = next(run_dir.glob("01-fake-shrink-*/model.safetensors"))
    flip(file)
    cli(0, "run", "pipeline.yaml", "--no-twin")
    printed = cli(1, "verify", "pico")
    assert f"DAMAGED     {file.parent.name}\n" in printed
    assert f"{file}: is not what was written (digest differs)\n" in printed
    assert printed.count("DAMAGED") == 1
    found = json.loads(cli(1, "verify", "pico", "--json"))
    assert not found["whole"]
    assert [stage["damaged"] for stage in found["stages"] if stage["damaged"]] == [
        [{"file": str(file), "what": "is not what was written (digest differs)"}]
    ]


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("01-*/model.safetensors", Path.unlink, "is missing from a finished artifact"),
        ("01-*/artifact.json", edited(metrics={"result": {"loss": 1.0}}), "is damaged (its digest differs)"),
        ("01-*/artifact.json", lambda file: file.write_text("{"), "is damaged"),
        ("run.json", edited(seed=7), "is not what was written (digest differs)"),
        ("run.json", lambda file: file.write_text("{"), "is damaged"),
        ("run.json", Path.unlink, "has no run.json"),
    ],
)
def test_whatever_is_damaged_is_named(run_dir: Path, name: str, harm: Callable[[Path], None], said: str) -> None:
    file = next(run_dir.glob(name))
    harm(file)
    printed = cli(1, "verify", "pico")
    assert any(str(file) in line and said in line for line in printed.splitlines()), printed


def test_a_record_that_says_what_no_stage_does(run_dir: Path) -> None:
    from compress.artifact import sealed, write_json

    file = run_dir / "run.json"
    record = json.loads(file.read_text())
    del record["sha256"]
    shrink, *_, export = (stage for stage in record["stages"] if "measure" not in stage["id"])
    shrink["metrics"]["result"]["steps_done"] = 9.0
    export["directory"] = "04-fake-export-000000000000"
    write_json(file, sealed(record))
    printed = cli(1, "verify", "pico")
    assert f"{file}: says of fake-shrink what {shrink['directory']} does not" in printed
    assert f"{file}: names 04-fake-export-000000000000, which is not there" in printed


def test_what_is_not_finished_is_no_damage(run_dir: Path) -> None:
    next(run_dir.glob("01-*/artifact.json")).unlink()
    assert "unfinished  01-fake-shrink-" in cli(0, "verify", "pico")


def test_what_is_no_run_is_refused(run_dir: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a run"):
        cli(2, "verify", "nothing")
