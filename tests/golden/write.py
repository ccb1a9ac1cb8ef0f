"""Writes the records that are missing: `python tests/golden/write.py [STAGE …]`.

A record is never overwritten. Where a stage makes something else now than its record says, its `version` is raised, the
CHANGELOG says so, and this writes the record of the new version.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `import golden` and `import pico`

from compress.cli.main import quiet_libraries
from compress.registry import stage_class, stage_names
from golden.models import Workshop
from golden.recording import record_of

FOLDER = Path(__file__).parent
_WIDTH = 118


def record_file(stage: str, folder: Path = FOLDER) -> Path:
    """Where the record of a stage at its version is."""
    return folder / f"{stage}@{stage_class(stage).version}.json"


def own_stages() -> list[str]:
    """The registered stages that are not of a plug-in."""
    return [name for name in stage_names() if stage_class(name).__module__.startswith("compress.")]


def write(stages: Sequence[str], workshop: Workshop, folder: Path = FOLDER) -> Iterator[str]:
    """Write the records of `stages`, and say of each what was done."""
    for stage in stages:
        file = record_file(stage, folder)
        if file.exists():
            yield f"{file.name} stays: where {stage} makes something else now, raise its version (CONTRIBUTING.md)"
            continue
        file.write_text("\n".join(lines(record_of(stage, workshop))) + "\n", "utf-8")
        yield f"{file.name} written"
        yield from (f"{old.name} is superseded: git rm it" for old in folder.glob(f"{stage}@*.json") if old != file)


def lines(value: Any, indent: str = "", prefix: str = "", suffix: str = "") -> Iterator[str]:
    """JSON in which what fits a line is one, for a diff that can be read."""
    text = f"{indent}{prefix}{json.dumps(value)}{suffix}"
    if len(text) <= _WIDTH or not isinstance(value, (dict, list)) or not value:
        yield text
        return
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    entries = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    yield f"{indent}{prefix}{opened}"
    for number, (name, each) in enumerate(entries, start=1):
        comma = "," if number < len(value) else ""
        yield from lines(each, f"{indent} ", "" if name is None else f"{json.dumps(name)}: ", comma)
    yield f"{indent}{closed}{suffix}"


if __name__ == "__main__":
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        for said in write(sys.argv[1:] or own_stages(), Workshop(Path(scratch))):
            print(said)
