"""The two-step recipe, softmax → linear → mamba2, against its controls: quality and recall by tokens spent.

    python -m compress.benchmarks.two_step --out DIR --tokens 50000 100000 200000

Bick et al. and "Attention to Mamba": step one aligns linear attention with the softmax it replaces, on a tenth of the
tokens; step two starts from that as a Mamba-2 that computes the same, and trains all of it. For machines without a GPU
this makes its own small Llama from nothing, on addresses of US presidents until 2009 and Python's documentation,
with repeated passages and multi-query associative recall (MQAR) among them so that it has recall to lose. Conversions
are trained on the addresses and judged on those since 2013, on Python's documentation, another domain than they are
trained on, and on MQAR. All see as many tokens. Each result is kept in DIR, so that a run that was interrupted goes on;
DIR/two-step.md is the report. Errors are over blocks of text, ratios paired with the source by block.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from compress.artifact import write_json
from compress.benchmarks.layer_selection import right
from compress.benchmarks.probes import mqar_batch
from compress.benchmarks.quality import Ints
from compress.benchmarks.recovery import judge
from compress.benchmarks.small_llama import ADDRESSES, JUDGE, Texts, train_llama
from compress.models.load import load_model, load_tokenizer, save_model
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.convert.conversion import Job, convert
from compress.stages.convert.stage import ConvertAttention
from compress.train.engine import Ids
from compress.train.options import LossWeights, TrainingOptions

_HELD_OUT = 1_000_003
"""The seed of questions that no model has seen."""


@dataclass(frozen=True)
class Method:
    """One way to the converted model."""

    init: str = "attention"
    align_share: float = 0.1
    loss: str = "kl"


METHODS: Mapping[str, Method] = {
    "two steps": Method(),
    "cross-entropy": Method(loss="ce"),
    "no alignment": Method(align_share=0.0),
    "no weight init": Method(init="random"),
}
"""The recipe, and what is left out of it or changed in each control."""


@dataclass(frozen=True)
class Settings:
    """The small model, and how it is trained."""

    layers: int = 4
    hidden: int = 192
    vocabulary: int = 2048
    length: int = 256
    batch: int = 4
    pairs: int = 32
    recall_words: int = 128
    recall_share: float = 0.3
    source_tokens: int = 3_000_000
    source_rate: float = 2e-3
    align_batch: int = 2
    align_rate: float = 1e-2
    rate: float = 1e-3
    precision: str = "bf16"
    judged_tokens: int = 8192
    questions: int = 16

    def training(self, tokens: float, rate: float) -> dict[str, Any]:
        """The options that all trainings share."""
        return {
            "tokens": max(1, round(tokens)), "sequence_length": self.length, "batch_size": self.batch,
            "learning_rate": rate, "precision": self.precision,
        }  # fmt: skip

    def questions_of(self, num: int, seed: int) -> tuple[Ids, Ints, Ints]:
        """MQAR: ids (num, length), the rows (num, pairs) after which an answer is due, and the answers."""
        words = np.random.default_rng(0).permutation(np.arange(1, self.vocabulary))[: self.recall_words]
        ids_NT, *asked = mqar_batch(num, self.pairs, self.length, words, seed)
        return ids_NT.astype(np.int64), asked[0], asked[1]

    def with_recall(self, text_NT: Ids, seed: int) -> Ids:
        """`recall_share` of the blocks made into such that need recall: half repeat their start, half are MQAR."""
        rng, mixed_NT = np.random.default_rng(seed), text_NT.copy()
        chosen = rng.permutation(len(text_NT))[: round(self.recall_share * len(text_NT))]
        repeated, asked = np.array_split(chosen, 2)
        for row in repeated:
            mixed_NT[row] = np.resize(text_NT[row, : rng.integers(8, self.length // 2)], self.length)
        mixed_NT[asked] = self.questions_of(len(asked), seed)[0]
        return mixed_NT


def train_source(settings: Settings, texts: Texts, folder: Path, seed: int = 0) -> None:
    """Train the softmax model and write it, with its tokenizer, to `folder`, unless it is there."""
    if folder.exists():
        return
    tokenizer = texts.new_tokenizer(settings.vocabulary)
    train_NT = settings.with_recall(texts.source_blocks(tokenizer, settings.length), 1)
    tune_NT = texts.tuning(tokenizer, settings.length, settings.judged_tokens)
    loss = LossWeights.model_validate({"kl": 0.0, "ce": 1.0})
    options = TrainingOptions(**settings.training(settings.source_tokens, settings.source_rate), loss=loss)
    train_llama(settings.layers, settings.hidden, tokenizer, train_NT, tune_NT, options, folder, seed)


@dataclass(frozen=True)
class Bench:
    """The source, what conversions are trained on and tuned by, and what they are judged on."""

    settings: Settings
    folder: Path
    train_NT: Ids
    tune_NT: Ids
    judged: Mapping[str, Ids]

    @classmethod
    def of(cls, settings: Settings, texts: Texts, folder: Path) -> Bench:
        """Tokenize the texts as the source in `folder` does."""
        tokenizer, length, judged = load_tokenizer(folder), settings.length, settings.judged_tokens
        train_NT = texts.speeches(JUDGE).blocks("train", tokenizer, length)
        return cls(
            settings, folder, settings.with_recall(train_NT, 2), texts.tuning(tokenizer, length, judged),
            texts.judged(tokenizer, length, judged),
        )  # fmt: skip

    def converted(self, method: Method, tokens: int, work: Path) -> PreTrainedModel:
        """The source as Mamba-2, made by two stages, each of which can be resumed."""
        settings, num_aligned = self.settings, round(method.align_share * tokens)
        align = settings.training(num_aligned, settings.align_rate) | {"batch_size": settings.align_batch}
        first = ConvertAttention.model_validate(
            {"to": "linear", "window": 0, "align": align if num_aligned else None, "distill": None, "init": method.init}
        )
        linear = work / "linear"
        if not linear.exists():
            model = self._convert(first, self.folder, work / "first")
            save_model(model, self.folder, work / "linear.part")
            (work / "linear.part").rename(linear)
        loss = {"kl": 0.0, "ce": 0.0, method.loss: 1.0}
        distill = settings.training(tokens - num_aligned, settings.rate)
        distill |= {"loss": loss, "mixer_learning_rate": settings.rate}
        second = ConvertAttention.model_validate({"to": "mamba2", "align": None, "distill": distill})
        return self._convert(second, linear, work / "second")

    def measure(self, model: PreTrainedModel, source: PreTrainedModel) -> dict[str, Any]:
        """Figures of each block of text, and the share of right answers in each MQAR sequence."""
        model.train(False)
        return {
            "figures": {name: judge(model, source, ids_NT) for name, ids_NT in self.judged.items()},
            "mqar": right(model, *self.settings.questions_of(self.settings.questions, _HELD_OUT)).mean(1).tolist(),
        }

    def _convert(self, options: ConvertAttention, folder: Path, work: Path) -> PreTrainedModel:
        chosen = options.preselected(Parts(load_model(folder)).shape, 0)
        ids = self.train_NT, self.tune_NT
        return convert(Job(options, chosen, folder, self.folder, *ids, ids, work, 0), Reporter()).model


def results(settings: Settings, texts: Texts, tokens: Sequence[int], out: Path) -> Iterator[dict[str, Any]]:
    """The source's result and, for each budget, that of each method."""
    digest = hashlib.sha256(json.dumps([asdict(settings), asdict(texts)]).encode()).hexdigest()[:8]
    folder = out / f"{digest}-source"
    train_source(settings, texts, folder)
    bench, source = Bench.of(settings, texts, folder), load_model(folder)
    rows: list[tuple[str, int]] = [("source", 0), *((name, budget) for budget in sorted(tokens) for name in METHODS)]
    for name, budget in rows:
        file = out / f"{digest}-{name.replace(' ', '-')}-{budget}.json"
        if not file.exists():
            work, started = file.with_suffix(".work"), time.monotonic()
            model = bench.converted(METHODS[name], budget, work) if name in METHODS else source
            seconds = time.monotonic() - started
            write_json(file, {**bench.measure(model, source), "seconds": seconds})
            shutil.rmtree(work, ignore_errors=True)
        yield {"method": name, "tokens": budget, **json.loads(file.read_text("utf-8"))}


def report(rows: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """A table for each text, and one for recall: a method a line, a budget a column."""
    source = next(row for row in rows if row["method"] == "source")
    lines = ["# Attention to Mamba-2 in two steps, by tokens spent", "", f"Settings: `{json.dumps(asdict(settings))}`"]
    for text, figures in source["figures"].items():
        perplexity = np.exp(np.mean(figures["ce"]))
        lines += ["", f"## Perplexity ratio on {text} (source: {perplexity:.2f})", ""]
        lines += _table(rows, {id(row): _nll(row, text) - _nll(source, text) for row in rows}, ratio=True)
    mqar = np.mean(source["mqar"])
    lines += ["", f"## MQAR, {settings.pairs} pairs in {settings.length} tokens (source: {mqar:.3f})", ""]
    lines += _table(rows, {id(row): np.array(row["mqar"]) for row in rows}, ratio=False)
    return "\n".join([*lines, ""])


def _table(
    rows: Sequence[Mapping[str, Any]], values: Mapping[int, NDArray[np.float64]], ratio: bool
) -> Iterator[str]:
    """values: of each row, (blocks,): logarithms where they are of ratios."""
    budgets = sorted({row["tokens"] for row in rows if row["method"] in METHODS})
    best = next(iter(METHODS))
    difference = f"{'log ratio' if ratio else 'share'} − {best}, ± SE"
    yield f"| method | {' | '.join(f'{budget} tokens' for budget in budgets)} | {difference}, at the last |"
    yield f"|{'---|' * (len(budgets) + 2)}"
    by_cell = {(row["method"], row["tokens"]): values[id(row)] for row in rows}
    for name in METHODS:
        found = [by_cell.get((name, budget)) for budget in budgets]
        cells = ["" if each is None else _cell(each, ratio) for each in found]
        last = found[-1] if found else None
        base = by_cell.get((best, budgets[-1])) if budgets and name != best else None
        cells.append("" if last is None or base is None else _plus_minus(last - base))
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(values_N: NDArray[np.float64], ratio: bool) -> str:
    if not ratio:
        return _plus_minus(values_N)
    mean, error = np.exp(values_N.mean()), values_N.std(ddof=1) / len(values_N) ** 0.5
    return f"{mean:.3f} ± {mean * error:.3f}"


def _plus_minus(values_N: NDArray[np.float64]) -> str:
    return f"{values_N.mean():.3f} ± {values_N.std(ddof=1) / len(values_N) ** 0.5:.3f}"


def _nll(row: Mapping[str, Any], text: str) -> NDArray[np.float64]:
    return np.asarray(row["figures"][text]["ce"])


def main() -> None:
    """Measure what is missing and write the report after every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results and the report are kept")
    parser.add_argument("--tokens", type=int, nargs="+", default=[50_000, 100_000, 200_000], help="budgets")
    parser.add_argument("--addresses", default=ADDRESSES, help="a folder or package folder of <year>_….txt")
    parser.add_argument("--settings", type=json.loads, default={}, help='other Settings, as JSON: {"layers": 6}')
    args = parser.parse_args()
    settings, rows = Settings(**args.settings), []
    args.out.mkdir(parents=True, exist_ok=True)
    for row in results(settings, Texts(args.addresses), args.tokens, args.out):
        rows.append(row)
        (args.out / "two-step.md").write_text(report(rows, settings), "utf-8")
        print(f"{row['method']}, {row['tokens']} tokens: MQAR {np.mean(row['mqar']):.3f}", flush=True)


if __name__ == "__main__":
    main()
