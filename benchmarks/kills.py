"""Kills pipelines of every stage at random moments, and holds what comes out against an undisturbed run.

    python -m compress.benchmarks.kills MODEL --out FOLDER

MODEL is a save_pretrained folder of a small decoder, best a pico one. The pipelines below run once undisturbed; one
moment is drawn from each of as many equal parts of the time that this took, and found again by what stands in
`run.log` before it. Each kill is SIGKILL to the whole process group. Prints a report in Markdown; exit status 1 where
a digest differs, or where a layer, round or block was finished twice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST
from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.export_cost import CLI
from compress.registry import stage_names
from compress.report.tables import Table, as_markdown
from compress.runner.logs import LOG

_SHORT: dict[str, Any] = {"sequence_length": 64, "batch_size": 2, "eval_tokens": 512}
_RACE: dict[str, Any] = {"prompts": [16, 64], "new_tokens": 8, "repeats": 6}
_JUDGED: dict[str, Any] = {"tokens": 1024, "sequence_length": 128}
PIPELINES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "converted": [
        {"prune-layers": {"drop": 2, "by": "leave-one-out", "tokens": 4096, "sequence_length": 64}},
        {"convert-attention": {
            "to": "gated-linear", "keep": 2, "window": 16, "select_tokens": 4096,
            "align": {"tokens": 2048, "sequence_length": 64}, "distill": {**_SHORT, "tokens": 2048},
        }},
        {"distill": {**_SHORT, "tokens": 4096, "data": "generated"}},
        {"evaluate": {**_JUDGED, "id": "distilled", "recall": {"contexts": [128, 192], "mqar_pairs": 4, "samples": 6}}},
        {"quantize": {"scheme": "w4-block32", "scaling": "awq"}},
        {"export-onnx": {}},
        {"evaluate": {**_JUDGED, "recall": {"contexts": [128], "mqar_pairs": 4, "samples": 4}}},
        {"latency": {**_RACE, "baselines": ["source"]}},
    ],
    "trained": [
        {"reduce-vocab": {"keep": 480, "tokens": 4096}},
        {"prune-groups": {"keep": {"intermediate": 0.75}, "tokens": 4096, "sequence_length": 64}},
        {"qat": {**_SHORT, "scheme": "w4-block64", "warm_start": ["w8-block64"], "tokens": 2048}},
        {"export-onnx": {}},
        {"evaluate": _JUDGED},
    ],
    "chosen": [
        {"choose-format": {
            **_RACE, **_JUDGED, "schemes": ["w8-block32", "w4-block32"], "quantize": {"tokens": 2048},
            "budget": {"top1_agreement": 0.7},
        }},
        {"evaluate": _JUDGED},
    ],
}  # fmt: skip
"""Every stage, in three files: what `quantize`, `qat` and `choose-format` hand on is not what another of them takes.
Only one of the formats is within the budget: which of several is fastest is no matter of digests."""

_TIMED = re.compile(r"(latency|formats)\.(json|md|png)|(.*/)?tensorboard/.*")
"""Files of an artifact that hold times."""
_FREE = frozenset({"warnings", "environment", "method"})
"""Keys of JSON about times whose values' shapes depend on the machine and on kills."""
_LINE = re.compile(r"(?P<date>\S+ \S+) INFO (?P<logger>\S+): (?P<message>.*)")
_HEADING = re.compile(r"\[\d+/\d+\] (?P<id>[^:\s]+)(?P<ended>: (done|cached))?")
_POLL_S = 0.02


@dataclass(frozen=True)
class Mark:
    """A line of `run.log`: when, of which stage, and what; `[3/8] quantize`, `done: quantize layer 3`."""

    seconds: float
    stage: str
    text: str

    @property
    def is_unit(self) -> bool:
        """Whether it tells of a finished unit."""
        return self.text.startswith("done: ")


@dataclass(frozen=True)
class Kill:
    """One that happened: which pipeline, in which stage, so many seconds behind which of its lines."""

    pipeline: str
    after: Mark
    seconds: float


def marks(log: Path) -> list[Mark]:
    """What `run.log` tells of stages and units, in order."""
    found: list[Mark] = []
    stage = ""
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        if (entry := _LINE.fullmatch(line)) is None:
            continue
        heading = _HEADING.match(entry["message"])
        if heading is None and not entry["message"].startswith("done: "):
            continue
        stage = heading["id"] if heading else stage
        text = heading[0] if heading else entry["message"]
        found.append(Mark(datetime.datetime.strptime(entry["date"], "%Y-%m-%d %H:%M:%S,%f").timestamp(), stage, text))
    return found


def units(log: Path) -> Counter[tuple[str, str]]:
    """How often `run.log` says of each unit of each stage that it is done."""
    return Counter((mark.stage, mark.text) for mark in marks(log) if mark.is_unit)


def contents(run_dir: Path) -> dict[str, Any]:
    """By file of each artifact its SHA-256; of JSON about times its structure, and of others about times nothing."""
    found: dict[str, Any] = {}
    for manifest in sorted(run_dir.glob(f"*/{MANIFEST}")):
        folder = manifest.parent
        for name, entry in json.loads(manifest.read_text("utf-8"))["files"].items():
            if not _TIMED.fullmatch(name):
                found[f"{folder.name}/{name}"] = entry["sha256"]
            elif name.endswith(".json"):
                found[f"{folder.name}/{name}"] = structure(json.loads((folder / name).read_text("utf-8")))
            else:
                found[f"{folder.name}/{name.partition('events.')[0]}"] = None
    return found


def structure(value: Any) -> Any:
    """`value` with every text and number replaced by its kind."""
    if isinstance(value, dict):
        return {key: structure(each) for key, each in value.items() if key not in _FREE}
    if isinstance(value, list):
        return [structure(each) for each in value]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


class Runs:
    """Runs of the pipelines in one folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name, stages in PIPELINES.items():
            pipeline = {"name": name, "model": str(model.resolve()), "target": {"threads": 1}, "stages": stages}
            (folder / f"{name}.json").write_text(json.dumps(pipeline), "utf-8")  # JSON is YAML

    def log(self, name: str) -> Path:
        """Of the pipeline `name`."""
        return self.folder / "runs" / name / LOG

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """In a process group of its own, with one thread: sums of several come in no order."""
        with (self.folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                (*CLI, "run", f"{name}.json", "--no-twin"), cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str) -> None:
        """Raises SystemExit where it fails."""
        if self.start(name).wait():
            sys.exit(f"{name} failed: see {self.folder / name}.out")

    def kill(self, name: str, moment: Moment) -> Kill | None:
        """Run until `moment`, or until the line behind it if that comes first; None where the run ends before."""
        before = len(marks(self.log(name)))
        process, since = self.start(name), None
        while process.poll() is None:
            told = marks(self.log(name))
            new = told[before:]
            is_there = any(mark.stage == moment.after.stage for mark in new) and moment.after.text in _texts(told)
            since = since or (time.monotonic() if is_there else None)
            if since and (time.monotonic() - since > moment.seconds or moment.next.text in _texts(new)):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                last = marks(self.log(name))[-1]
                return Kill(name, last, time.time() - last.seconds)
            time.sleep(_POLL_S)
        return None


@dataclass(frozen=True)
class Moment:
    """So many seconds behind one line of a log, and before the next."""

    pipeline: str
    after: Mark
    next: Mark
    seconds: float


def moments(runs: Runs, number: int, seed: int) -> list[Moment]:
    """One from each of `number` equal parts of the seconds that the undisturbed `runs` took, at random."""
    spans = [(name, *pair) for name in PIPELINES for pair in pairwise(marks(runs.log(name)))]
    lengths = [following.seconds - one.seconds for _, one, following in spans]
    generator, found = random.Random(seed), []
    for part in range(number):
        left = (part + generator.random()) * sum(lengths) / number
        for (name, one, following), length in zip(spans, lengths, strict=True):
            if left < length:
                found.append(Moment(name, one, following, left))
                break
            left -= length
    return found


def differences(undisturbed: Runs, killed: Runs) -> Iterator[str]:
    """What is not as it should be of the killed runs, a line each."""
    for name in PIPELINES:
        expected, found = (contents(runs.log(name).parent) for runs in (undisturbed, killed))
        for file in sorted({*expected, *found}):
            if file not in found or file not in expected or expected[file] != found[file]:
                yield f"{name}/{file} is not that of the undisturbed run"
        once, again = units(undisturbed.log(name)), units(killed.log(name))
        yield from (f"{name}: {stage}: {text!r} {count} times" for (stage, text), count in again.items() if count > 1)
        yield from (f"{name}: {stage}: {text!r} is no unit of the undisturbed run" for stage, text in again - once)


def report(model: Path, undisturbed: Runs, killed: Runs, kills: Sequence[Kill], wrong: Sequence[str]) -> str:
    """All of it, in Markdown."""
    here = environment(1, pick_cpus(1))
    counted, told = (sum((units(runs.log(name)) for name in PIPELINES), Counter()) for runs in (undisturbed, killed))
    files = [content for name in PIPELINES for content in contents(killed.log(name).parent).values()]
    rows = [
        (str(number), kill.pipeline, kill.after.stage, kill.after.text.removeprefix("done: "), f"{kill.seconds:.2f}")
        for number, kill in enumerate(kills, 1)
    ]
    same = sum(isinstance(content, str) for content in files)
    verdict = "\n".join(f"- **{each}**" for each in wrong) or (
        f"{same} files have the digests of the undisturbed run, and {len(files) - same} that hold times have its "
        f"structure. Of its {sum(counted.values())} layers, rounds and blocks {sum(told.values())} were told of under "
        "the kills, none twice (a kill between storing a unit and telling of it costs the line, not the unit)."
    )
    return "\n\n".join([
        f"# {len(kills)} kills at random moments over a pipeline of every stage: {model.name}",
        f"`python -m compress.benchmarks.kills {model.name} --out FOLDER`, {datetime.date.today()}. SIGKILL to the "
        "process group; after each, the same command again.",
        verdict, "Stages: " + ", ".join(stage_names()) + ".",
        as_markdown(Table("", ("kill", "pipeline", "stage", "last line of run.log", "seconds after it"), tuple(rows))),
        f"{here['cpu']}, 1 thread, commit {here['commit']}. "
        + ", ".join(f"{name} {version}" for name, version in here["versions"].items()) + ".",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all runs")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    undisturbed, killed = (Runs(options.model, options.out / name) for name in ("undisturbed", "killed"))
    for name in PIPELINES:
        undisturbed.finish(name)
    drawn, kills = moments(undisturbed, options.kills, options.seed), []
    for name in PIPELINES:
        for moment in (each for each in drawn if each.pipeline == name):
            if (kill := killed.kill(name, moment)) is not None:
                kills.append(kill)
                print(f"{len(kills)}: {name}, {kill.after.stage}, {kill.after.text}", file=sys.stderr)
        killed.finish(name)
    wrong = list(differences(undisturbed, killed))
    if len(kills) < options.kills:
        wrong.append(f"{options.kills - len(kills)} of the kills came after the end of a run")
    print(report(options.model, undisturbed, killed, kills, wrong))
    sys.exit(bool(wrong))


def _texts(told: Sequence[Mark]) -> set[str]:
    return {mark.text for mark in told}


if __name__ == "__main__":
    main()
