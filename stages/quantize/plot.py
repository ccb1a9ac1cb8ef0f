"""A picture of the errors: one row for each kind of projection, one column for each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from compress.report.optional import drawing

LAYER = re.compile(r"^(?:.*\.)?(\d+)\.(.+)\.weight$")
"""(layer, path within the layer) of a projection's name."""


@drawing
def plot_errors(errors: Mapping[str, float], rounding: Mapping[str, float], path: Path) -> None:
    """Draw relative mean square errors by layer, a line for each kind of projection, to a PNG at `path`.

    rounding: those of rounding the activations alone; drawn below where there are any.
    """
    from matplotlib.figure import Figure

    panels = [("of the output, weights rounded", errors)]
    if rounding:
        panels.append(("of the output, activations rounded", rounding))
    figure = Figure(figsize=(9, 3.4 * len(panels)), dpi=120, layout="constrained")
    for row, (label, values) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        for kind, by_layer in _by_kind(values).items():
            axes.plot(list(by_layer), list(by_layer.values()), "o-", markersize=3, linewidth=1, label=kind)
        axes.set_yscale("log")
        axes.set_title(f"error {label}", loc="left", fontsize=11)
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("relative mean square error", fontsize=8)
        axes.tick_params(which="both", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def _by_kind(values: Mapping[str, float]) -> dict[str, dict[int, float]]:
    kinds: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        if match := LAYER.match(name):
            kinds.setdefault(match[2], {})[int(match[1])] = value
    return kinds
