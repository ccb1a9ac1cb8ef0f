"""Pictures of what was pruned: the score of each layer, and how much of the scores narrower layers keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from compress.report.optional import drawing
from compress.stages.prune.scores import Choice

KEPT, DROPPED, LATER = "#a9b8c9", "#d1495b", "#22333b"
WIDE = 20.0
"""The ratio of the largest score to the smallest from which the axis is logarithmic."""


@drawing
def plot_scores(choice: Choice, num_layers: int, path: Path) -> None:
    """Draw the first round's scores of `choice` as bars, the last round's as points, to a PNG at `path`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first, last = choice.rounds[0], choice.rounds[-1]
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(list(first), list(first.values()), color=[DROPPED if i in choice.dropped else KEPT for i in first])
    legend: list[object] = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="dropped")]
    if last is not first:
        label = "at the last removal"
        legend += axes.plot(list(last), list(last.values()), "o", color=LATER, markersize=3.5, label=label)
    if 0 < WIDE * min(first.values()) < max(first.values()):
        axes.set_yscale("log")
    dropped = ", ".join(map(str, choice.dropped))
    title = f"{len(choice.dropped)} of {num_layers} layers dropped: {dropped}"
    axes.set_title(title, loc="left", fontsize=11, wrap=True)
    axes.set_xlabel(f"layer  (scored on {choice.num_tokens:,} tokens)")
    axes.set_ylabel(fill(choice.measure, 40), fontsize=8)
    axes.set_xticks(range(0, num_layers, 1 + num_layers // 40))
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(handles=legend, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


@drawing
def plot_shares(shares: Mapping[str, Sequence[float]], measure: str, path: Path) -> None:
    """Draw, layer by layer, what share of the sum of scores stays of each dimension, to a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for dimension, values in shares.items():
        if dimension == "hidden":
            axes.axhline(100 * values[0], linestyle="--", color=LATER, linewidth=1.2, label="hidden, whole model")
        else:
            label = dimension.replace("_", " ")
            axes.plot(range(len(values)), [100 * value for value in values], "o-", markersize=3.5, label=label)
    axes.set_title(f"Importance that stays: {measure}", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("share of the sum of scores, %", fontsize=8)
    axes.set_ylim(0, 104)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
