"""What the tool itself costs: `check`, exporting, and a fully cached `run`, each in a fresh process.

    python -m compress.benchmarks.export_cost MODEL --formats fp32 int4

MODEL is any model source of a pipeline file. Each export is a pipeline of one stage, run as a user runs it; time and
peak memory are those of the whole process. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.benchmarks.environment import environment, pick_cpus
from compress.report.tables import Table, as_markdown

CLI = (sys.executable, "-c", "from compress.cli.main import main; main()")

_WATCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""  # a process of its own, because Linux counts the memory of whoever forks as the child's


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and peak resident memory (MB) of one process."""

    seconds: float
    peak_rss_mb: float


def cost_of(command: Sequence[str], cwd: Path) -> Cost:
    """Run `command` to its end. Raises CalledProcessError where it fails; its stderr is passed on."""
    watcher = (sys.executable, "-I", "-c", _WATCHER, *command)
    done = subprocess.run(watcher, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    seconds, max_rss = done.stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(float(seconds), int(max_rss) * unit / 1e6)


def measure(model: str, export_format: str, threads: int, scratch: Path) -> Iterator[tuple[str, Cost]]:
    """`check`, the export, and the same `run` again, of a pipeline that only exports."""
    file = scratch / f"{export_format}.yaml"
    pipeline = {
        "name": f"cost-{export_format}", "model": model, "target": {"threads": threads},
        "stages": [{"export-onnx": {"format": export_format}}],
    }  # fmt: skip
    file.write_text(json.dumps(pipeline), "utf-8")  # JSON is YAML
    checks = [cost_of((*CLI, "check", str(file)), scratch) for _ in range(5)]
    yield f"check ({export_format})", sorted(checks, key=lambda cost: cost.seconds)[2]
    run = (*CLI, "run", str(file), "--runs", str(scratch / "runs"), "--no-twin")
    yield f"run: export {export_format}", cost_of(run, scratch)
    yield f"run again, all cached ({export_format})", cost_of(run, scratch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model source; fetch it once before, or the first run fetches it")
    parser.add_argument("--formats", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    machine = environment(options.threads, pick_cpus(options.threads))
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            (what, f"{cost.seconds:.2f}", f"{cost.peak_rss_mb:.0f}")
            for name in options.formats
            for what, cost in measure(model, name, options.threads, Path(scratch))
        ]
    print(as_markdown(Table("", ("process", "seconds", "peak memory, MB"), tuple(rows))))
    busy = f"{machine['busy_percent']:.0f} % busy before"
    print(f"\n{options.model}, {machine['cpu']}, {busy}, commit {machine['commit']}.")


if __name__ == "__main__":
    main()
