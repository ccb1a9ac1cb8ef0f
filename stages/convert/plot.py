"""Pictures of a conversion: each layer's score, and how each layer's mixer came to be like its attention."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from compress.report.optional import drawing
from compress.stages.convert.choose import Choice
from compress.train.align import Aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, CONVERTED = "#a9b8c9", "#2a9d8f"
WIDE = 20.0
"""The ratio of the largest score to the smallest from which the axis is logarithmic."""


@drawing
def plot_scores(choice: Choice, path: Path) -> None:
    """Draw the scores of `choice` as bars, the converted layers marked, to a PNG at `path`."""
    figure, axes = _axes()
    scores, layers = choice.scores, sorted(choice.scores)
    colours = [CONVERTED if index in choice.converted else KEPT for index in layers]
    axes.bar(layers, [scores[index] for index in layers], color=colours)
    if 0 < WIDE * min(scores.values()) < max(scores.values()):
        axes.set_yscale("log")
    axes.set_title(f"{len(choice.converted)} of {len(layers)} layers converted", loc="left", fontsize=11)
    axes.set_xlabel(f"layer  (scored on {choice.num_tokens:,} tokens)")
    axes.set_ylabel(fill(choice.measure, 40), fontsize=8)
    axes.set_xticks(layers[:: 1 + len(layers) // 40])
    axes.grid(axis="y", alpha=0.25)
    _legend(axes)
    figure.savefig(path)


@drawing
def plot_alignment(aligned: Aligned, converted: Collection[int], path: Path) -> None:
    """Draw each layer's loss over the steps, those of the converted layers marked, to a PNG at `path`."""
    figure, axes = _axes()
    steps = [entry["step"] for entry in aligned.log]
    for index in aligned.losses:
        colour = CONVERTED if index in converted else KEPT
        axes.plot(steps, [entry[f"loss_{index}"] for entry in aligned.log], color=colour, lw=0.7)
    axes.set_yscale("log")
    axes.set_title("alignment, one line a layer", loc="left", fontsize=11)
    axes.set_xlabel("optimiser step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("‖mixer − attention‖² / ‖attention‖²", fontsize=8)
    axes.grid(alpha=0.25)
    _legend(axes)
    figure.savefig(path)


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=CONVERTED, label="converted"), Patch(color=KEPT, label="kept")]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
