"""Our int4 (or fp32) folder against onnxruntime-genai's own build of the same model: speed, size and perplexity.

    python -m compress.benchmarks.peer_int4 SOURCE_FOLDER OUR_FOLDER --prompts 128 1024 4096 --threads 2

SOURCE_FOLDER is a `save_pretrained` folder; the peer is built from it with the builder's defaults unless --peer names
one. Our graph computes the last token's logits alone, the peer's default build those of the whole prompt, so the peer
is built a second time with `prune_lm_head=true`, which does as ours. All folders are run with the same thread count
through onnxruntime-genai (its own generation loop) and through bare ONNX Runtime, in turns. The report goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.benchmarks import genai, report
from compress.benchmarks.contest import Budget, Contestant, Measured, Workload, hold
from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.judging import judge
from compress.benchmarks.latency import smallest_vocabulary
from compress.benchmarks.peer_report import PRUNED_HEAD, PRUNED_PEER, RUNTIMES, Quality, page
from compress.benchmarks.text import OneText
from compress.errors import CompressError
from compress.stage import Reporter


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, measure, judge, write the report and print where it is."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {"ours": options.ours} | _peers(options, scratch)
        cpus = pick_cpus(options.threads)
        surroundings = environment(options.threads, cpus)
        measured = _measure(folders, options, cpus, scratch)
        found = {
            runtime: report.assemble(
                {name: measured[f"{name} {runtime}"] for name in folders}, {**surroundings, "runtime": runtime}, folders
            )
            for runtime in RUNTIMES
        }
        judged = [_judge(options, folders["peer"], spec) for spec in options.text]
        text = page(options, folders, found, judged)
    file = options.out / f"{_file_name(options, surroundings)}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    file.with_suffix(".json").write_text(json.dumps(found, indent=1), "utf-8")
    print(text)
    print(file)


def _peers(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """The peer's folders by name: its default build, and the one with a pruned head where the builder can make it."""
    folders = {"peer": options.peer or scratch / "peer"}
    if options.peer is None:
        logging.info("building the peer")
        genai.build(options.source, folders["peer"], options.precision, scratch / "cache")
    logging.info("building the peer with %s", *PRUNED_HEAD)
    pruned = scratch / "pruned"
    try:
        genai.build(options.source, pruned, options.precision, scratch / "cache", PRUNED_HEAD)
    except CompressError as error:
        logging.warning("left out: %s", error)
        return folders
    return folders | {PRUNED_PEER: pruned}


def _measure(
    folders: Mapping[str, Path], options: argparse.Namespace, cpus: Sequence[int], scratch: Path
) -> dict[str, Measured]:
    places = {
        name: genai.with_threads(folder, options.threads, scratch / name / "t") for name, folder in folders.items()
    }
    contestants = {
        f"{name} {runtime}": Contestant(folder, runtime) for runtime in RUNTIMES for name, folder in places.items()
    }
    workloads = [Workload(tokens, 1, options.new_tokens) for tokens in options.prompts]
    return hold(
        contestants, workloads, Budget(options.repeats, options.max_seconds), threads=options.threads, cpus=cpus,
        vocab_size=smallest_vocabulary(folders.values()), advance=lambda steps=1, note="": logging.info("%s", note),
    )  # fmt: skip


def _judge(options: argparse.Namespace, peer: Path, text: str) -> Quality:
    logging.info("judging on %s", text)
    ours, theirs = (
        judge(
            folder, options.source, OneText(text),
            sequence_length=256, max_tokens=options.tokens, threads=options.threads, reporter=Reporter(),
        )
        for folder in (options.ours, peer)
    )  # fmt: skip
    return Quality(text, ours, theirs)


def _file_name(options: argparse.Namespace, machine: Mapping[str, Any]) -> str:
    words = f"{options.source.name}-{options.precision}-peer_{machine['cpu']}-{machine['threads']}threads"
    return f"{re.sub(r'[^a-z0-9_]+', '-', words.lower())}_{datetime.date.today()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model's save_pretrained folder")
    parser.add_argument("ours", type=Path, help="our exported folder")
    parser.add_argument("--peer", type=Path, help="a folder that the builder has made already")
    parser.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10, help="rounds after the warm-up")
    parser.add_argument("--max-seconds", type=float, default=900, help="begin no round that would end later")
    parser.add_argument("--text", nargs="+", default=["python-docs"], help="texts to judge on, as under `data:`")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of each text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


if __name__ == "__main__":
    main()
