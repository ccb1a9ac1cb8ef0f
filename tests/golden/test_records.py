"""Every stage makes what the record of its version says; a new version is said in the CHANGELOG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.registry import stage_class
from golden.cases import CASES
from golden.comparing import differences
from golden.models import Workshop
from golden.recording import as_json, case_record, defaults
from golden.write import FOLDER, lines, own_stages, record_file, write

Written = Callable[[str], dict[str, Any]]
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def test_there_is_one_record_of_every_stage() -> None:
    assert {file.name for file in FOLDER.glob("*.json")} == {record_file(stage).name for stage in own_stages()}


@pytest.mark.parametrize("stage", own_stages())
def test_its_head_and_its_defaults(stage: str, written: Written) -> None:
    record = written(stage)
    assert (record["stage"], record["version"]) == (stage, stage_class(stage).version)
    assert record["defaults"] == defaults(stage_class(stage))
    assert set(record["cases"]) == set(CASES[stage])


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in CASES for name in CASES[stage]])
def test_a_stage_makes_what_its_record_says(stage: str, name: str, written: Written, workshop: Workshop) -> None:
    now = as_json(case_record(stage, CASES[stage][name], workshop))
    found = list(differences(written(stage)["cases"][name], now))
    assert not found, "raise the version, if that is meant: see CONTRIBUTING.md"


@pytest.mark.parametrize("stage", [stage for stage in own_stages() if stage_class(stage).version > 1])
def test_the_changelog_says_what_a_version_changed(stage: str) -> None:
    assert f"`{stage}@{stage_class(stage).version}`" in CHANGELOG.read_text("utf-8")


def test_a_record_is_written_once(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "latency@0.json").write_text("{}")
    file = record_file("latency", tmp_path)
    said = [f"{file.name} written", "latency@0.json is superseded: git rm it"]
    assert list(write(["latency"], workshop, tmp_path)) == said
    assert json.loads(file.read_text()) == json.loads(record_file("latency").read_text())
    file.write_text("another")
    assert "stays" in next(write(["latency"], workshop, tmp_path))
    assert file.read_text() == "another"


def test_it_is_json_in_short_lines() -> None:
    value = {"a": [{"b": list(range(30))}] * 2, "c": {}, "d": [], "e": "x" * 200}
    assert json.loads("\n".join(lines(value))) == value
