"""What linear attention is worth in a sentence encoder: its time by length, and how far the embeddings move.

    python -m compress.benchmarks.encoder_linear MODEL_FOLDER TRAIN_TEXT EVAL_TEXT --out FOLDER [--convert 2 6]

Texts are specs as under `data:` in a pipeline file. Every layer is aligned once; for each number of `--convert` the
layers that `kl-proxy` names are converted, judged, and timed in float32 in ONNX Runtime in turns with the source.
Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.artifact import Artifact
from compress.benchmarks.contest import Budget, Contestant, Workload, hold
from compress.benchmarks.environment import environment, pick_cpus, warnings_of
from compress.benchmarks.timing import ratio
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.exports.onnx.stage import ExportOnnx
from compress.mixers.spec import SPECS
from compress.models.load import load_model, load_tokenizer, save_model
from compress.models.parts import Parts
from compress.stage import Reporter, StageContext, Target
from compress.stages.convert.choose import least_moved, proxy_scores
from compress.stages.convert.init import new_mixers, with_mixers
from compress.train.align import align
from compress.train.options import AlignOptions

WORKLOADS = [Workload(tokens, batch, 0) for batch, tokens in ((1, 128), (1, 256), (1, 512), (8, 128))]
WORDS = {"sentences": (8, 60), "passages": (150, 150)}
"""Fewest and most words of what is embedded."""
NUM_TEXTS = 150


def texts_of(documents: Sequence[str]) -> dict[str, list[str]]:
    """Up to NUM_TEXTS sentences and passages, drawn from all of `documents`."""
    found: dict[str, list[str]] = {kind: [] for kind in WORDS}
    for document in documents:
        words = document.split()
        fewest, most = WORDS["passages"]
        found["passages"] += [" ".join(words[i : i + most]) for i in range(0, len(words) - fewest + 1, most)]
        fewest, most = WORDS["sentences"]
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(words))
        found["sentences"] += [text for text in sentences if fewest <= len(text.split()) <= most]
    order = np.random.default_rng(0)
    return {kind: [texts[i] for i in order.permutation(len(texts))[:NUM_TEXTS]] for kind, texts in found.items()}


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """The mean of each text's last hidden states, of length 1, (N, hidden)."""
    rows = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=256, return_tensors="pt")
        weights_BT1 = batch["attention_mask"].unsqueeze(-1)
        sums_BD = (model(**batch).last_hidden_state * weights_BT1).sum(1)
        rows.append(torch.nn.functional.normalize(sums_BD, dim=-1))
    return torch.cat(rows).numpy()


def moved(source_ND: NDArray[np.float32], converted_ND: NDArray[np.float32]) -> str:
    """Cells: mean cosine and its 5th percentile; how alike two texts are, in ranks; whose nearest one is the same."""
    cosines_N = (source_ND * converted_ND).sum(1)
    alike = [each @ each.T for each in (source_ND, converted_ND)]
    pairs = np.triu_indices(len(source_ND), 1)
    ranks = [np.argsort(np.argsort(similarity[pairs])) for similarity in alike]
    nearest = [np.argmax(similarity - 2 * np.eye(len(similarity)), axis=1) for similarity in alike]
    same = np.mean(nearest[0] == nearest[1])
    rho = np.asarray(np.corrcoef(np.stack(ranks)))[0, 1]
    return f"{cosines_N.mean():.3f} | {np.percentile(cosines_N, 5):.3f} | {rho:.3f} | {same:.0%}"


def export(folder: Path, out: Path, threads: int) -> Path:
    """Write the float32 graph of the model in `folder`, compared with torch."""
    out.mkdir(parents=True)
    inputs = {"input": Artifact(folder, "torch", "encoder-linear", "")}
    data: Any = None  # the stage reads none
    target = Target.model_validate({"threads": threads})
    ExportOnnx.model_validate({"format": "fp32"}).run(StageContext(out, out, inputs, data, 0, target))
    return out


def time_them(folders: Mapping[str, Path], vocab_size: int, threads: int, rounds: int) -> None:
    """Print each model's time in ms and, of the converted ones, how many times the first one's it is."""
    cpus, contestants = pick_cpus(threads), {name: Contestant(folder) for name, folder in folders.items()}
    here = environment(threads, cpus)
    with Reporter().progress("timing", rounds) as advance:
        measured = hold(
            contestants, WORKLOADS, Budget(rounds, 600.0), threads=threads, cpus=cpus, vocab_size=vocab_size,
            advance=advance,
        )  # fmt: skip
    first = next(iter(folders))
    print(f"\n{here['cpu']}, {threads} threads, {rounds} rounds; {'; '.join(warnings_of(here))}\n")
    print("| batch × tokens | " + " | ".join(f"{name}, ms" for name in folders) + " | ratio to the source (95 %) |")
    print("|---|" + "---|" * (len(folders) + 1))
    for load in WORKLOADS:
        figure = load.figure("latency_ms")
        fastest = {name: [min(times) for times in measured[name].samples[figure]] for name in folders}
        cells = [f"{np.median(times):.1f}" for times in fastest.values()]
        against = {name: ratio(times, fastest[first]) for name, times in fastest.items() if name != first}
        ratios = "; ".join(f"{n} {r.median:.2f} ({r.low:.2f}–{r.high:.2f})" for n, r in against.items())
        print(f"| {load.batch} × {load.tokens} | {' | '.join(cells)} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a BERT that embeds sentences")
    parser.add_argument("train", help="text that the mixers are aligned on: a spec as under data.train")
    parser.add_argument("eval", help="text whose sentences and passages are embedded")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for models and graphs")
    parser.add_argument("--convert", type=int, nargs="+", default=[2, 6], help="how many layers")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    names = ("tokens", "sequence_length", "batch_size", "learning_rate")
    options = AlignOptions.model_validate({name: getattr(args, name) for name in names} | {"precision": "fp32"})
    data, tokenizer = TextData(DataConfig(train=args.train, eval=args.eval)), load_tokenizer(args.model)
    held = 2048 // options.sequence_length
    blocks_NT = data.blocks("train", tokenizer, options.sequence_length, args.tokens + 2048)
    source = load_model(args.model)
    parts = Parts(source)
    mixers = new_mixers(source, range(len(parts.layers)), SPECS["linear"])
    aligned = align(mixers, source, blocks_NT[held:], options, args.out / "work", 0, Reporter())
    with Reporter().progress("", 0) as silent:
        scores = proxy_scores(parts, mixers, torch.split(torch.from_numpy(blocks_NT[:held]), 8), silent)
    print("| layer | loss of its alignment | 1 − cos, converted alone |\n|---|---|---|")
    for layer, score in scores.items():
        print(f"| {layer} | {aligned.losses[layer]:.4f} | {score:.4f} |")
    texts = {kind: found for kind, found in texts_of(data.texts("eval")).items() if len(found) > 1}
    expected = {kind: embed(source, tokenizer, found) for kind, found in texts.items()}
    folders = {"softmax": export(args.model, args.out / "softmax", args.threads)}
    print("\n| layers | texts | cosine | 5th percentile | rank correlation | same nearest |\n|---|---|---|---|---|---|")
    for number in args.convert:
        chosen = least_moved(scores, number, 0, has_logits=False).converted
        model = with_mixers(source, mixers, chosen, SPECS["linear"])
        for kind, found in texts.items():
            print(f"| {', '.join(map(str, chosen))} | {len(found)} {kind} | "
                  f"{moved(expected[kind], embed(model, tokenizer, found))} |")  # fmt: skip
        name = f"{number} linear"
        save_model(model, args.model, args.out / "torch" / name)
        folders[name] = export(args.out / "torch" / name, args.out / name, args.threads)
    time_them(folders, parts.shape.vocab_size, args.threads, args.rounds)


if __name__ == "__main__":
    main()
