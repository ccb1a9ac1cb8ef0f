"""Which softmax layers a hybrid must keep: `kl` against `kl-proxy`, `uniform` and `random`, on recall.

    python -m compress.benchmarks.layer_selection --out DIR

For each seed a small Llama learns multi-query associative recall (MQAR) from nothing: repeated sequences first, which
teach it to look for what followed last time, then MQAR among them. It is then converted to `linear` once for each way
to choose the layers that stay softmax. All are aligned and distilled on the same tokens and judged on the same
questions. Each result is kept in DIR, so that a run that was interrupted goes on; DIR/layer-selection.md is the report.
Differences are paired by question, over the mean of seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.artifact import write_json
from compress.benchmarks.probes import mqar_batch
from compress.benchmarks.quality import Ints
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.convert.conversion import Job, convert
from compress.stages.convert.stage import ConvertAttention
from compress.train.engine import Ids, recover
from compress.train.options import LossWeights, TrainingOptions

SELECTED = ("kl", "kl-proxy", "uniform")
"""The ways to choose that give one choice a model. `random` is the mean over other choices, if there are few all."""
_HELD_OUT = 1_000_003
"""Added to a seed: questions that no model has seen."""


@dataclass(frozen=True)
class Settings:
    """The model, the task, and how much is trained on. Budgets are in optimiser steps of `batch` sequences."""

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    vocabulary: int = 64
    pairs: int = 10
    length: int = 48
    batch: int = 32
    repeat_steps: int = 500
    recall_steps: int = 200
    recall_least: float = 0.97
    recall_rounds: int = 6
    source_rate: float = 4e-3
    align_steps: int = 30
    kl_steps: int = 20
    distill_steps: int = 40
    align_rate: float = 1e-2
    distill_rate: float = 1e-3
    draws: int = 6
    questions: int = 64

    def training(self, steps: int, rate: float, **more: Any) -> dict[str, Any]:
        """The options that all trainings share. Such small products are no faster in bfloat16."""
        return {
            "tokens": steps * self.batch * self.length, "sequence_length": self.length, "batch_size": self.batch,
            "learning_rate": rate, "precision": "fp32", **more,
        }  # fmt: skip

    def conversion(self, choice: Mapping[str, Any]) -> ConvertAttention:
        """The stage, its layers chosen as `choice` says."""
        distill = self.training(self.distill_steps, self.distill_rate, mixer_learning_rate=self.distill_rate)
        return ConvertAttention.model_validate({
            "to": "linear",
            "window": 0,
            "align": self.training(self.align_steps, self.align_rate),
            "distill": distill,
            "kl_tokens": self.kl_steps * self.batch * self.length,
            "select_tokens": 2 * self.batch * self.length,
            **choice,
        })  # fmt: skip


def repeats(num: int, length: int, vocabulary: int, seed: int) -> Ids:
    """(num, length): each row is a random sequence of its own length, 4 to length/2 tokens, again and again."""
    rng = np.random.default_rng(seed)
    periods_N = rng.integers(4, length // 2, num)
    return np.stack([np.resize(rng.integers(0, vocabulary, period), length) for period in periods_N])


def recall(num: int, settings: Settings, seed: int) -> tuple[Ids, Ints, Ints]:
    """MQAR: ids (num, length), the rows (num, pairs) after which an answer is due, and the answers (num, pairs)."""
    ids_NT, *asked = mqar_batch(num, settings.pairs, settings.length, np.arange(settings.vocabulary), seed)
    return ids_NT.astype(np.int64), asked[0], asked[1]


def train_source(settings: Settings, seed: int, folder: Path) -> None:
    """Train the softmax model of `seed` and write it to `folder`, unless it is there."""
    if folder.exists():
        return
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=2 * settings.hidden,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads, tie_word_embeddings=False,
            num_key_value_heads=settings.heads, max_position_embeddings=4 * settings.length,
        )
    )  # fmt: skip
    for round_ in range(1 + settings.recall_rounds):
        num = settings.batch * (settings.recall_steps if round_ else settings.repeat_steps)
        data_seed = 100 * seed + 10 * round_
        train_NT, held_NT = (
            repeats(n, settings.length, settings.vocabulary, data_seed + i) for i, n in enumerate((num, settings.batch))
        )
        if round_:
            num_recall = 3 * num // 4
            train_NT[:num_recall] = recall(num_recall, settings, data_seed)[0]
            held_NT, *asked = recall(settings.batch, settings, data_seed + 1)
            if right(model, held_NT, *asked).mean() >= settings.recall_least:
                break
        loss = LossWeights.model_validate({"kl": 0.0, "ce": 1.0})
        options = TrainingOptions(**settings.training(num // settings.batch, settings.source_rate), loss=loss)
        work = folder.with_name(f"{folder.name}-{round_}.work")
        recover(model, None, train_NT, held_NT, options, (), work, seed, Reporter())
    unfinished = folder.with_suffix(".part")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)
    for work in folder.parent.glob(f"{folder.name}-*.work"):
        shutil.rmtree(work)


@torch.no_grad()
def right(model: nn.Module, ids_NT: Ints, rows_NP: Ints, answers_NP: Ints) -> NDArray[np.bool_]:
    """(N, P): which answers the model gives."""
    guesses_NT = model(input_ids=torch.from_numpy(ids_NT)).logits.argmax(-1).numpy()
    return np.asarray(np.take_along_axis(guesses_NT, rows_NP, axis=1) == answers_NP)


def answered(model: nn.Module, settings: Settings) -> list[float]:
    """(questions,): the share of right answers in each held-out sequence."""
    shares_N: list[float] = right(model, *recall(settings.questions, settings, _HELD_OUT)).mean(1).tolist()
    return shares_N


def measure(choice: Mapping[str, Any], settings: Settings, seed: int, source: Path, work: Path) -> dict[str, Any]:
    """Convert the source as the stage does, and ask it: layers that stay softmax, their scores, answers, seconds."""
    num_align = (settings.align_steps + settings.kl_steps) * settings.batch
    nums = (num_align, 2 * settings.batch, settings.distill_steps * settings.batch, 8)
    align_NT, held_NT, *distill_ids = (recall(num, settings, 100 * (seed + 1) + num)[0] for num in nums)
    options = settings.conversion(choice)
    chosen = options.preselected(Parts(load_model(source)).shape, seed)
    job = Job(options, chosen, source, source, align_NT, held_NT, (distill_ids[0], distill_ids[1]), work, seed)
    started = time.monotonic()
    converted = convert(job, Reporter())
    seconds = time.monotonic() - started
    shutil.rmtree(work)
    kept = sorted({*range(settings.layers)} - {*converted.choice.converted})
    scores = converted.choice.scores
    return {"kept": kept, "scores": scores, "answered": answered(converted.model, settings), "seconds": seconds}


def others(settings: Settings, keep: int, seed: int) -> list[tuple[int, ...]]:
    """The choices that `random` is the mean of: all that there are, or `draws` of them."""
    every = list(combinations(range(settings.layers), keep))
    drawn = np.random.default_rng(seed).permutation(len(every))[: settings.draws]
    return [every[index] for index in sorted(drawn)]


def results(settings: Settings, keep: int, seed: int, out: Path) -> Iterator[dict[str, Any]]:
    """Every result of one seed, as it comes: `softmax` (the source), SELECTED, and a `random` for each choice."""
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:8]
    source, base = out / f"{digest}-{seed}-source", {"keep": keep, "seed": seed}
    train_source(settings, seed, source)
    yield {"method": "softmax", **base, "kept": list(range(settings.layers)), "scores": None,
           "answered": answered(load_model(source), settings), "seconds": 0.0}  # fmt: skip
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    choices: list[tuple[str, Mapping[str, Any]]] = [(each, {"select": each, "keep": keep}) for each in SELECTED]
    choices += [("random", {"keep": kept}) for kept in others(settings, keep, seed)]
    for method, choice in choices:
        kept = choice["keep"] if method == "random" else (keep,)
        file = out / f"{digest}-{seed}-{method}-{'-'.join(map(str, kept))}.json"
        if not file.exists():
            same = known.get(kept) if method == "random" else None  # the same layers: the same training
            write_json(file, same or measure(choice, settings, seed, source, file.with_suffix(".work")))
        found = json.loads(file.read_text("utf-8"))
        known[tuple(found["kept"])] = found
        yield {"method": method, **base, **found}


def report(rows: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """For each number of softmax layers, a table of recall by method and seed, and that of every choice."""
    lines = ["# Which layers stay softmax: recall after conversion", "", f"Settings: `{json.dumps(asdict(settings))}`"]
    for keep in sorted({row["keep"] for row in rows}):
        lines += ["", f"## {keep} of {settings.layers} layers stay softmax", ""]
        lines += _section([row for row in rows if row["keep"] == keep])
    return "\n".join([*lines, ""])


def _section(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    seeds = sorted({row["seed"] for row in rows})
    heads = [f"seed {seed} (softmax layers)" for seed in seeds]
    yield f"| method | {' | '.join(heads)} | mean | kl − method ± SE |"
    yield f"|{'---|' * (len(seeds) + 3)}"
    for method in ("softmax", *SELECTED, "random"):
        found = [[row for row in rows if (row["method"], row["seed"]) == (method, seed)] for seed in seeds]
        if all(found):
            yield f"| {method} | {' | '.join(_table_cells(method, found, rows))} |"
    yield "\nRecall of every choice that was trained:\n"
    for seed in seeds:
        trained = {tuple(row["kept"]): np.mean(row["answered"]) for row in rows
                   if row["seed"] == seed and row["method"] != "softmax"}  # fmt: skip
        yield f"- seed {seed}: {', '.join(f'{_names(kept)}: {share:.3f}' for kept, share in sorted(trained.items()))}"


def _table_cells(
    method: str, found: Sequence[Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    answered_SN = np.stack([_mean(each) for each in found])
    for each, answered_N in zip(found, answered_SN, strict=True):
        which = _names(each[0]["kept"]) if len(each) == 1 else f"{len(each)} choices"
        yield f"{answered_N.mean():.3f} ({which})"
    yield f"{answered_SN.mean():.3f}"
    kl = [[row for row in rows if (row["method"], row["seed"]) == ("kl", each[0]["seed"])] for each in found]
    if method == "kl" or not all(kl):
        yield ""
        return
    difference_N = (np.stack([_mean(each) for each in kl]) - answered_SN).mean(0)
    yield f"{difference_N.mean():+.3f} ± {difference_N.std(ddof=1) / len(difference_N) ** 0.5:.3f}"


def _names(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def _mean(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """(questions,): over `rows`."""
    return np.asarray(np.mean([row["answered"] for row in rows], axis=0))


def main() -> None:
    """Measure what is missing and write the report after every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results and the report are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 2], help="how many layers stay softmax")
    parser.add_argument("--settings", type=json.loads, default={}, help='other Settings, as JSON: {"layers": 6}')
    args = parser.parse_args()
    settings, rows = Settings(**args.settings), []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, keep in product(range(args.seeds), args.keep):
        for row in results(settings, keep, seed, args.out):
            rows.append(row)
            (args.out / "layer-selection.md").write_text(report(rows, settings), "utf-8")
            share = np.mean(row["answered"])
            print(f"seed {seed}, {row['method']}: keeps {_names(row['kept'])}, recall {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
