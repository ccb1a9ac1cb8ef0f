"""What to install for a run of the tests on other versions than constraints.txt names; and how that file is written.

    python .ci/requirements.py oldest            each dependency at its lower bound, torch at the lock's version
    python .ci/requirements.py newest            each dependency without its upper bound, but for torch
    python .ci/requirements.py lock REPORT.json  the plain versions that pip's report names
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?P<bounds>[^;\[]*)")
PLATFORM = ("nvidia-", "cuda-", "triton")
"""What torch's build for a kind of machine brings along: another machine takes another build, or none."""


def declared() -> Iterator[tuple[str, list[str]]]:
    """Each dependency in pyproject.toml, the dev extra's too: its name and its bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r} is not a name with bounds; extend REQUIREMENT")
        yield match["name"], [bound.strip() for bound in match["bounds"].split(",") if bound.strip()]


def oldest() -> Iterator[str]:
    """Pins at the lower bounds; a name alone where there is none."""
    for name, bounds in declared():
        lower = [bound.removeprefix(">=") for bound in bounds if bound.startswith(">=")]
        yield f"torch=={locked()['torch']}" if name == "torch" else f"{name}=={lower[0]}" if lower else name


def newest() -> Iterator[str]:
    """Lower bounds alone; torch's whole range."""
    for name, bounds in declared():
        yield name + ",".join(bound for bound in bounds if name == "torch" or not bound.startswith("<"))


def locked() -> dict[str, str]:
    """The versions in constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def lock(report: Path) -> Iterator[str]:
    """A line for each distribution that pip would install: no local build, nothing that only some machines have."""
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    versions = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in found}
    yield "# Made by .ci/lock from pyproject.toml: the versions that CI installs, and the README's commands."
    for name, version in sorted(versions.items()):
        if name != "compress-pipeline" and not name.startswith(PLATFORM):
            yield f"{name}=={version.partition('+')[0]}"


if __name__ == "__main__":
    which, *rest = sys.argv[1:]
    lines = lock(Path(*rest)) if which == "lock" else {"oldest": oldest, "newest": newest}[which]()
    print(*lines, sep="\n")
