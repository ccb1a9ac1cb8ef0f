"""The machine that a run measures on, and the versions of what it runs: both are part of what a figure means."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from compress import __version__
from compress.errors import InvalidInput

VECTOR_FLAGS = ("avx", "amx", "fma", "asimd", "neon", "sve", "i8mm")
"""What the flags of vector and matrix instructions begin with: an operator's kernel is chosen by them."""
THREADS_PER_CPU = 8
SAMPLE_SECONDS = 0.1
_RESET = Path("/proc/self/clear_refs")
_PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "numpy")


@dataclass(frozen=True)
class Machine:
    """CPU model, its instruction-set flags, the CPUs this process may use, RAM in GB (1e9 bytes), operating system."""

    cpu: str
    flags: tuple[str, ...]
    num_cpus: int
    ram_gb: float
    system: str

    def fingerprint(self) -> dict[str, Any]:
        """What a measured time depends on: the ingredient of the keys of stages that measure hardware."""
        return {"cpu": self.cpu, "flags": list(self.flags), "num_cpus": self.num_cpus}

    @property
    def vector_flags(self) -> tuple[str, ...]:
        """The flags that rounded arithmetic depends on."""
        return tuple(flag for flag in self.flags if flag.startswith(VECTOR_FLAGS))

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return {**asdict(self), "flags": list(self.flags)}


@cache
def this_machine() -> Machine:
    """The machine this process runs on."""
    import psutil

    info = _cpuinfo()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(sorted((info.get("flags") or info.get("Features") or "").split())),
        num_cpus=cpus,
        ram_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=f"{platform.system()} {platform.machine()}",
    )


def check_threads(threads: int, where: str) -> None:
    """Raise InvalidInput for more than THREADS_PER_CPU threads for each CPU that this process may use.

    With a few more than one they share, which measurements warn of. Threads of ONNX Runtime spin: with 32 a CPU a model
    of a megabyte takes seconds to load, with 500 minutes, and thousands never come up.
    """
    cpus = this_machine().num_cpus
    if threads > THREADS_PER_CPU * cpus:
        what = f"{threads} threads, but this process may use {cpus} CPU{'s' if cpus > 1 else ''}"
        raise InvalidInput(where, what, f"write {cpus}, one for each")


def has_bf16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware: several times as fast as float32 ones."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(this_machine().flags)


def multiplies_bf16() -> bool:
    """Whether the GPU, or the CPU where there is none, multiplies in bfloat16. Imports torch only to ask for a GPU."""
    if not _may_have_gpu():
        return has_bf16()
    import torch

    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_bf16()


def minor_version(package: str) -> str:
    """`5.23` of an installed 5.23.1; all of a pre-release's, each of which may differ; "" where it is not installed.

    `python` is the interpreter.
    """
    try:
        installed = platform.python_version() if package == "python" else version(package)
    except PackageNotFoundError:
        return ""
    release = re.fullmatch(r"(\d+\.\d+)(\.\d+)*(\.?post\d+)?(\+.*)?", installed)
    return release[1] if release else installed


def versions() -> dict[str, str]:
    """Versions of Python, this package and what does the computing, read without importing any of them."""
    found = {"python": platform.python_version(), "compress": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` where files differ from it; None elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    git = ("git", "-C", str(checkout))
    try:
        head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True, timeout=5)
        changes = subprocess.run((*git, "status", "--porcelain", "-uno"), capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


class PeakMemory:
    """Peak resident memory of this process since the object was made, in MB (1e6 bytes).

    Linux lets the high-water mark be reset. Where it can't be, it is that of the whole process so far, or within a
    `with` block the most that was seen there every SAMPLE_SECONDS.
    """

    def __init__(self) -> None:
        self._sampled_mb = 0.0
        self._over = threading.Event()
        try:
            _RESET.write_text("5")
            self._is_reset = True
        except OSError:
            self._is_reset = False

    def __enter__(self) -> Self:
        if not self._is_reset:
            threading.Thread(target=self._sample, name="peak-memory", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def peak_mb(self) -> float:
        """The peak until now."""
        if self._sampled_mb:
            self._look()
            return self._sampled_mb
        import resource

        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        except OSError:
            pass
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    def _sample(self) -> None:
        self._look()
        while not self._over.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        import psutil

        self._sampled_mb = max(self._sampled_mb, psutil.Process().memory_info().rss / 1e6)


def _may_have_gpu() -> bool:
    """Whether a driver of NVIDIA's or AMD's is there."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return os.path.exists("/dev/kfd")


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
