"""What reading prompts by other weights than those that write costs, on text.

    python -m compress.benchmarks.prompt_quality FOLDER --text python-docs --prompt 512 --new 96

FOLDER is an export with `prompt: int8`. Each block of text is read as prompts are, in chunks of `--chunk` tokens (the
folder's own where it is left out), and as single tokens are. Judged are all of its tokens, and, as happens in use, the
last `--new`, which are written in both: there only what they remember of the prompt differs. Prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.benchmarks import quality
from compress.benchmarks.text import OneText
from compress.exports.onnx import FEW
from compress.models.load import load_tokenizer
from compress.report.tables import Table, as_markdown
from compress.runtime.session import OnnxModel, call_sizes

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Figures = tuple[float, float, float]
"""Summed over a block's tokens: KL(as tokens‖as a prompt), log-likelihoods lost as a prompt and as tokens."""


def read(onnx: OnnxModel, ids_T: Ints, sizes: Iterable[int]) -> Floats:
    """Logits `(T, V)` of a text that is read in calls of so many tokens."""
    return np.concatenate([logits_1NV[0] for logits_1NV in onnx.in_calls(ids_T[None], sizes)])


def compare(as_tokens_TV: Floats, as_prompt_TV: Floats, targets_T: Ints) -> Figures:
    """See Figures."""
    kl_T = quality.token_kl(as_tokens_TV, as_prompt_TV)
    lost = (quality.token_nll(logits_TV, targets_T).sum() for logits_TV in (as_prompt_TV, as_tokens_TV))
    return float(kl_T.sum()), *map(float, lost)  # type: ignore[return-value]


def judged(onnx: OnnxModel, ids_NT: Ints, num_prompt: int, chunk: int) -> tuple[list[Figures], list[Figures]]:
    """Of each block: all of its tokens, and those after a prompt of `num_prompt`."""
    whole, after = [], []
    num_tokens = ids_NT.shape[1] - 1  # the last is only predicted
    written = call_sizes(num_tokens - num_prompt, FEW)
    for ids_T in ids_NT:
        given_T, targets_T = ids_T[:-1], ids_T[1:]
        tokens_TV = read(onnx, given_T, [*call_sizes(num_prompt, FEW), *written])
        whole.append(compare(tokens_TV, read(onnx, given_T, call_sizes(num_tokens, chunk)), targets_T))
        prompt_TV = read(onnx, given_T, [*call_sizes(num_prompt, chunk), *written])
        after.append(compare(tokens_TV[num_prompt:], prompt_TV[num_prompt:], targets_T[num_prompt:]))
    return whole, after


def row(name: str, figures: Sequence[Figures], num_tokens: int) -> tuple[str, ...]:
    """KL and the ratio of perplexities of so many tokens a block, with standard errors over blocks."""
    kl_N, prompt_N, tokens_N = np.array(figures).T
    counts_N = np.full(len(figures), num_tokens)
    kl = quality.cluster_mean(kl_N, counts_N)
    ratio = quality.exponential(quality.cluster_mean(prompt_N - tokens_N, counts_N))
    return name, f"{kl.value:.4f} ± {kl.se:.4f}", f"{ratio.value:.4f} ± {ratio.se:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Read the text in every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an export with prompt: int8")
    parser.add_argument("--text", default="python-docs", help="as under data:")
    parser.add_argument("--prompt", type=int, default=512, help="tokens read before those that are written")
    parser.add_argument("--new", type=int, default=96, help="tokens written after a prompt")
    parser.add_argument("--blocks", type=int, default=16, help="texts of that length")
    parser.add_argument("--chunk", type=int, help="tokens a call reads of a prompt, in place of the folder's")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    onnx = OnnxModel(options.folder, threads=options.threads)
    length = options.prompt + options.new
    chunk = options.chunk or onnx.chunk_size or length
    ids_NT = OneText(options.text).blocks(
        "train", load_tokenizer(options.folder), length + 1, options.blocks * (length + 1)
    )
    whole, after = judged(onnx, ids_NT, options.prompt, chunk)
    columns = (
        f"{options.text}, {len(ids_NT)} texts, calls of {chunk}", "KL to reading as tokens (nats)", "perplexity over it"
    )
    rows = (
        row(f"all {length} tokens read as a prompt", whole, length),
        row(f"the last {options.new}, written behind a prompt of {options.prompt}", after, options.new),
    )
    print(as_markdown(Table("", columns, rows)))


if __name__ == "__main__":
    main()
