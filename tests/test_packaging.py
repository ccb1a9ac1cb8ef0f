"""The wheel holds every module, under one import root and nothing beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "compress": "compress",
    "compress/stages": "stages",
    "compress/exports": "exports",
    "compress/benchmarks": "benchmarks",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")  # no stale build/lib
    for room in ROOMS.values():
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
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
