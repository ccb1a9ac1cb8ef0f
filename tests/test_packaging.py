"""The wheel holds every module, under one import root and nothing beside it."""

from __future__ import annotations

import re
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from wheels import ROOMS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    assert wheel.name.startswith("compress_pipeline-")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel(wheel_names: set[str]) -> None:
    expected = {
        f"{inside}/{file.relative_to(ROOT / room).as_posix()}"
        for inside, room in ROOMS.items()
        for file in (ROOT / room).rglob("*.py")
    }
    assert expected == {name for name in wheel_names if name.endswith(".py")}


def test_one_top_level_name(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"compress"}


def test_licence_is_in_the_wheel(wheel_names: set[str]) -> None:
    assert any(re.fullmatch(r".*\.dist-info/licenses/LICENSE", name) for name in wheel_names)


def test_entry_points_name_stages_that_load() -> None:
    from compress.registry import stage_class, stage_names

    assert {point.name for point in entry_points(group="compress.stages")} == set(stage_names())
    for name in stage_names():
        assert stage_class(name).name == name
