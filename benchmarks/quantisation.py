"""What each way to quantise costs in quality: arms of one pipeline each, judged on the same text, in one table.

    python -m compress.benchmarks.quantisation MODEL_FOLDER --out DIR --train python-docs \\
        --judge novel=texts/novel.txt addresses=texts/201*.txt,texts/202*.txt --arms 'w4-block32-*'

Each arm is a pipeline that `compress run` runs in a process of its own, whose time and peak memory are kept; `--list`
names them. What it writes is judged against the float32 source as it is, one window at a time, activations rounded as
the operators round them; with `--onnx` (always for arms about the export), the exported folder is judged too. A
finished arm is one file in DIR and is not measured again; DIR/quantisation.md is the report of all that are there and
were judged alike, the newest of each.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.artifact import write_json
from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.evaluation import evaluate
from compress.benchmarks.export_cost import CLI, Cost, cost_of
from compress.benchmarks.judging import asked_of
from compress.benchmarks.quantisation_arms import ARMS, Arm, select
from compress.benchmarks.quantisation_report import report
from compress.benchmarks.remembered import Remembered
from compress.benchmarks.scorers import open_scorer, task_of
from compress.data.config import PYTHON_DOCS, DataConfig
from compress.data.text import TextData
from compress.models.load import load_tokenizer
from compress.runner.record import StageRecord, load_record
from compress.stage import Reporter

FORMS = ("quantized", "onnx")
"""Formats of the artifacts that are judged."""


@dataclass(frozen=True)
class Settings:
    """What the figures of an arm depend on beside the arm: text specs by split and name, and the options of stages."""

    model: str
    train: Sequence[str]
    judged: Mapping[str, Sequence[str]]
    tune: Sequence[str] = ()
    windows: int = 16
    length: int = 512
    calibration: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    max_overlap: float = 0.02
    onnx: bool = False

    def pipeline(self, arm: Arm, seed: int, threads: int) -> dict[str, Any]:
        """The pipeline file of one arm."""
        data = {"train": list(self.train), "max_overlap": self.max_overlap}
        return {
            "name": f"{arm.name}-{seed}", "model": self.model, "seed": seed, "target": {"threads": threads},
            "data": {**data, "eval": list(self.tune)} if self.tune else data,
            "stages": arm.stages(self.calibration, self.training, export=self.onnx),
        }  # fmt: skip

    @property
    def judging(self) -> dict[str, Any]:
        """What figures that stand in one table must share."""
        return {"model": self.model, "judged": self.judged, "windows": self.windows, "length": self.length}

    def file(self, arm: Arm, seed: int, out: Path) -> Path:
        """Where the arm's figures are kept."""
        everything = {**self.pipeline(arm, seed, 0), "judging": self.judging}
        digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
        return out / f"{arm.name}-{seed}-{digest[:8]}.json"


def run(pipeline: Mapping[str, Any], out: Path) -> tuple[Cost, dict[str, Path], list[StageRecord]]:
    """Run a pipeline in a process of its own: what it cost, the folders it made by format, and the record of each.

    Raises CalledProcessError where it fails; its stderr is passed on.
    """
    file, runs = out / f"{pipeline['name']}.yaml", out / "runs"
    file.write_text(json.dumps(pipeline, indent=1), "utf-8")  # JSON is YAML
    cost = cost_of((*CLI, "run", str(file), "--runs", str(runs), "--no-twin"), Path.cwd())
    stages = [stage for stage in load_record(runs / pipeline["name"]).stages if stage.returns in FORMS]
    return cost, {stage.returns: runs / pipeline["name"] / stage.directory for stage in stages}, stages


class Bench:
    """The source's answers and the windows, one text after another; what is judged is loaded once for all of them."""

    def __init__(self, settings: Settings, out: Path, threads: int) -> None:
        self._settings, self._out, self._threads = settings, out, threads
        source = Path(settings.model)
        self._task, tokenizer = task_of(source), load_tokenizer(source)
        self._reference = Remembered(out / "source", lambda: open_scorer(source, self._task, threads=threads))
        self._asked = {}
        for name, specs in settings.judged.items():
            texts = DataConfig(train=tuple(settings.train), eval=tuple(specs), max_overlap=settings.max_overlap)
            tokens = settings.windows * settings.length
            self._asked[name] = asked_of(TextData(texts), tokenizer, self._task, settings.length, tokens)

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Run the arm and judge what it writes. Raises CalledProcessError where it fails."""
        pipeline = self._settings.pipeline(arm, seed, self._threads)
        cost, folders, stages = run(pipeline, self._out)
        return {
            "arm": arm.name, "plain": arm.plain, "seed": seed, "pipeline": pipeline, "process": vars(cost),
            "judging": self._settings.judging,
            "stages": [stage.model_dump(mode="json") for stage in stages],
            "judged": {form: self._judge(folder) for form, folder in folders.items()},
            "environment": environment(self._threads, pick_cpus(self._threads)),
        }  # fmt: skip

    def _judge(self, folder: Path) -> dict[str, Any]:
        """Figures by text, with the sums over each window that they come from."""
        score = open_scorer(folder, self._task, threads=self._threads)
        found = {}
        for name, asked in self._asked.items():
            with Reporter().progress(name, len(asked)) as silent:
                evaluation = evaluate(score, self._reference, asked, self._task, silent)
            found[name] = {"result": evaluation.result(), "windows": evaluation.to_json()}
        return found


def measured(settings: Settings, arms: Sequence[Arm], seeds: Sequence[int], out: Path, threads: int) -> Iterator[Path]:
    """The files of the arms, one after another as they are finished; those that fail are said on stderr."""
    bench = None
    for seed, arm in ((seed, arm) for seed in seeds for arm in arms if arm.stage == "qat" or seed == seeds[0]):
        file = settings.file(arm, seed, out)
        if not file.exists():
            bench = bench or Bench(settings, out, threads)
            try:
                write_json(file, bench.measure(arm, seed))
            except subprocess.CalledProcessError:
                print(f"{arm.name}, seed {seed}: failed", file=sys.stderr, flush=True)
                continue
            gc.collect()
        yield file


def kept(settings: Settings, out: Path) -> list[dict[str, Any]]:
    """The newest figures of every arm and seed that were judged as these settings say, in the order of the arms."""
    files = sorted(out.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    rows = [json.loads(file.read_text("utf-8")) for file in files]
    newest = {(row["arm"], row["seed"]): row for row in rows if row["judging"] == settings.judging}
    seeds = sorted({seed for _, seed in newest})
    return [newest[arm.name, seed] for arm in ARMS for seed in seeds if (arm.name, seed) in newest]


def named_texts(given: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=SPEC,SPEC` by name; without one, the first spec is the name."""
    texts = {}
    for text in given:
        name, _, specs = text.rpartition("=")
        texts[name or specs.split(",")[0]] = specs.split(",")
    return texts


def common_parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of arms asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder, in float32")
    parser.add_argument("--out", type=Path, required=True, help="where figures, runs and the report are kept")
    parser.add_argument("--train", nargs="+", default=[PYTHON_DOCS], help="specs of text to calibrate and train on")
    parser.add_argument("--tune", nargs="*", default=[], help="specs that choose trained weights; default: held out")
    parser.add_argument("--max-overlap", type=float, default=0.02, help="as in a pipeline's data")
    parser.add_argument("--calibrate", type=json.loads, default={}, help="options of all arms, as JSON")
    parser.add_argument("--training", type=json.loads, default={}, help="options of arms that train, as JSON")
    parser.add_argument("--arms", nargs="+", default=["*"], help="names, or patterns of them (all)")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the report after every arm; 1 where an arm failed."""
    parser = common_parser(__doc__)
    parser.add_argument("--judge", nargs="+", required=True, help="other texts: NAME=SPEC,SPEC…")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text to judge on (16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of arms that train (0)")
    parser.add_argument("--onnx", action="store_true", help="export every arm, and judge that too")
    parser.add_argument("--list", action="store_true", help="only name the arms that are meant")
    given = parser.parse_args(arguments)
    arms = select(given.arms)
    if given.list:
        print(*(arm.name for arm in arms), sep="\n")
        return 0
    settings = Settings(
        str(given.model.resolve()), given.train, named_texts(given.judge), given.tune, given.windows, given.length,
        given.calibrate, given.training, given.max_overlap, given.onnx,
    )  # fmt: skip
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    num_missing = len(arms) + (len(given.seeds) - 1) * sum(arm.stage == "qat" for arm in arms)
    for file in measured(settings, arms, given.seeds, given.out, given.threads):
        num_missing -= 1
        print(file.name, flush=True)
        (given.out / "quantisation.md").write_text(report(kept(settings, given.out)), "utf-8")
    return int(num_missing > 0)


if __name__ == "__main__":
    sys.exit(main())
