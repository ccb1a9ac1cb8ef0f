"""What a training leaves in its artifact: `history.json`, the loss curve and the TensorBoard events."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.artifact import write_json
from compress.report.optional import drawing

Entry = Mapping[str, float]

_TIMES = ("runtime", "samples_per_second", "steps_per_second", "epoch")


def write_record(log: Sequence[Entry], best_step: int, events: Path, out: Path) -> None:
    """Write `history.json`, `loss.png` and `tensorboard/` to `out`, given Trainer's log and its event files."""
    train = [_figures(entry) for entry in log if "loss" in entry]
    evaluations = [_figures(entry) for entry in log if "eval_loss" in entry]
    write_json(out / "history.json", {"best_step": best_step, "train": train, "eval": evaluations})
    plot_loss(train, evaluations, best_step, out / "loss.png")
    if events.is_dir():
        shutil.copytree(events, out / events.name, dirs_exist_ok=True)


@drawing
def plot_loss(train: Sequence[Entry], evaluations: Sequence[Entry], best_step: int, file: Path) -> None:
    """The training loss per step, and the loss on the eval split with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in train], [entry["loss"] for entry in train], lw=0.8, label="train")
    axes.errorbar(
        [entry["step"] for entry in evaluations], [entry["loss"] for entry in evaluations],
        yerr=[entry["loss_se"] for entry in evaluations], marker="o", capsize=3, label="eval split",
    )  # fmt: skip
    axes.axvline(best_step, color="grey", ls=":", label="kept")
    axes.set_xlabel("optimiser step")
    axes.locator_params(axis="x", integer=True)
    in_nats = any({"kl", "ce"} & entry.keys() for entry in evaluations)
    axes.set_ylabel("loss (nats per token)" if in_nats else "loss")
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _figures(entry: Entry) -> dict[str, float]:
    named = {name.removeprefix("eval_"): value for name, value in entry.items()}
    return {name: value for name, value in named.items() if name not in _TIMES}
