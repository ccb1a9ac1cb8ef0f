"""Measured times as JSON, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact import Metrics
from compress.benchmarks.contest import SETTLE_SECONDS, Measured
from compress.benchmarks.environment import warnings_of
from compress.benchmarks.rounds import Round, resumed_after
from compress.benchmarks.timing import ratio, summarise
from compress.report.optional import drawing
from compress.report.tables import Table, as_markdown

READING = "prompt_tokens_per_s"
"""How fast a prompt is read: its tokens, in all rows, over the time to the first new one."""
_WORDS = {
    "ttft_ms": "time to first token, ms", READING: "prompt read, tokens/s", "tpot_ms": "time per token, ms",
    "latency_ms": "whole forward pass, ms",
    "load_ms": "loading, ms", "peak_rss_mb": "peak memory, MB", "size_mb": "on disk, MB",
}  # fmt: skip
_WIDE = 10.0
"""The ratio of the axis' ends from which times over prompt lengths are drawn on a logarithmic one."""
_COLOURS = ("#0b6e99", "#8c8c8c", "#d98c21", "#7a4fa3", "#3f8f4f", "#b0413e")


def assemble(
    measured: Mapping[str, Measured], environment: Mapping[str, Any], folders: Mapping[str, Path]
) -> dict[str, Any]:
    """Everything that was seen. Ratios are of the first model to each other one, round by round."""
    first, *others = measured
    return {
        "environment": {**environment, "pinned": all(one.pinned for one in measured.values())},
        "warnings": warnings_of(environment),
        "method": {
            "interleaved": len(measured) > 1, "idle_ms_between_turns": SETTLE_SECONDS * 1e3, "warm_up_rounds": 1,
            "rounds": max(len(rounds) for one in measured.values() for rounds in one.samples.values()),
            "loading": "once, from the page cache", "memory": "VmHWM of the process: Python, runtime and model",
        },
        "subjects": {name: _subject(one, folders[name]) for name, one in measured.items()},
        "ratios": {other: _ratios(measured[first], measured[other]) for other in others},
    }  # fmt: skip


def with_history(found: Mapping[str, Any], seen: Sequence[Round]) -> dict[str, Any]:
    """`found` with what is to be said of rounds that earlier processes measured, where there are any."""
    if not (resumed := resumed_after(seen)):
        return dict(found)
    warnings = dict.fromkeys([*(warning for each in seen for warning in each.warnings), *found["warnings"]])
    method = {**found["method"], "warm_up_rounds": 1 + len(resumed), "resumed_after_rounds": resumed}
    return {**found, "warnings": list(warnings), "method": method}


def metrics(found: Mapping[str, Any]) -> Metrics:
    """The figures that `require` and the run's table read: medians by subject."""
    return {
        name: {figure: summary["median"] for figure, summary in subject["figures"].items()}
        | _reading(subject["figures"])
        | {figure: subject[figure] for figure in ("peak_rss_mb", "load_ms")}
        for name, subject in found["subjects"].items()
    }


def table(found: Mapping[str, Any]) -> Table:
    """Medians with 90th percentiles, and the first model's ratio to each other one with its 95 % interval."""
    subjects, ratios = found["subjects"], found["ratios"]
    first = next(iter(subjects))
    rows = []
    for figure in subjects[first]["figures"]:
        cells = [_cell(subject["figures"].get(figure)) for subject in subjects.values()]
        rows.append((_title(figure), *cells, *(_ratio_cell(ratios[other].get(figure)) for other in ratios)))
    speeds = [_reading(subject["figures"]) for subject in subjects.values()]
    for figure, ours in speeds[0].items():
        cells = [f"{each[figure]:.4g}" if figure in each else "" for each in speeds]
        shares = [f"{ours / each[figure]:.2f}×" if figure in each else "" for each in speeds[1:]]
        rows.append((_title(figure), *cells, *shares))
    for figure in ("load_ms", "peak_rss_mb", "size_mb"):
        values = [subject[figure] for subject in subjects.values()]
        shares = [f"{values[0] / value:.2f}×" for value in values[1:]]
        rows.append((_WORDS[figure], *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values), *shares))
    columns = ("median (p90)", *subjects, *(f"{first} / {other}" for other in ratios))
    return Table("measured on this machine", columns, tuple(rows))


def markdown(found: Mapping[str, Any]) -> str:
    """The table, the machine and what to beware of."""
    return f"{as_markdown(table(found)).rstrip()}\n\n{footnote(found)}\n"


def footnote(found: Mapping[str, Any]) -> str:
    """Where and how it was measured, and why the figures may be off."""
    machine, method = found["environment"], found["method"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load_average"]
    text = (
        f"{machine['cpu']}, {machine['threads']} thread(s) "
        f"{'pinned to' if machine['pinned'] else 'not pinned, meant for'} CPU {machine['cpus']}, {machine['runtime']}, "
        f"{method['rounds']} rounds in rotating turns, one process a model{_resumed(method)}. Ratios are medians over "
        f"rounds with 95 % bootstrap intervals. Load average before: {f'{load[0]:.2f}' if load else 'unknown'}. "
        f"{versions}."
    )
    return "\n\n".join([text, *(f"**Warning:** {warning}." for warning in found["warnings"])])


def _resumed(method: Mapping[str, Any]) -> str:
    after = ", ".join(map(str, method.get("resumed_after_rounds", ())))
    return f" (stopped after round {after}, and gone on with in new processes, warmed up again)" if after else ""


@drawing
def plot(found: Mapping[str, Any], file: Path) -> None:
    """Medians over prompt length, whiskers from the 10th to the 90th percentile; one panel a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subjects = found["subjects"]
    names = {figure for subject in subjects.values() for figure in subject["figures"]}
    kinds = [kind for kind in ("ttft_ms", "tpot_ms", "latency_ms") if any(name.startswith(kind) for name in names)]
    figure = Figure(figsize=(5.2 * len(kinds), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        ticks: set[int] = set()
        for (name, subject), colour in zip(subjects.items(), _COLOURS, strict=False):
            for batch, points in _curves(subject["figures"], kind).items():
                tokens, medians, low, high = (np.array(column) for column in zip(*points, strict=True))
                label = name if batch == 1 else f"{name}, batch {batch}"
                axes.errorbar(
                    tokens, medians, [medians - low, high - medians], label=label, color=colour, marker="o",
                    markersize=5, linewidth=1.8, capsize=3, linestyle="-" if batch == 1 else "--",
                )  # fmt: skip
                ticks.update(tokens.tolist())
        _dress(axes, kind, sorted(ticks))
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=min(3, len(handles)), frameon=False,
        fontsize=9,
    )  # fmt: skip
    figure.savefig(file, dpi=130)


def _dress(axes: Any, kind: str, ticks: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.margins(x=0.12)
    low, high = axes.get_ylim()
    if kind == "tpot_ms" or high < _WIDE * low:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()  # last: a logarithmic scale brings its own, with labels
    axes.set_xlabel("tokens in the context" if kind == "tpot_ms" else "tokens in the prompt")
    axes.set_title(f"{_WORDS[kind]} (median, whiskers p10–p90)", loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(figures: Mapping[str, Any], kind: str) -> dict[int, list[tuple[float, ...]]]:
    """(tokens, median, p10, p90) by batch size."""
    curves: dict[int, list[tuple[float, ...]]] = {}
    for figure, summary in figures.items():
        what, tokens, batch, chunk = _parse(figure)
        if what == kind and not chunk:
            point = tokens, summary["median"], summary["p10"], summary["p90"]
            curves.setdefault(batch, []).append(point)
    return {batch: sorted(points) for batch, points in curves.items()}


def _subject(one: Measured, folder: Path) -> dict[str, Any]:
    weights = [file for file in folder.iterdir() if (file.is_file() and ".onnx" in file.name) or file.suffix == ".data"]
    return {
        "folder": folder.name, "kind": one.kind, "load_ms": one.load_ms, "peak_rss_mb": one.peak_rss_mb,
        "rss_before_load_mb": one.rss_before_load_mb, "size_mb": sum(file.stat().st_size for file in weights) / 1e6,
        "figures": {
            figure: summarise([time for times in rounds for time in times]).as_dict()
            | {"round_medians": _round_medians(rounds)}
            for figure, rounds in one.samples.items()
        },
    }  # fmt: skip


def _ratios(ours: Measured, theirs: Measured) -> dict[str, Any]:
    return {
        figure: ratio(_round_medians(rounds), _round_medians(theirs.samples[figure])).as_dict()
        for figure, rounds in ours.samples.items()
        if figure in theirs.samples
    }


def _round_medians(rounds: list[list[float]]) -> list[float]:
    return [float(np.median(times)) for times in rounds]


def _reading(figures: Mapping[str, Any]) -> dict[str, float]:
    """How many tokens of each prompt are read in a second, in the chunks that the folder says."""
    found = {}
    for figure, summary in figures.items():
        what, tokens, batch, chunk = _parse(figure)
        if what == "ttft_ms" and not chunk:
            found[figure.replace(what, READING)] = 1e3 * tokens * batch / summary["median"]
    return found


def _parse(figure: str) -> tuple[str, int, int, int]:
    """(what, tokens, rows, tokens of a chunk or 0) of a figure's name."""
    what, _, place = figure.partition("@")
    tokens, *others = place.split(",")
    known = dict(other.split("=") for other in others)
    return what, int(tokens), int(known.get("batch", 1)), int(known.get("chunk", 0))


def _title(figure: str) -> str:
    what, tokens, batch, chunk = _parse(figure)
    rows = f" × {batch} rows" if batch != 1 else ""
    return f"{_WORDS[what]} @ {tokens}{rows}" + (f" in chunks of {chunk}" if chunk else "")


def _cell(summary: Mapping[str, float] | None) -> str:
    return f"{summary['median']:.4g} ({summary['p90']:.4g})" if summary else ""


def _ratio_cell(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.2f}× [{found['low']:.2f}, {found['high']:.2f}]" if found else ""
