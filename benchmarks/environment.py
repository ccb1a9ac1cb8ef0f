"""What the machine is and does while something is measured on it: recorded with every figure of speed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.hardware import git_commit, this_machine, versions

_CPUS = Path("/sys/devices/system/cpu")
_BUSY_PERCENT = 10.0


def pick_cpus(threads: int, available: Sequence[int] | None = None, cpus: Path = _CPUS) -> list[int]:
    """The CPUs to pin `threads` threads to: one of each physical core first, among those this process may use."""
    if available is None:
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for cpu in available:
        siblings = _read(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        (second if siblings in seen else first).append(cpu)
        seen.add(siblings)
    return [*first, *second][:threads]


def environment(threads: int, cpus: Sequence[int]) -> dict[str, Any]:
    """The machine, what else it is doing right now (half a second is watched), versions and the commit."""
    import psutil

    machine = this_machine()
    return {
        "cpu": machine.cpu, "cpu_flags": list(machine.flags), "num_cpus": machine.num_cpus,
        "ram_gb": machine.ram_gb, "system": machine.system, "threads": threads, "cpus": list(cpus),
        "governor": _read(_CPUS / "cpu0" / "cpufreq" / "scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "busy_percent": psutil.cpu_percent(interval=0.5),
        "versions": versions(), "commit": git_commit(),
    }  # fmt: skip


def warnings_of(environment: Mapping[str, Any]) -> list[str]:
    """Why the figures measured in this environment may be off."""
    found = []
    if environment["busy_percent"] > _BUSY_PERCENT:
        found.append(
            f"the machine was {environment['busy_percent']:.0f} % busy before measuring: absolute times are too long; "
            "ratios within one run suffer less"
        )
    if len(environment["cpus"]) < environment["threads"]:
        found.append(f"{environment['threads']} threads share {len(environment['cpus'])} CPUs")
    if environment["governor"] not in (None, "performance"):
        found.append(f"the CPU frequency governor is {environment['governor']!r}, so the clock may vary")
    return found


def _read(file: Path) -> str | None:
    try:
        return file.read_text("ascii").strip()
    except OSError:
        return None
