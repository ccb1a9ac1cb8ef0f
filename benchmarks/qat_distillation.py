"""What distillation is worth in quantisation-aware training: QAT towards the source against QAT with cross-entropy.

    python -m compress.benchmarks.qat_distillation --out DIR --schemes w4-block32 w2-block32 ternary

The source is a small Llama made here from nothing in float32 (small_llama.py), whose weights no format has rounded
before. All trainings start from its GPTQ codes and take the same steps: towards the next tokens of a text, towards what
the source predicts for it, or towards what it predicts for text that it wrote. They are judged on held-out text of the
domain that they read and of another that only the source read. Each result is kept in DIR, so that a run that was
interrupted goes on; DIR/qat-distillation.md is the report. Errors are over blocks of text, of the mean over seeds;
differences are paired by block.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from compress.artifact import write_json
from compress.benchmarks.recovery import judge, per_block, plus_minus
from compress.benchmarks.small_llama import ADDRESSES, JUDGE, Texts, train_llama
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.stage import Reporter
from compress.stages.qat.stage import Qat
from compress.stages.qat.training import Job, train
from compress.train.engine import Ids
from compress.train.generated import Author, generate_blocks
from compress.train.options import LossWeights, TrainingOptions

PTQ = ("rtn", "gptq")
CE = LossWeights.model_validate({"kl": 0.0, "ce": 1.0})
BASE = "QAT, KD"
QAT: Mapping[str, Any] = {"QAT, cross-entropy": {"loss": CE}, BASE: {}, "QAT, KD, generated": {"data": "generated"}}


@dataclass(frozen=True)
class Settings:
    """The small model, and how it is trained."""

    layers: int = 4
    hidden: int = 128
    vocabulary: int = 1024
    length: int = 128
    batch: int = 8
    source_tokens: int = 3_000_000
    source_rate: float = 3e-3
    qat_tokens: int = 102_400
    qat_rate: float = 5e-4
    precision: str = "fp32"
    judged_tokens: int = 16_384
    tuned_tokens: int = 4096

    def training(self, tokens: int, rate: float) -> dict[str, Any]:
        """The options that all trainings share."""
        return {
            "tokens": tokens, "sequence_length": self.length, "batch_size": self.batch, "learning_rate": rate,
            "precision": self.precision, "eval_tokens": self.tuned_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The source, what is trained on and tuned by, and what is judged on."""

    settings: Settings
    folder: Path
    out: Path
    train_NT: Ids
    tune_NT: Ids
    judged: Mapping[str, Ids]

    @classmethod
    def of(cls, settings: Settings, texts: Texts, out: Path) -> Bench:
        """Train the source, unless it is there, and tokenize the texts as it does."""
        for_source = replace(settings, qat_tokens=0, qat_rate=0.0, judged_tokens=0)
        folder, length = out / f"source-{_digest(for_source, texts)}", settings.length
        if not folder.exists():
            tokenizer = texts.new_tokenizer(settings.vocabulary)
            options = TrainingOptions(**settings.training(settings.source_tokens, settings.source_rate), loss=CE)
            train_NT = texts.source_blocks(tokenizer, length)
            tune_NT = texts.tuning(tokenizer, length, settings.tuned_tokens)
            train_llama(settings.layers, settings.hidden, tokenizer, train_NT, tune_NT, options, folder)
        tokenizer = load_tokenizer(folder)
        train_NT = texts.speeches(JUDGE).blocks("train", tokenizer, length)
        tune_NT = texts.tuning(tokenizer, length, settings.tuned_tokens)
        judged = texts.judged(tokenizer, length, settings.judged_tokens)
        return cls(settings, folder, out / _digest(settings, texts), train_NT, tune_NT, judged)

    def quantised(self, scheme: str, method: str, seed: int, work: Path) -> PreTrainedModel:
        """The source with the weights that its codes stand for, rounded or trained."""
        settings, source = self.settings, self.folder
        training = settings.training(settings.qat_tokens, settings.qat_rate)
        options = Qat.model_validate({**training, "scheme": scheme, **QAT.get(method, {})})
        calibration_NT = self.train_NT[:: max(1, len(self.train_NT) * settings.length // options.calibration_tokens)]
        if method in PTQ:
            model, start = load_model(source), options.start().model_copy(update={"method": method})
            with Reporter().progress("quantising", 0) as advance:
                quantize_model(Parts(model), start, torch.from_numpy(calibration_NT), advance)
            return model
        train_NT = self.train_NT
        if options.data == "generated":
            author = Author(partial(load_model, source), load_tokenizer(source))
            num_blocks = options.num_tokens // settings.length
            train_NT = generate_blocks(author, num_blocks, settings.length, seed, self.out / str(seed), Reporter())
        teacher = source if options.loss.needs_teacher else None
        job = Job(options, source, teacher, calibration_NT, train_NT, self.tune_NT, work, seed)
        return train(job, Reporter()).model

    def result(self, scheme: str, method: str, seed: int) -> dict[str, Any]:
        """One model's figures of each block of text, kept in a file."""
        file = self.out / f"{scheme}-{method.replace(', ', '-')}-{seed}.json"
        if not file.exists():
            self.out.mkdir(exist_ok=True)
            work, source = file.with_suffix(".work"), load_model(self.folder)
            model = source if method == "source" else self.quantised(scheme, method, seed, work)
            model.train(False)
            write_json(file, {"figures": {text: judge(model, source, ids_NT) for text, ids_NT in self.judged.items()}})
            shutil.rmtree(work, ignore_errors=True)
        return {"scheme": scheme, "method": method, "seed": seed, **json.loads(file.read_text("utf-8"))}


def results(bench: Bench, schemes: Sequence[str], num_seeds: int) -> Iterator[dict[str, Any]]:
    """The source's result, and those of all models, the ones of one seed first."""
    yield bench.result("float32", "source", 0)
    for seed in range(num_seeds):
        for scheme in schemes:
            for method in (*PTQ, *QAT):
                if seed == 0 or method in QAT:
                    yield bench.result(scheme, method, seed)


def report(rows: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """A table for each scheme and text, a method a line."""
    lines = ["# Quantisation-aware training with and without distillation", ""]
    lines.append(f"Settings: `{json.dumps(asdict(settings))}`")
    source, *others = rows
    for text in source["figures"]:
        ce_N = per_block([source], text, "ce")
        for scheme in dict.fromkeys(row["scheme"] for row in others):
            lines += ["", f"## {scheme}, judged on {text} (source: {np.exp(ce_N.mean()):.3f})", ""]
            lines += _table([row for row in others if row["scheme"] == scheme], text, ce_N)
    return "\n".join([*lines, ""])


def _table(rows: Sequence[Mapping[str, Any]], text: str, source_N: NDArray[np.float64]) -> Iterator[str]:
    """source_N: the source's cross-entropy of each block."""
    header = ["method", "seeds", "perplexity", "log ratio to source ± SE", "KL to source ± SE"]
    yield f"| {' | '.join(header)} | log ratio − {BASE} ± SE | each seed's |"
    yield f"|{'---|' * 7}"
    by_method = {method: [row for row in rows if row["method"] == method] for method in (*PTQ, *QAT)}
    for method, found in by_method.items():
        if not found:
            continue
        ce_N, base = per_block(found, text, "ce"), by_method[BASE]
        kl = plus_minus(per_block(found, text, "kl"))
        cells = [method, str(len(found)), f"{np.exp(ce_N.mean()):.3f}", plus_minus(ce_N - source_N), kl, "", ""]
        if base and method != BASE:
            pairs = [(row, other) for row in found for other in base if method in PTQ or row["seed"] == other["seed"]]
            each = [(per_block([a], text, "ce") - per_block([b], text, "ce")).mean() for a, b in pairs]
            cells[-2:] = [plus_minus(ce_N - per_block(base, text, "ce")), " ".join(f"{value:.4f}" for value in each)]
        yield f"| {' | '.join(cells)} |"


def _digest(settings: Settings, texts: Texts) -> str:
    return hashlib.sha256(json.dumps([asdict(settings), asdict(texts)]).encode()).hexdigest()[:8]


def main() -> None:
    """Measure what is missing and write the report after every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results and the report are kept")
    parser.add_argument("--schemes", nargs="+", default=["w4-block32", "w2-block32", "ternary"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--addresses", default=ADDRESSES, help="a folder or package folder of <year>_….txt")
    parser.add_argument("--settings", type=json.loads, default={}, help='other Settings, as JSON: {"layers": 6}')
    args = parser.parse_args()
    settings, rows = Settings(**args.settings), []
    args.out.mkdir(parents=True, exist_ok=True)
    for row in results(Bench.of(settings, Texts(args.addresses), args.out), args.schemes, args.seeds):
        rows.append(row)
        (args.out / "qat-distillation.md").write_text(report(rows, settings), "utf-8")
        print(f"{row['scheme']}, {row['method']}, seed {row['seed']}", flush=True)


if __name__ == "__main__":
    main()
