"""What brings a pruned model back: distillation against plain cross-entropy, uniform pruning, and no training at all.

    python -m compress.benchmarks.recovery MODEL_FOLDER --train python-docs --judge python-docs "novel/*.txt" --out DIR

All methods see the same tokens and differ in nothing else. The models are judged against the full one on the held-out
part of each `--judge` text. Each finished training is kept in DIR as a row of figures per block of text, so that a run
that was interrupted goes on; DIR/recovery.md is the report. Differences are paired by block, over the mean of seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.artifact import write_json
from compress.benchmarks.judging import compare
from compress.data.config import PYTHON_DOCS, DataConfig
from compress.data.text import TextData
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.prune import scores
from compress.stages.prune.surgery import drop_layers
from compress.train.engine import Ids, recover
from compress.train.options import TrainingOptions
from compress.train.teacher import layer_map

SCORE_TOKENS = 1024
FIGURES = ("kl", "top1_agreement", "ce")
METHODS: Mapping[str, tuple[bool, Mapping[str, float]]] = {
    "truncated": (False, {}),
    "cross-entropy": (False, {"kl": 0.0, "ce": 1.0}),
    "uniform, kl": (True, {"kl": 1.0}),
    "kl": (False, {"kl": 1.0}),
}
"""By name: whether layers are dropped evenly and not by score, and the losses; the last one is compared with."""


@dataclass(frozen=True)
class Row:
    """One model to make and judge."""

    method: str
    num_dropped: int
    seed: int

    def file(self, out: Path, settings: object) -> Path:
        """Where its figures are kept, given everything else that they depend on."""
        digest = hashlib.sha256(json.dumps([vars(self), settings], sort_keys=True, default=str).encode()).hexdigest()
        return out / f"{self.method.replace(', ', '-')}-{self.num_dropped}-{self.seed}-{digest[:8]}.json"


@dataclass(frozen=True)
class Bench:
    """The full model, what is trained on, and what is judged on by name."""

    folder: Path
    teacher: PreTrainedModel
    train_NT: Ids
    judged: Mapping[str, Ids]
    dropped: Mapping[int, Sequence[int]]
    options: TrainingOptions

    def measure(self, row: Row, work: Path) -> dict[str, Any]:
        """Make the row's model and judge it: figures per text and block, seconds of training, layers dropped."""
        evenly, loss = METHODS[row.method]
        student = load_model(self.folder)
        total = len(Parts(student).layers)
        dropped = scores.uniform(total, row.num_dropped) if evenly else self.dropped[row.num_dropped]
        drop_layers(student, dropped)
        started = time.monotonic()
        if loss:
            layers = layer_map(total - row.num_dropped, total, dropped)
            options = TrainingOptions(**{**self.options.model_dump(), "loss": loss})
            own_eval = next(iter(self.judged.values()))[:2]  # the last step or, if it made things worse, none
            recover(student, self.teacher, self.train_NT, own_eval, options, layers, work, row.seed, Reporter())
        seconds = time.monotonic() - started
        student.train(False)
        figures = {name: judge(student, self.teacher, ids_NT) for name, ids_NT in self.judged.items()}
        return {**vars(row), "dropped": list(dropped), "seconds": seconds, "figures": figures}


def layers_to_drop(
    teacher: PreTrainedModel, train_NT: Ids, by: scores.Score, nums: Sequence[int], file: Path
) -> dict[int, Sequence[int]]:
    """The layers that score `by` says to drop, by their number, read on SCORE_TOKENS tokens; kept in `file`."""
    if not file.exists():
        parts = Parts(teacher)
        batches = scores.batches_of(torch.from_numpy(train_NT[: max(1, SCORE_TOKENS // train_NT.shape[1])]))
        with Reporter().progress("score", 0) as silent:
            if by == "leave-one-out":  # greedy: fewer layers are the first of more
                order = [scores.lowest(round_) for round_ in scores.leave_one_out(parts, batches, max(nums), silent)]
                chosen = {num: sorted(order[:num]) for num in nums}
            else:
                chosen = {num: list(scores.choose(by, parts, batches, num, silent).dropped) for num in nums}
        write_json(file, chosen)
    return {int(num): layers for num, layers in json.loads(file.read_text("utf-8")).items()}


def judge(student: PreTrainedModel, teacher: PreTrainedModel, ids_NT: Ids) -> dict[str, list[float]]:
    """FIGURES of each block: the mean over its tokens."""
    found = compare(student, teacher, ids_NT)
    sums = {**found.sums, "ce": found.sums["nll"]}
    return {name: (sums[name] / found.num_predictions_N).tolist() for name in FIGURES}


def rows(nums_dropped: Sequence[int], num_seeds: int) -> Iterator[Row]:
    """All models, those of one seed first, so that an interrupted run has whole comparisons."""
    for seed in range(num_seeds):
        for num in nums_dropped:
            for method, (_, loss) in METHODS.items():
                if loss or seed == 0:
                    yield Row(method, num, seed)


def report(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table for each number of layers and text."""
    lines = ["# Recovery after depth pruning", "", f"Settings: `{json.dumps(settings, default=str)}`", ""]
    for num in sorted({result["num_dropped"] for result in results}):
        chosen = [result for result in results if result["num_dropped"] == num]
        for text in chosen[0]["figures"]:
            lines += [f"## {num} layers dropped, judged on {text}", "", *_table(chosen, text), ""]
    return "\n".join(lines)


def _table(results: Sequence[Mapping[str, Any]], text: str) -> Iterator[str]:
    reference = list(METHODS)[-1]
    header = ["method", "layers dropped", "seeds", "perplexity", "KL ± SE", "top-1 agreement ± SE"]
    yield f"| {' | '.join(header)} | KL − {reference} | agreement − {reference} | s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    by_method = {method: [r for r in results if r["method"] == method] for method in METHODS}
    for method, found in by_method.items():
        if not found:
            continue
        kl_N, agreement_N, ce_N = (per_block(found, text, name) for name in FIGURES)
        cells = [
            method, " ".join(map(str, found[0]["dropped"])), str(len(found)), f"{np.exp(ce_N.mean()):.2f}",
            plus_minus(kl_N), plus_minus(agreement_N),
        ]  # fmt: skip
        for name, values_N in (("kl", kl_N), ("top1_agreement", agreement_N)):
            base = by_method[reference] if method != reference else []
            cells.append(plus_minus(values_N - per_block(base, text, name)) if base else "")
        yield f"| {' | '.join([*cells, format(np.mean([r['seconds'] for r in found]), '.0f')])} |"


def per_block(found: Sequence[Mapping[str, Any]], text: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(num_blocks,): the mean over seeds of a figure."""
    values_SN = np.array([result["figures"][text][name] for result in found], dtype=np.float64)
    return np.asarray(values_SN.mean(0))


def plus_minus(values_N: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    """Their mean and its standard error."""
    return f"{values_N.mean():.4f} ± {values_N.std(ddof=1) / len(values_N) ** 0.5:.4f}"


def blocks_to_judge(
    texts: Sequence[str], train: str, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int
) -> dict[str, Ids]:
    """Blocks (N, length) of each of `texts`, SPEC or NAME=SPEC, by its name: of `train`, what is held out of it."""
    judged = {}
    for text in texts:
        name, _, spec = text.rpartition("=")
        config = DataConfig.model_validate({"train": train, "eval": None if spec == train else spec})
        judged[name or spec] = TextData(config).blocks("eval", tokenizer, length, max_tokens)
    return judged


def main() -> None:
    """Measure what is missing and write the report after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("--train", default=PYTHON_DOCS, help="text to train on: a spec as under data.train")
    parser.add_argument("--judge", nargs="+", default=[PYTHON_DOCS], help="texts to judge on, SPEC or NAME=SPEC")
    parser.add_argument("--out", type=Path, required=True, help="where rows and the report are kept")
    parser.add_argument("--drop", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--by", choices=get_args(scores.Score), default="leave-one-out", help="chooses the layers")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--options", type=json.loads, default={}, help='of the training, as JSON: {"tokens": 10000}')
    args = parser.parse_args()
    options = TrainingOptions(**{"tokens": 10_240, **args.options})
    options = options.model_copy(update={"eval_steps": options.num_steps})
    settings = {
        "model": args.model.name, "train": args.train, "judge": args.judge, "by": args.by,
        "eval_tokens": args.eval_tokens, "options": options.model_dump(exclude_defaults=True),
    }  # fmt: skip
    tokenizer, length = load_tokenizer(args.model), options.sequence_length
    judged = blocks_to_judge(args.judge, args.train, tokenizer, length, args.eval_tokens)
    train_NT = TextData(DataConfig(train=args.train)).blocks("train", tokenizer, length, options.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = load_model(args.model)
    layers = layers_to_drop(teacher, train_NT, args.by, args.drop, Row(args.by, 0, 0).file(args.out, settings))
    bench = Bench(args.model, teacher, train_NT, judged, layers, options)
    results = []
    for row in rows(args.drop, args.seeds):
        file = row.file(args.out, settings)
        if not file.exists():
            work = file.with_suffix(".work")
            write_json(file, bench.measure(row, work))
            shutil.rmtree(work, ignore_errors=True)
        results.append(json.loads(file.read_text("utf-8")))
        (args.out / "recovery.md").write_text(report(results, settings), "utf-8")
        print(f"{row.method}, {row.num_dropped} layers, seed {row.seed}: {file.name}", flush=True)


if __name__ == "__main__":
    main()
