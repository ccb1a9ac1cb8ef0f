"""What fake quantisation costs in training: one step with it, against the same step without it.

    python -m compress.benchmarks.qat_step MODEL_FOLDER --schemes w4-block32 w8a8-dynamic --threads 2

A step is a teacher's forward pass, the student's, KL between them, backward and AdamW, on random tokens. All students
take turns, step by step, in rotating order, so that what else the machine does reaches all alike; ratios are medians
over rounds with bootstrap intervals. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.benchmarks.environment import environment, pick_cpus
from compress.benchmarks.timing import ratio, summarise
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.modules import weight_of
from compress.quant.rounding import quantize
from compress.quant.schemes import ACCURACY_LEVEL, SCHEMES
from compress.quant.targets import all_targets
from compress.quant.trained import FakeQuantisation
from compress.report.tables import Table, as_markdown
from compress.train.objective import Objective, Said
from compress.train.options import LossWeights

PLAIN = "float32 weights"
_OBJECTIVE = Objective(LossWeights.model_validate({}), 1.0, "cosine")


def student(folder: Path, scheme: str) -> Any:
    """The model to train; its weights rounded to nearest in `scheme` are where fake quantisation starts."""
    model = load_model(folder)
    if scheme != PLAIN:
        targets = all_targets(Parts(model), SCHEMES[scheme])
        weights = {target.name: weight_of(target.module).clone() for target in targets}
        tensors = {target.name: quantize(weights[target.name], target.scheme) for target in targets}
        FakeQuantisation(model, tensors, weights, "both", ACCURACY_LEVEL)
    return model.train()


def step_of(model: Any, teacher: Any, ids_BT: Tensor, *, bf16: bool) -> Callable[[], float]:
    """One optimiser step of `model`; returns its seconds."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    batch = {"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1)}
    mixed = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()

    def step() -> float:
        started = time.perf_counter()
        with mixed:
            with torch.no_grad():
                told = Said(teacher(ids_BT, use_cache=False).logits, True)
            loss = _OBJECTIVE.total(Said(model(ids_BT, use_cache=False).logits, True), told, batch) / ids_BT.numel()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def rounds_of(steps: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, after one round that does not count."""
    names, times_ms = list(steps), {name: list[float]() for name in steps}
    for number in range(-1, num_rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = steps[name]()
            if number >= 0:
                times_ms[name].append(1e3 * seconds)
    return times_ms


def table(times_ms: dict[str, list[float]]) -> Table:
    """Median, spread and the ratio to the step without fake quantisation."""
    rows = []
    for name, each in times_ms.items():
        found, against = summarise(each), ratio(each, times_ms[PLAIN])
        cell = "" if name == PLAIN else f"{against.median:.2f}× [{against.low:.2f}, {against.high:.2f}]"
        rows.append((name, f"{found.median:.0f}", f"{found.p10:.0f}–{found.p90:.0f}", cell))
    return Table("", ("student", "ms a step, median", "p10–p90", "against the plain step"), tuple(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("--schemes", nargs="+", default=["w4-block32", "w2-block32", "w8a8-dynamic"], choices=SCHEMES)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    machine = environment(given.threads, pick_cpus(given.threads))
    teacher = load_model(given.model)
    torch.manual_seed(0)
    ids_BT = torch.randint(teacher.config.vocab_size, (given.batch_size, given.sequence_length))
    bf16 = given.precision == "bf16"
    steps = {
        name: step_of(student(given.model, name), teacher, ids_BT, bf16=bf16) for name in (PLAIN, *given.schemes)
    }
    print(as_markdown(table(rounds_of(steps, given.rounds))))
    print(
        f"\n{given.model.name}, {given.batch_size} × {given.sequence_length} tokens, {given.precision}, {given.rounds} "
        f"rounds, {given.threads} thread(s), {machine['cpu']}, {machine['busy_percent']:.0f} % busy before, torch "
        f"{machine['versions']['torch']}, commit {machine['commit']}."
    )


if __name__ == "__main__":
    main()
