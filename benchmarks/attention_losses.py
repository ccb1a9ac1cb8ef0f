"""What losses on attention are worth in quantisation-aware training: a small sentence classifier in ternary weights.

    python -m compress.benchmarks.attention_losses MODEL_FOLDER --out DIR

An encoder is fine-tuned in float32 to tell good from bad reviews; its projections are quantised to ternary (GPTQ, the
embedding to 8 bits) and trained through it towards the fine-tuned model, which is teacher and start of every arm: the
same sentences in the same order, one loss more or less. The learning rate is that of `rates` which gives the reference
the lowest loss on sentences put aside for it, which also say whether a training helped at all. Each result is kept in
DIR, so that a run that was interrupted goes on; DIR/attention-losses.md is the report. Figures are of held-out
sentences, their errors those of that sample; differences are paired by sentence, of the mean over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.artifact import write_json
from compress.benchmarks.recovery import plus_minus
from compress.benchmarks.reviews import SENTENCES, fine_tune, reviews
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.options import QuantizeOptions
from compress.quant.quantized import Quantized
from compress.quant.trained import FakeQuantisation
from compress.stage import Reporter
from compress.train.engine import place, recover
from compress.train.losses import cross_entropy, forward_kl
from compress.train.options import TrainingOptions
from compress.train.teacher import layer_map
from compress.train.trainer import Labelled

PTQ = ("rtn", "gptq")
LABELS = {"kl": 0.0, "ce": 1.0}
KD = {"kl": 1.0, "hidden": 1.0}
QAT: Mapping[str, Mapping[str, float]] = {
    "logits + hidden": KD,
    "+ attention output": {**KD, "attention_output": 1.0},
    "+ attention map": {**KD, "attention_map": 1.0},
    "+ both": {**KD, "attention_output": 1.0, "attention_map": 1.0},
    "labels alone": LABELS,
}
REFERENCE = "logits + hidden"
FIGURES = ("accuracy", "cross-entropy", "KL to float32")


@dataclass(frozen=True)
class Settings:
    """How much is trained, and how."""

    length: int = 24
    batch: int = 16
    epochs: float = 2.0
    tuning_epochs: float = 2.0
    tuning_rate: float = 5e-5
    rates: Sequence[float] = (5e-5, 1e-4, 2e-4)
    num_tuning: int = 400
    scale_rate: float = 1e-3
    scheme: str = "ternary"

    def training(self, num_sentences: int, epochs: float, rate: float, loss: Mapping[str, float]) -> TrainingOptions:
        """The recovery engine's options for `epochs` over the sentences, evaluated at the end."""
        steps = int(epochs * num_sentences) // self.batch
        return TrainingOptions.model_validate({
            "tokens": steps * self.batch * self.length, "sequence_length": self.length, "batch_size": self.batch,
            "learning_rate": rate, "lr_scheduler_type": "linear", "hidden_distance": "mse", "loss": loss,
            "eval_steps": steps,
        })  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The fine-tuned model, and what is trained on and judged on."""

    settings: Settings
    folder: Path
    out: Path
    train: Labelled
    tuning: Labelled
    test: Labelled

    @classmethod
    def of(cls, settings: Settings, model: Path, sentences: str, out: Path) -> Bench:
        """Fine-tune the model, unless it is there."""
        digest = hashlib.sha256(json.dumps([asdict(settings), sentences, str(model)]).encode()).hexdigest()[:8]
        test, rest = reviews(sentences, load_tokenizer(model), settings.length)
        train, tuning = rest[settings.num_tuning :], rest[: settings.num_tuning]
        bench = cls(settings, out / digest / "float32", out / digest, train, tuning, test)
        if not bench.folder.exists():
            options = settings.training(len(train), settings.tuning_epochs, settings.tuning_rate, LABELS)
            fine_tune(model, train, tuning, options, bench.folder)
        return bench

    def ptq(self, method: str) -> tuple[PreTrainedModel, Quantized]:
        """The fine-tuned model with the weights that its codes stand for, and these."""
        model, length = load_model(self.folder), self.settings.length
        options = QuantizeOptions.model_validate({
            "scheme": self.settings.scheme, "embeddings": "w8-block64", "method": method, "sequence_length": length,
        })  # fmt: skip
        ids_M = torch.from_numpy(self.train.ids_NT[self.train.mask_NT > 0])
        blocks_BT = ids_M[: options.tokens // length * length].view(-1, length)
        return model, quantize_model(Parts(model), options, blocks_BT, keep_latents=True)

    @cached_property
    def start(self) -> Quantized:
        """What every training starts from."""
        return self.ptq("gptq")[1]

    @cached_property
    def tried(self) -> dict[float, float]:
        """The loss on the tuning sentences that the reference ends with, by learning rate."""
        return {rate: self.result(REFERENCE, 0, rate)["tuning"][1] for rate in self.settings.rates}

    @property
    def rate(self) -> float:
        """The learning rate of every training."""
        return min(self.tried, key=self.tried.__getitem__)

    def qat(self, method: str, seed: int, rate: float, work: Path) -> tuple[PreTrainedModel, tuple[float, float]]:
        """The fine-tuned model with the weights that its trained codes stand for; and the loss on the
        tuning sentences before and after, where a training that made it larger is undone."""
        model, teacher = load_model(self.folder), load_model(self.folder)
        fakes = FakeQuantisation(model, self.start.tensors, self.start.latents, "both")
        options = self.settings.training(len(self.train), self.settings.epochs, rate, QAT[method])
        layers = [(0, 0), *layer_map(len(Parts(model).layers), len(Parts(teacher).layers))]
        outcome = recover(
            model, teacher if options.loss.needs_teacher else None, self.train, self.tuning, options, layers, work,
            seed, Reporter(), fakes.rates(self.settings.scale_rate),
        )  # fmt: skip
        cast(nn.Module, model).cpu()
        fakes.remove()
        losses = [entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry]
        return model, (losses[0], losses[-1])

    def result(self, method: str, seed: int, rate: float = 0.0) -> dict[str, Any]:
        """FIGURES of each held-out sentence, losses on the tuning sentences, and seconds; kept in a file."""
        file = self.out / f"{method.replace(' ', '-')}-{seed}-{rate:g}.json"
        if not file.exists():
            work, started, tuning = self.out / f"{file.stem}.work", time.monotonic(), None
            model = self.ptq(method)[0] if method in PTQ else load_model(self.folder)
            if method in QAT:
                model, tuning = self.qat(method, seed, rate, work)
            figures = self._judged(model)
            write_json(file, {"figures": figures, "tuning": tuning, "seconds": time.monotonic() - started})
            shutil.rmtree(work, ignore_errors=True)
        return {"method": method, "seed": seed, **json.loads(file.read_text("utf-8"))}

    @torch.inference_mode()
    def _judged(self, model: PreTrainedModel) -> dict[str, list[float]]:
        """FIGURES of each held-out sentence."""
        labels_N, source = torch.from_numpy(self.test.labels_N), load_model(self.folder)
        model_NV, source_NV = (self._logits(each) for each in (model, source))
        values = ((model_NV.argmax(-1) == labels_N), cross_entropy(model_NV, labels_N), forward_kl(model_NV, source_NV))
        return {name: value_N.double().tolist() for name, value_N in zip(FIGURES, values, strict=True)}

    def _logits(self, model: PreTrainedModel) -> Tensor:
        """(N, classes)."""
        place(model, torch.device("cpu"))
        ids_NT, mask_NT = torch.from_numpy(self.test.ids_NT), torch.from_numpy(self.test.mask_NT)
        batches = zip(torch.split(ids_NT, 64), torch.split(mask_NT, 64), strict=True)
        return torch.cat([model(input_ids=ids_BT, attention_mask=mask_BT).logits for ids_BT, mask_BT in batches])


def results(bench: Bench, num_seeds: int) -> Iterator[dict[str, Any]]:
    """All results, those of one seed first."""
    for method in ("float32", *PTQ):
        yield bench.result(method, 0)
    for seed in range(num_seeds):
        for method in QAT:
            yield bench.result(method, seed, bench.rate)


def report(rows: Sequence[Mapping[str, Any]], settings: Settings, tried: Mapping[float, float]) -> str:
    """A table for each figure, a method a line. tried: the reference's loss on the tuning sentences, by rate."""
    losses = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in tried.items())
    lines = [f"Settings: `{json.dumps(asdict(settings))}`", "", f"{REFERENCE} on the tuning sentences: {losses}"]
    trained = [(f"{row['method']} ({row['seed']})", *row["tuning"]) for row in rows if row["tuning"]]
    undone = [name for name, before, after in trained if after >= before]
    if undone:
        lines += ["", f"Undone, as the loss on the tuning sentences had risen (seed): {', '.join(undone)}"]
    for figure in FIGURES:
        found: dict[str, list[list[float]]] = {}
        for row in rows:
            found.setdefault(row["method"], []).append(row["figures"][figure])
        lines += ["", f"| {figure} | mean ± SE | each seed's | − {REFERENCE} ± SE | each seed's |", f"|{'---|' * 5}"]
        for method, values in found.items():
            cells = _cells(np.array(values))
            if method != REFERENCE and REFERENCE in found:
                base_SN = np.array(found[REFERENCE])
                cells += _cells(np.array(values) - (base_SN if len(values) == 1 else base_SN[: len(values)]))
            lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join([*lines, ""])


def _cells(values_SN: NDArray[np.float64]) -> list[str]:
    """Over sentences, of the mean over seeds; and each seed's."""
    return [plus_minus(values_SN.mean(0)), " ".join(f"{value:.4f}" for value in values_SN.mean(1))]


def main() -> None:
    """Measure what is missing and write the report after every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a BERT")
    parser.add_argument("--out", type=Path, required=True, help="where results and the report are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", default=SENTENCES, help="where {amazon,imdb,yelp}.json are, as under data.train")
    parser.add_argument("--settings", type=json.loads, default={}, help='other Settings, as JSON: {"epochs": 1}')
    args = parser.parse_args()
    settings, rows = Settings(**args.settings), []
    bench = Bench.of(settings, args.model, args.sentences, args.out)
    for row in results(bench, args.seeds):
        rows.append(row)
        (args.out / "attention-losses.md").write_text(report(rows, settings, bench.tried), "utf-8")
        print(
            f"{row['method']}, seed {row['seed']}: {np.mean(row['figures'][FIGURES[0]]):.4f}, {row['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
