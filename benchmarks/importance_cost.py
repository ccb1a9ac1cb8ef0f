"""What scoring groups costs: time beside forward passes over the same tokens, memory beside loading the model.

    python -m compress.benchmarks.importance_cost MODEL_FOLDER --threads 2 [--big BIG_FOLDER]

Each importance is held against the forward passes that it scores: of the backbone for `activation`, with head and
loss for `taylor`. They take turns, round by round; ratios are medians over rounds with bootstrap intervals. Peak memory
is that of a fresh process that loads BIG_FOLDER, or MODEL_FOLDER, and reads every weight, and of one that loads and
scores it on as many tokens. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.export_cost import cost_of
from compress.benchmarks.qat_step import rounds_of
from compress.benchmarks.timing import ratio, summarise
from compress.models.load import load_model
from compress.models.narrow import explained
from compress.models.parts import Parts
from compress.report.tables import Table, as_markdown
from compress.stage import Reporter
from compress.stages.prune.importance import activation, taylor
from compress.stages.prune.scores import batches_of

BARE = {"activation": "forward", "taylor": "forward and loss"}
"""What each importance is held against."""


def blocks(parts: Parts, tokens: int) -> list[Tensor]:
    """Ids of random tokens, in batches of blocks of 256."""
    drawn = torch.Generator().manual_seed(0)
    return batches_of(torch.randint(parts.shape.vocab_size, (tokens // 256, 256), generator=drawn))


def passes(model: Any, tokens: int) -> dict[str, Callable[[], float]]:
    """By name what a round times, each of which reads the same tokens and returns its seconds."""
    parts = Parts(model)
    placed, batches = explained(parts, "importance_cost"), blocks(parts, tokens)

    def timed(work: Callable[[Tensor], object]) -> Callable[[], float]:
        def once() -> float:
            started = perf_counter()
            for ids_BT in batches:
                work(ids_BT)
            return perf_counter() - started

        return once

    with Reporter().progress("scoring", len(batches)) as advance:
        return {
            "forward": timed(torch.no_grad()(lambda ids_BT: parts.backbone(ids_BT, use_cache=False))),
            "activation": timed(lambda ids_BT: activation(parts, [ids_BT], advance)),
            "forward and loss": timed(torch.no_grad()(lambda ids_BT: model(ids_BT, labels=ids_BT, use_cache=False))),
            "taylor": timed(lambda ids_BT: taylor(parts, placed, [ids_BT], advance)),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("--big", type=Path, help="another one, whose memory is measured")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["load", "score"], help="for the processes that are watched")
    args = parser.parse_args(arguments)
    machine = environment(args.threads, pick_cpus(args.threads))
    torch.set_num_threads(args.threads)
    if args.only:
        parts = Parts(load_model(args.model))
        if args.only == "load":
            for weight in parts.model.parameters():  # mapped from the file until it is read
                weight.detach().sum()
        else:
            with Reporter().progress("scoring", 1) as advance:
                activation(parts, blocks(parts, args.tokens), advance)
        return
    times_ms = rounds_of(passes(load_model(args.model), args.tokens), args.rounds)
    rows = []
    for name, bare in BARE.items():
        against = ratio(times_ms[name], times_ms[bare])
        seconds = (f"{summarise(times_ms[each]).median / 1e3:.2f}" for each in (bare, name))
        rows.append((name, bare, *seconds, f"{against.median:.2f}× [{against.low:.2f}, {against.high:.2f}]"))
    print(as_markdown(Table("", ("importance", "beside", "s", "s with it", "ratio"), tuple(rows))))
    big = args.big or args.model
    command = (sys.executable, "-m", "compress.benchmarks.importance_cost", str(big), "--tokens", str(args.tokens))
    load, score = (cost_of((*command, "--only", only), Path.cwd()).peak_rss_mb for only in ("load", "score"))
    print(f"\nPeak memory of {big.name}: {load:.0f} MB to load, {score:.0f} MB to load and score, {score / load:.2f}×.")
    busy = f"{machine['busy_percent']:.0f} % busy before"
    print(f"{args.tokens} tokens, {args.threads} threads, {machine['cpu']}, {busy}, commit {machine['commit']}.")


if __name__ == "__main__":
    main()
