"""Which channels of Mamba-2 layers to cut: one ranking for all heads against a ranking that knows no heads.

    python -m compress.benchmarks.ssm_channels --out DIR

A state-space layer reads each of its inner channels by its head's rates, keys and queries. Group-aware pruning
(arXiv 2504.11409) keeps the same lanes of every head, so that each stays with its own. Plain ranking keeps the best
channels wherever they are, as of an MLP, and heads are whatever lies where a head was. `random` is drawn anew by each
seed. A seed makes its own small Llama from nothing, and converts every layer of it (see `two_step`); models are judged
against the converted one, as they were cut and after the same tokens of distillation. Each result is kept in DIR, so
that a run that was interrupted goes on; DIR/ssm-channels.md is the report.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.artifact import write_json
from compress.benchmarks.group_pruning import tables
from compress.benchmarks.recovery import judge
from compress.benchmarks.small_llama import ADDRESSES, Texts
from compress.benchmarks.two_step import METHODS, Bench, Settings, train_source
from compress.models.axes import Axis, Place, part_sizes, sizes_of
from compress.models.load import load_model, save_model
from compress.models.narrow import Kept, explained, narrow
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.prune.importance import Importance, activation, at_random
from compress.stages.prune.narrowing import rebuilt
from compress.stages.prune.scores import batches_of
from compress.stages.prune.selection import choose
from compress.stages.prune.widths import Widths
from compress.train.engine import recover
from compress.train.options import TrainingOptions

ARMS = ("group-aware", "plain", "random")


@dataclass(frozen=True)
class Cut:
    """What is cut, what it is scored on and how it is brought back."""

    keep: float = 0.5
    score_tokens: int = 32_768
    conversion_tokens: int = 100_000
    tokens: int = 50_000


def cut(model: PreTrainedModel, arm: str, keep: float, batches: Sequence[Tensor], seed: int) -> PreTrainedModel:
    """A model with only `keep` of the value lanes of its heads, which lanes chosen as `arm` says."""
    parts = Parts(model)
    placed = explained(parts, "ssm_channels")
    with Reporter().progress("scoring", len(batches)) as advance:
        scored = at_random(parts, seed) if arm == "random" else activation(parts, batches, advance)
    full = [Widths.of(parts.shape, layer) for layer in range(len(parts.layers))]
    narrower = [replace(width, value_lanes=max(1, round(keep * width.value_lanes))) for width in full]
    kept = choose(scored, parts.shape, narrower)
    if arm == "plain":
        for layer, width in enumerate(narrower):
            _gather(parts, placed, scored, layer, width.value_lanes)
        kept = Kept([{"value_lanes": range(width.value_lanes)} for width in narrower])
    return rebuilt(parts, narrow(parts, placed, kept), narrower)


@torch.no_grad()
def _gather(parts: Parts, placed: Mapping[str, Place], scored: Importance, layer: int, keep: int) -> None:
    """Move the best channels of a layer, in order, into the first `keep` lanes of its heads, the rest behind them."""
    sizes = sizes_of(parts.shape, layer)
    num_groups, num_lanes = sizes["groups"], sizes["value_lanes"]
    energy_GV = scored.out_HV[layer].view(num_groups, -1, num_lanes).sum(1)
    ranked = energy_GV.flatten().sort(descending=True, stable=True).indices
    best, rest = ranked[: num_groups * keep].sort().values, ranked[num_groups * keep :].sort().values
    order_GV = torch.cat([best.view(num_groups, -1), rest.view(num_groups, -1)], 1)
    weights = dict(parts.model.named_parameters())
    for name, place in placed.items():
        for dim, axis in enumerate(place.axes):
            if place.layer == layer and any("value_lanes" in part for part in axis):
                weights[name].copy_(weights[name].index_select(dim, _moved(axis, order_GV, sizes)))


def _moved(axis: Axis, order_GV: Tensor, sizes: Mapping[Any, int]) -> Tensor:
    """Where each place of an axis is read from when value lanes of key/value heads lie in another order."""
    num_lanes = order_GV.shape[1]
    found, start = [], 0
    for part in axis:
        places = torch.arange(start, start := start + torch.Size(part_sizes(part, sizes)).numel())
        if part[-1:] == ("value_lanes",) and len(part) == 2:
            heads_per_group = len(places) // order_GV.numel()
            group_GV, lane_GV = order_GV // num_lanes, order_GV % num_lanes
            head_GRV = group_GV[:, None] * heads_per_group + torch.arange(heads_per_group)[None, :, None]
            places = places[(head_GRV * num_lanes + lane_GV[:, None]).flatten()]
        found.append(places)
    return torch.cat(found)


def results(settings: Settings, how: Cut, texts: Texts, seeds: int, out: Path) -> Iterator[dict[str, Any]]:
    """The figures of each arm, seed by seed: as cut, then after recovery."""
    for seed in range(seeds):
        folder = out / f"source-{seed}"
        train_source(settings, texts, folder, seed)
        bench = Bench.of(settings, texts, folder)
        converted = out / f"mamba2-{seed}"
        if not converted.exists():
            work = converted.with_suffix(".work")
            save_model(bench.converted(METHODS["two steps"], how.conversion_tokens, work), folder, work / "made")
            (work / "made").rename(converted)
            shutil.rmtree(work)
        for arm in ARMS:
            measured = partial(_measure, bench, how, converted, arm, seed)
            for trained in (False, True):
                file = out / f"{arm}-{seed}-{'recovered' if trained else 'cut'}.json"
                if not file.exists():
                    write_json(file, measured(trained, out / "work"))
                yield json.loads(file.read_text("utf-8"))


def _measure(
    bench: Bench, how: Cut, folder: Path, arm: str, seed: int, trained: bool, work: Path
) -> dict[str, Any]:
    teacher, num_scored = load_model(folder), how.score_tokens // bench.settings.length
    batches = batches_of(torch.from_numpy(bench.train_NT[:num_scored]))
    student = cut(load_model(folder), arm, how.keep, batches, seed)
    if trained:
        options = TrainingOptions(**bench.settings.training(how.tokens, bench.settings.rate))
        shutil.rmtree(work, ignore_errors=True)
        recover(student, teacher, bench.train_NT, bench.tune_NT, options, (), work, seed, Reporter())
        shutil.rmtree(work)
        student.train(False)
    return {
        "arm": arm, "seed": seed, "trained": trained, "parameters": sum(each.numel() for each in student.parameters()),
        "figures": {name: judge(student, teacher, ids_NT) for name, ids_NT in bench.judged.items()},
    }  # fmt: skip


def report(rows: Sequence[Mapping[str, Any]], settings: Settings, how: Cut) -> str:
    """KL to the converted model: a table for each text, cut and after recovery."""
    lines = ["# Channels of Mamba-2 layers", "", f"Settings: `{json.dumps(asdict(settings) | asdict(how))}`", ""]
    return "\n".join([*lines, *tables(rows, how.tokens)])


def main() -> None:
    """Measure what is missing and write the report after every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results and the report are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--addresses", default=ADDRESSES, help="a folder or package folder of <year>_….txt")
    parser.add_argument("--settings", type=json.loads, default={}, help="other Settings, as JSON: see two_step")
    parser.add_argument("--cut", type=json.loads, default={}, help='another Cut, as JSON: {"keep": 0.75}')
    args = parser.parse_args()
    settings, how, rows = Settings(**args.settings), Cut(**args.cut), []
    args.out.mkdir(parents=True, exist_ok=True)
    for row in results(settings, how, Texts(args.addresses), args.seeds, args.out):
        rows.append(row)
        (args.out / "ssm-channels.md").write_text(report(rows, settings, how) + "\n", "utf-8")
        print(f"{row['arm']}, seed {row['seed']}, {'recovered' if row['trained'] else 'cut'}", flush=True)


if __name__ == "__main__":
    main()
