"""What is declared, what is locked, and the commands by which both are installed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TOUCHED = ("torch", "transformers", "accelerate", "datasets", "onnxruntime", "optimum")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DECLARED = {
    canonicalize_name(requirement.name): requirement.specifier
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
}
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("requirements", ROOT / ".ci/requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def specifiers(lines: Any) -> Mapping[str, SpecifierSet]:
    return {canonicalize_name(each.name): each.specifier for each in map(Requirement, lines)}


def test_the_lock_is_of_plain_versions() -> None:
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==\d+(\.\d+)*(\.post\d+)?", line), line
        assert not line.startswith(("nvidia-", "cuda-", "triton")), line
    names = [line.partition("==")[0] for line in LINES]
    assert sorted(set(names)) == names


def test_the_lock_has_every_dependency_within_its_range() -> None:
    locked = dict(line.split("==") for line in LINES)
    for name, specifier in DECLARED.items():
        assert name in locked, f"{name} is not in constraints.txt: run .ci/lock"
        assert specifier.contains(locked[name]), f"{name} {locked[name]} is outside {specifier}: run .ci/lock"


def test_what_we_touch_the_insides_of_ends_at_the_locked_minor() -> None:
    locked = dict(line.split("==") for line in LINES)
    for name in TOUCHED:
        major, minor = Version(locked[name]).release[:2]
        assert f"<{major}.{minor + 1}" in str(DECLARED[name]).split(","), name
    assert Version(locked["torch"]) in DECLARED["torch"]


def test_python_is_the_one_that_runs_this() -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert PROJECT["requires-python"] == ">=3.11,<3.12"
    assert own in SpecifierSet(PROJECT["requires-python"])


def test_only_ci_takes_a_warning_for_an_error() -> None:
    assert "filterwarnings" not in PYPROJECT["tool"]["pytest"]["ini_options"]
    assert 'PYTEST_ADDOPTS="-W error"' in (ROOT / ".ci/run").read_text()


def test_ci_installs_and_tests_by_the_commands_of_the_readme() -> None:
    run, readme, contributing = ((ROOT / name).read_text() for name in (".ci/run", "README.md", "CONTRIBUTING.md"))
    test = "pip install -e '.[dev]' -c constraints.txt && pytest"
    install = "pip install -e . -c constraints.txt && compress "
    assert f"\n{test}\n" in run
    assert f"```\n{test}\n```" in readme
    assert f"```\n{test}\n```" in contributing
    assert f"\n{install}check pipelines/quickstart.yaml\n" in run
    assert f"```\n{install}run pipelines/quickstart.yaml\n```" in readme
    for command in re.findall("pip install -e .*", readme + contributing + run):
        assert " -c constraints.txt" in command


def test_oldest_is_the_lower_bounds_and_the_locks_torch(tool: Any) -> None:
    oldest = specifiers(tool.oldest())
    assert oldest.keys() == DECLARED.keys()
    for name, pin in oldest.items():
        lower = [Version(each.version) for each in DECLARED[name] if each.operator == ">="]
        expected = Version(tool.locked()["torch"]) if name == "torch" else lower[0] if lower else None
        assert [(each.operator, Version(each.version)) for each in pin] == ([("==", expected)] if expected else [])


def test_newest_has_no_upper_bound_but_torchs(tool: Any) -> None:
    newest = specifiers(tool.newest())
    assert newest.keys() == DECLARED.keys()
    assert newest["torch"] == DECLARED["torch"]
    for name, specifier in DECLARED.items():
        if name != "torch":
            assert {str(each) for each in newest[name]} == {str(each) for each in specifier if each.operator == ">="}


def test_the_lock_is_what_pip_reports_without_the_machine_in_it(tool: Any, tmp_path: Path) -> None:
    found = {"torch": "2.13.0+cpu", "nvidia-nccl-cu13": "2.29", "triton": "3.7", "types-PyYAML": "6.0", "Jinja2": "3.1",
             "cuda-bindings": "13.0", "compress-pipeline": "0.1.0", "huggingface_hub": "2.4"}  # fmt: skip
    report = tmp_path / "report.json"
    items = [{"metadata": {"name": name, "version": version}} for name, version in found.items()]
    report.write_text(json.dumps({"install": items}))
    comment, *lines = tool.lock(report)
    assert comment.startswith("#")
    assert lines == ["huggingface-hub==2.4", "jinja2==3.1", "torch==2.13.0", "types-pyyaml==6.0"]
