"""The wheel of this checkout, built once a session."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    "compress": "compress",
    "compress/stages": "stages",
    "compress/exports": "exports",
    "compress/benchmarks": "benchmarks",
}
"""Where packages are in the wheel, and in the checkout."""


def build_wheel(copy: Path, out: Path) -> Path:
    """Build the wheel from a copy of the source, which has no stale build/lib."""
    for room in ROOMS.values():
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return wheel
