"""Which score drops the right layers: every `by` of prune-layers on one model, judged against the full model.

    python -m compress.benchmarks.prune_scores MODEL_FOLDER CALIBRATION_TEXT EVAL_TEXT [--drop 2 4]

Texts are specs as under `data:` in a pipeline file. Nothing is trained. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.models.replay import Trace, distance, output
from compress.stage import Reporter
from compress.stages.prune import scores

NUM_RANDOM = 3


@dataclass(frozen=True)
class Loss:
    """What dropping cost: perplexity, KL to the full model (nats a token) with its standard error, top-1 agreement."""

    perplexity: float
    kl: float
    kl_se: float
    top1_agreement: float


def judge(parts: Parts, blocks_NT: Tensor, drops: Sequence[Sequence[int]]) -> list[Loss]:
    """The loss of each of `drops`, on the same blocks; the standard error is over blocks."""
    figures = torch.zeros(len(drops), 3, len(blocks_NT), dtype=torch.float64)  # cross-entropy, KL, agreement
    for block, ids_T in enumerate(blocks_NT):
        ids_1T = ids_T[None]
        trace = Trace.of(parts, ids_1T)
        full = output(parts, ids_1T, trace.states[-1])
        for row, dropped in enumerate(drops):
            first = min(dropped, default=len(parts.layers))
            x_1TD = trace.states[first]
            for index in range(first, len(parts.layers)):
                x_1TD = x_1TD if index in dropped else trace.run(index, x_1TD)
            pruned = output(parts, ids_1T, x_1TD)
            picked = pruned.values[:, :-1].gather(-1, ids_1T[:, 1:, None])
            agree = pruned.values.argmax(-1) == full.values.argmax(-1)
            figures[row, :, block] = torch.stack([-picked.mean(), distance(full, pruned).mean(), agree.float().mean()])
    mean, kl_se = figures.mean(-1), figures[:, 1].std(-1) / len(blocks_NT) ** 0.5
    return [
        Loss(entropy.exp().item(), kl.item(), se.item(), agree.item())
        for (entropy, kl, agree), se in zip(mean, kl_se, strict=True)
    ]


def choices(
    parts: Parts, blocks_NT: Tensor, few_NT: Tensor, nums_dropped: Sequence[int]
) -> Iterator[tuple[str, Sequence[int]]]:
    """(`by`, layers dropped) of every score and control; `few_NT` is the calibration text of leave-one-out."""
    many, few, num_layers = scores.batches_of(blocks_NT), scores.batches_of(few_NT), len(parts.layers)
    with Reporter().progress("", 0) as silent:
        rounds = scores.leave_one_out(parts, few, max(nums_dropped), silent)
        for num in nums_dropped:
            yield "block-influence", scores.choose("block-influence", parts, many, num, silent).dropped
            yield "angular", scores.choose("angular", parts, many, num, silent).dropped
            yield "leave-one-out", sorted(scores.lowest(found) for found in rounds[:num])
            yield "uniform", scores.uniform(num_layers, num)
            for seed in range(NUM_RANDOM):
                yield f"random, seed {seed}", scores.at_random(num_layers, num, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("calibration", help="text that the scores read: a spec as under data.train")
    parser.add_argument("eval", help="text that the pruned models are judged on")
    parser.add_argument("--drop", type=int, nargs="+", default=[2, 4], help="how many layers")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text; leave-one-out reads an eighth")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    args = parser.parse_args()
    data, tokenizer = TextData(DataConfig(train=args.calibration, eval=args.eval)), load_tokenizer(args.model)
    calibration = torch.from_numpy(data.blocks("train", tokenizer, args.sequence_length, args.tokens))
    few = torch.from_numpy(data.blocks("train", tokenizer, args.sequence_length, args.tokens // 8))
    held_out = torch.from_numpy(data.blocks("eval", tokenizer, args.sequence_length, args.eval_tokens))
    parts = Parts(load_model(args.model))
    rows: list[tuple[str, Sequence[int]]] = [("full model", ())]
    rows += choices(parts, calibration, few, args.drop)
    print("| by | layers dropped | perplexity | KL (± SE) | top-1 agreement |\n|---|---|---|---|---|")
    for (by, dropped), loss in zip(rows, judge(parts, held_out, [dropped for _, dropped in rows]), strict=True):
        names = ", ".join(map(str, dropped)) or "—"
        kl = f"{loss.kl:.3f} ± {loss.kl_se:.3f}"
        print(f"| {by} | {names} | {loss.perplexity:.2f} | {kl} | {loss.top1_agreement:.1%} |")


if __name__ == "__main__":
    main()
