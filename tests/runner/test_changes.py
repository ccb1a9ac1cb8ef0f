"""`plan` and the log of a run say which ingredient made a stage new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
from typer.testing import CliRunner

from compress import hardware, registry
from compress.cli.main import app


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_points", fakes.points)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.runner.run.write_report", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    installed = {"torch": "2.13.0", "transformers": "5.23.0"}
    monkeypatch.setattr(hardware, "version", lambda package: installed.get(package, "1.0"))
    fakes.make_model(tmp_path / "model")


def cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def write(**changes: Any) -> None:
    fakes.make_pipeline(Path.cwd(), Path.cwd() / "model", **changes)


def run(**changes: Any) -> None:
    write(**changes)
    cli("run", "pipeline.yaml", "--no-twin")


def changes(**of_pipeline: Any) -> dict[str, list[str]]:
    """What `plan` says of the pipeline with these changes, by stage, in JSON and in words."""
    write(**of_pipeline)
    stages = json.loads(cli("plan", "pipeline.yaml", "--no-twin", "--json"))["stages"]
    found = {stage["id"]: stage["changes"] for stage in stages if stage["changes"]}
    shown = cli("plan", "pipeline.yaml", "--no-twin")
    assert all(f"{id}: {'; '.join(words)}\n" in shown for id, words in found.items())
    return found


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "transformers": "5.24.0"}
    monkeypatch.setattr(hardware, "version", lambda package: installed.get(package, "1.0"))


def other_text(_: pytest.MonkeyPatch) -> None:
    Path("text/train.txt").write_text("other text, of which there is enough for a line. " * 40)


@pytest.mark.parametrize(
    ("change", "of_pipeline", "said"),
    [
        (None, {"shrink": {"by": 4.0}}, "option by 2.0 → 4.0"),
        (None, {"shrink": {"fail_on_twin": True}}, "option fail_on_twin off → True"),
        (None, {"seed": 1}, "seed 0 → 1"),
        (upgrade, {}, "transformers 5.23 → 5.24"),
        (other_text, {}, "text of train changed"),
        (lambda patch: patch.setattr(fakes.FakeShrink, "version", 2), {}, "version 1 → 2"),
        (lambda patch: patch.setattr(fakes.FakeShrink, "splits", frozenset()), {}, "text of train is not read"),
    ],
)
def test_the_ingredient_is_named(
    change: Callable[[pytest.MonkeyPatch], None] | None, of_pipeline: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run()
    if change is not None:
        change(monkeypatch)
    found = changes(**of_pipeline)
    assert found["fake-shrink"] == [said]
    assert "input fake-shrink is new" in found["fake-export"]
    if change is None:
        assert "fake-measure" in found
        assert "source/fake-export" not in found
    run(**of_pipeline)
    assert f"fake-shrink: {said}\n" in Path("runs/pico/run.log").read_text()


def test_a_machine_and_a_target_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = hardware.Machine("old", ("avx2",), 2, 8.0, "Linux")
    monkeypatch.setattr("compress.runner.key.this_machine", lambda: machine)
    run()
    machine = hardware.Machine("new", ("avx512f",), 2, 8.0, "Linux")
    assert changes(target={"threads": 4})["fake-measure"] == [
        "target threads 2 → 4", "cpu old → new", "CPU instructions +avx512f -avx2",
    ]  # fmt: skip


def test_other_weights_of_a_teacher_are_named() -> None:
    for name in ("teacher", "other"):
        fakes.make_model(Path(name))
    stages = ["fake-export"]
    run(stages=[{"fake-shrink": {"teacher_model": "teacher"}}, *stages])
    config = json.loads(Path("teacher/config.json").read_text())
    Path("teacher/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    found = changes(stages=[{"fake-shrink": {"teacher_model": "teacher"}}, *stages])
    assert found["fake-shrink"] == ["teacher:teacher is new"]
    assert changes(stages=["fake-shrink", *stages])["fake-shrink"] == ["reads no teacher any more"]


def test_a_stage_is_held_against_the_newest_of_its_own_and_none_in_use() -> None:
    run(shrink={"by": 3.0})
    run(shrink={"by": 4.0})
    assert changes(shrink={"by": 5.0})["fake-shrink"] == ["option by 4.0 → 5.0"]
    run()
    added = ["fake-shrink", {"fake-shrink": {"id": "again", "by": 9.0}}]
    write(stages=added)
    first, again = json.loads(cli("plan", "pipeline.yaml", "--no-twin", "--json"))["stages"]
    assert again["compared_with"] not in (None, Path(first["directory"]).name), "an earlier one that nothing uses"
    assert again["ingredients"]["options"]["by"] == 9.0


def test_what_was_never_made_has_nothing_to_be_held_against() -> None:
    assert changes() == {}


def test_an_artifact_of_an_earlier_version_says_that_it_can_not_tell() -> None:
    run()
    for file in Path("runs/pico").glob("*/artifact.json"):
        manifest = json.loads(file.read_text())
        for name in ("ingredients", "id", "sha256"):
            del manifest[name]
        file.write_text(json.dumps(manifest))
    assert changes(shrink={"by": 4.0})["fake-shrink"] == [
        "made before artifacts said what they are made of: what changed can't be told"
    ]


def test_the_key_is_that_of_the_ingredients_that_are_kept() -> None:
    from compress.runner.key import key_of

    run()
    for file in Path("runs/pico").glob("*/artifact.json"):
        manifest = json.loads(file.read_text())
        assert manifest["key"] == key_of(manifest["ingredients"])
        assert manifest["id"] in ("fake-shrink", "fake-export", "fake-measure", "fake-measure-2", "source/fake-export")
