"""What to cut first: quality of models that were cut in different places, over what each of their tokens takes.

    python -m compress.benchmarks.first_cut ARMS.json --times BENCH.json --source FOLDER --plot first-cut.png

BENCH.json is what `compress bench --json` measured of the exports, in turns; FOLDER the source's export there.
ARMS.json has, by an arm's name, the folder of its export and what `compress eval --against SOURCE --json` measured:
`{"vocabulary": {"timed": "03-export-onnx-…", "judged": {"a novel": "novel.json"}}}`. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.benchmarks.timing import Ratio, ratio
from compress.report.optional import drawing
from compress.report.tables import Table, as_markdown

FIGURE = "tpot_ms@128"


def arms_of(described: Mapping[str, Any], times: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """By name: the ratio of times, MB of the export, and (ratio of bits per byte, its standard error) by text."""
    subjects = times["subjects"]
    found = {}
    for name, arm in described.items():
        own, base = (subjects[folder]["figures"][FIGURE]["round_medians"] for folder in (arm["timed"], source))
        judged = {text: _judged(json.loads(Path(file).read_text("utf-8"))) for text, file in arm["judged"].items()}
        found[name] = {"time": ratio(own, base), "size_mb": subjects[arm["timed"]]["size_mb"], "judged": judged}
    return found


def _judged(evaluated: Mapping[str, Any]) -> tuple[float, float]:
    """Of the model that was asked about; the one that it was held against has no ratio."""
    (figures,) = (each for each in evaluated["figures"].values() if "bits_per_byte_ratio" in each)
    return figures["bits_per_byte_ratio"], figures["bits_per_byte_ratio_se"]


def table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each arm, the best on the first text first."""
    texts = list(next(iter(arms.values()))["judged"])
    ranked = sorted(arms, key=lambda name: arms[name]["judged"][texts[0]])
    rows = []
    for name in ranked:
        time: Ratio = arms[name]["time"]
        judged = (f"{value:.3f} ± {error:.3f}" for value, error in arms[name]["judged"].values())
        timed = f"{time.median:.2f}× [{time.low:.2f}, {time.high:.2f}]"
        rows.append((name, timed, f"{arms[name]['size_mb']:.1f}", *judged))
    return Table("", ("what was cut", f"{FIGURE} over the source's", "MB", *texts), tuple(rows))


@drawing
def plot(arms: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Ratio of bits per byte over the ratio of times, a panel a text, whiskers of one standard error and 95 %."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = list(next(iter(arms.values()))["judged"])
    figure = Figure(figsize=(4.8 * len(texts), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for name, arm in arms.items():
            time: Ratio = arm["time"]
            value, error = arm["judged"][text]
            across = [[time.median - time.low], [time.high - time.median]]
            axes.errorbar([time.median], [value], [error], across, marker="o", capsize=3, label=name)
        axes.set_title(f"bits per byte over the source's: {text}", loc="left", fontsize=10)
        axes.set_xlabel("time of a token over the source's in the same format")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path)
    parser.add_argument("--times", type=Path, required=True)
    parser.add_argument("--source", required=True, help="the source's export, as BENCH.json calls it")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    described, times = (json.loads(file.read_text("utf-8")) for file in (args.arms, args.times))
    arms = arms_of(described, times, args.source)
    print(as_markdown(table(arms)))
    if args.plot is not None:
        plot(arms, args.plot)


if __name__ == "__main__":
    main()
