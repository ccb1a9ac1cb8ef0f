"""How long one layer's mixing takes, and what memory: linear mixers against softmax attention, by sequence length.

    python -m compress.benchmarks.mixer_speed --out mixer-speed.md

Mixing is what lies between rotated queries, keys and values and the input of `o_proj`: feature maps, the scan and the
normalisation; or torch's fused softmax attention. One sequence in float32, 9 query and 3 key/value heads of size 64, as
in SmolLM2-135M. Forms take turns that rotate from round to round; peak memory is that of a process of its own for each
cell. The naive recurrence is only timed up to 1024 tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.benchmarks.environment import environment, pick_cpus, warnings_of
from compress.benchmarks.rounds import rotated
from compress.benchmarks.timing import Ratio, ratio, summarise
from compress.hardware import PeakMemory
from compress.mixers.features import FeatureMap
from compress.mixers.scan import chunked, naive
from compress.mixers.window import window_attention
from compress.report.tables import Table, as_markdown

HEADS, GROUPS, HEAD_DIM = 9, 3, 64
LENGTHS = (256, 1024, 4096, 16384)
NAIVE_LIMIT = 1024
WINDOW = 64
PAIRS = (
    ("sdpa", "linear"), ("sdpa", "gated"), ("sdpa", "gated, window"), ("sdpa", "gated_delta"),
    ("linear, naive", "linear"),
)  # fmt: skip
PASSES = ("forward + backward", "forward")

Form = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name → (B, T, H, D)."""
Cell = tuple[str, str, int]
"""Pass, form, tokens."""


def sdpa(inputs: Mapping[str, Tensor]) -> Tensor:
    """Causal softmax attention, fused."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def linear(inputs: Mapping[str, Tensor], scan: Callable[..., tuple[Tensor, Tensor]] = chunked) -> Tensor:
    """Normalised, Hedgehog features: d_k 128, d_v 65."""
    return _normalised(inputs, scan, None)


def gated(inputs: Mapping[str, Tensor]) -> Tensor:
    """The same with a log decay per key/value head."""
    return _normalised(inputs, chunked, inputs["log_decay"])


def gated_window(inputs: Mapping[str, Tensor]) -> Tensor:
    """The same of the tokens before a window of WINDOW, with softmax over that."""
    k, v = (F.pad(inputs[name], (0, 0, 0, 0, WINDOW, 0)) for name in ("k", "v"))
    seen_BS = torch.arange(k.shape[1])[None] >= WINDOW
    near_BTHD = window_attention(inputs["q"], k, v, seen_BS)
    length = inputs["q"].shape[1]
    before = {"q": inputs["q"], "k": k[:, :length], "v": v[:, :length]}
    return near_BTHD + _normalised(before, chunked, inputs["log_decay"])


def gated_delta(inputs: Mapping[str, Tensor]) -> Tensor:
    """Unit-length features, d_k 64, d_v 64, normed by the root mean square."""
    feature_map = FeatureMap("l2", HEADS, HEAD_DIM)
    q, k = feature_map(inputs["q"]), feature_map(inputs["k"])
    y_BTHD = chunked(q, k, inputs["v"], inputs["log_decay"], inputs["beta"].sigmoid(), rule="gated_delta")[0]
    return F.rms_norm(y_BTHD, (HEAD_DIM,))


def linear_naive(inputs: Mapping[str, Tensor]) -> Tensor:
    """`linear` token by token."""
    return linear(inputs, naive)


FORMS: Mapping[str, Form] = {
    "sdpa": sdpa, "linear": linear, "gated": gated, "gated, window": gated_window, "gated_delta": gated_delta,
    "linear, naive": linear_naive,
}  # fmt: skip


def make_inputs(length: int) -> dict[str, Tensor]:
    """Random inputs that take gradients."""
    source = torch.Generator().manual_seed(0)
    shapes = {"q": (HEADS, HEAD_DIM), "k": (GROUPS, HEAD_DIM), "v": (GROUPS, HEAD_DIM), "beta": (GROUPS,)}
    inputs = {name: torch.randn(1, length, *shape, generator=source) for name, shape in shapes.items()}
    inputs["log_decay"] = -0.1 * torch.rand(1, length, GROUPS, generator=source)
    return {name: part.requires_grad_() for name, part in inputs.items()}


def seconds(form: Form, inputs: Mapping[str, Tensor], gradient_BTHD: Tensor | None) -> float:
    """One forward pass, and one backward where `gradient_BTHD` is given."""
    start = perf_counter()
    with torch.set_grad_enabled(gradient_BTHD is not None):
        output = form(inputs)
    if gradient_BTHD is not None:
        torch.autograd.backward(output, gradient_BTHD)
    return perf_counter() - start


def measure_ms(length: int, rounds: int) -> dict[Cell, list[float]]:
    """The time of each form, round by round, after a round that does not count."""
    inputs = make_inputs(length)
    gradient_BTHD = torch.ones(1, length, HEADS, HEAD_DIM)
    names = [name for name in FORMS if FORMS[name] is not linear_naive or length <= NAIVE_LIMIT]
    times: dict[Cell, list[float]] = {}
    for number in range(rounds + 1):
        for name in rotated(names, number):
            for which, gradient in zip(PASSES, (gradient_BTHD, None), strict=True):
                taken = seconds(FORMS[name], inputs, gradient)
                if number:
                    times.setdefault((which, name, length), []).append(1e3 * taken)
    return times


def peak_mb(cell: Cell, threads: int) -> float:
    """By how much a pass raises this process's memory over that with its inputs, in MB: call it in a fresh process."""
    which, name, length = cell
    torch.set_num_threads(threads)
    for tokens in (2, length):  # the first makes room for the libraries
        inputs = make_inputs(tokens)
        gradient_BTHD = torch.ones(1, tokens, HEADS, HEAD_DIM) if which == PASSES[0] else None
        memory = PeakMemory()
        before = memory.peak_mb()
        seconds(FORMS[name], inputs, gradient_BTHD)
    return memory.peak_mb() - before


def tables(times: Mapping[Cell, list[float]], peaks: Mapping[Cell, float]) -> list[Table]:
    """Medians and memory by length, and what SDPA and the naive form take as a multiple of the chunked ones."""
    lengths = sorted({length for _, _, length in times})
    found = []
    for which in PASSES:
        medians = {cell: f"{summarise(times[cell]).median:.4g}" for cell in times}
        found.append(_table(f"{which}, ms", FORMS, lengths, medians, which))
        found.append(_table(f"{which}, peak memory, MB", FORMS, lengths, {c: f"{peaks[c]:.0f}" for c in peaks}, which))
        ratios = {
            (which, f"{slow} / {fast}", tokens): _ratio_cell(
                ratio(times[which, slow, tokens], times[which, fast, tokens])
            )
            for slow, fast in PAIRS
            for tokens in lengths
            if (which, slow, tokens) in times
        }
        pairs = [f"{slow} / {fast}" for slow, fast in PAIRS]
        found.append(_table(f"{which}, ratio of times [95 %]", pairs, lengths, ratios, which))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the Markdown file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    cpus = pick_cpus(given.threads)
    machine = environment(given.threads, cpus)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(given.threads)
    times: dict[Cell, list[float]] = {}
    for length in given.lengths:
        times |= measure_ms(length, given.rounds)
    context = get_context("forkserver")  # imports once, and computes nothing that its children would inherit
    context.set_forkserver_preload(["compress.mixers.features", "compress.mixers.scan", "compress.report.tables"])
    peaks = {}
    for cell in times:
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            peaks[cell] = fresh.submit(peak_mb, cell, given.threads).result()
    text = "\n".join(f"**{table.title}**\n\n{as_markdown(table)}\n" for table in tables(times, peaks))
    text += (
        f"\n{machine['cpu']}, {given.threads} thread(s) pinned to CPU {cpus}, torch {torch.__version__}, float32, "
        f"{given.rounds} rounds in rotating turns, medians; {machine['busy_percent']:.0f} % busy before, commit "
        f"{machine['commit']}. The naive form was not run beyond {NAIVE_LIMIT} tokens.\n"
    )
    text += "".join(f"\n**Warning:** {warning}.\n" for warning in warnings_of(machine))
    print(text)
    if given.out:
        given.out.write_text(text, "utf-8")


def _normalised(
    inputs: Mapping[str, Tensor], scan: Callable[..., tuple[Tensor, Tensor]], log_decay_BTG: Tensor | None
) -> Tensor:
    q = FeatureMap("hedgehog", HEADS, HEAD_DIM)(inputs["q"])
    k = FeatureMap("hedgehog", GROUPS, HEAD_DIM)(inputs["k"])
    v = F.pad(inputs["v"], (0, 1), value=1.0)
    y_BTHV = scan(q, k, v, log_decay_BTG, rule="linear" if log_decay_BTG is None else "gated")[0]
    return y_BTHV[..., :-1] / (y_BTHV[..., -1:] + 1e-6)


def _table(
    title: str, columns: Collection[str], lengths: Sequence[int], cells: Mapping[Cell, str], which: str
) -> Table:
    rows = [(str(length), *(cells.get((which, name, length), "") for name in columns)) for length in lengths]
    return Table(title, ("tokens", *columns), tuple(rows))


def _ratio_cell(found: Ratio) -> str:
    return f"{found.median:.2f}× [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
