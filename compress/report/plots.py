"""The plots of a report: what each stage did to quality and to recall, and how time goes with the prompt's length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.pipeline.require import RESULT
from compress.report.figures import Figures, figures_of, stage_lines
from compress.report.tables import number
from compress.runner.record import RunRecord
from compress.stage import SOURCE

PANEL_INCHES = (4.6, 3.2)
STAGE_INCHES = 0.75
"""What a stage's name needs of a panel's width."""
WIDE = 20.0
"""The ratio of the largest to the smallest from which an axis is logarithmic."""
_COLOURS = ("#0b6e99", "#d98c21", "#7a4fa3", "#3f8f4f", "#b0413e", "#22333b")
_SOURCE_COLOUR = "#8c8c8c"
_QUALITY = (("perplexity", "perplexity"), ("kl", "KL to the source (nats per token)"))
_SPEED = (("ttft_ms", "time to first token (ms)", "prompt (tokens)"),
          ("tpot_ms", "time per token (ms)", "tokens before it"))  # fmt: skip
_RECALL = (
    ("mqar", "pairs recalled (MQAR)", "context (tokens)"), ("needle", "needle found", "context (tokens)"),
    ("perplexity", "perplexity of the next token", "tokens read before it"),
)  # fmt: skip


CAPTIONS = {
    "quality.png": "Quality after each stage where it was measured, with standard errors; lower is better",
    "recall.png": "What is remembered over longer contexts, with standard errors",
    "speed.png": "Median times on this machine by the length of the text, of the result and what it is compared with",
}
"""What each plot shows, by its file's name."""


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Write the plots that the figures allow to `folder` as PNG and return them."""
    folder.mkdir(exist_ok=True)
    figures = figures_of(record)
    stages = {SOURCE: figures[SOURCE], **{line.stage.id: line.measured for line in stage_lines(record)}}
    quality = [(name, words) for name, words in _QUALITY if sum(name in values for values in stages.values()) > 1]
    speed = [panel for panel in _SPEED if _by_length(figures.get(RESULT, {}), panel[0])]
    drawn = []
    if quality:
        count = max(sum(name in values for values in stages.values()) for name, _ in quality)
        figure, panels = _panels(len(quality), max(PANEL_INCHES[0], STAGE_INCHES * count))
        for panel, (name, words) in zip(panels, quality, strict=True):
            _draw_stages(panel, stages, name, words)
        drawn.append(_save(figure, folder / "quality.png"))
    remembering = {id_: values for id_, values in stages.items() if _by_length(values, "mqar")}
    if remembering:
        figure, panels = _panels(len(_RECALL))
        for panel, (name, words, over) in zip(panels, _RECALL, strict=True):
            _draw_recall(panel, remembering, name, words, over)
        _name_lines(figure)
        drawn.append(_save(figure, folder / "recall.png"))
    if speed:
        figure, panels = _panels(len(speed))
        for panel, (name, words, over) in zip(panels, speed, strict=True):
            _draw_lengths(panel, figures, record, name, words, over)
        _name_lines(figure)
        drawn.append(_save(figure, folder / "speed.png"))
    return drawn


def _draw_stages(panel: Any, stages: Mapping[str, Mapping[str, float]], name: str, words: str) -> None:
    """One point a stage, with its standard error and its number."""
    measured = {id_: values for id_, values in stages.items() if name in values}
    heights = [values[name] for values in measured.values()]
    errors = [values.get(f"{name}_se", 0.0) for values in measured.values()]
    panel.errorbar(range(len(measured)), heights, yerr=errors, marker="o", capsize=3, color=_COLOURS[0], lw=1.2)
    for place, height in enumerate(heights):
        panel.annotate(number(height), (place, height), (6, 5), textcoords="offset points", fontsize=8)
    panel.set_xticks(range(len(measured)), list(measured), rotation=25, ha="right", rotation_mode="anchor")
    panel.margins(x=0.12, y=0.15)
    if 0 < WIDE * min(heights) < max(heights):
        panel.set_yscale("log")
    panel.set_ylabel(words)


def _draw_lengths(panel: Any, figures: Figures, record: RunRecord, name: str, words: str, over: str) -> None:
    """One line a subject, over the length of the text."""
    stage_ids = {stage.id for stage in record.stages}
    others = sorted(figures.keys() - stage_ids - {SOURCE, RESULT})
    colours = iter(_COLOURS)
    for subject in (RESULT, SOURCE, *others):
        colour = _SOURCE_COLOUR if subject == SOURCE else next(colours)
        if points := _by_length(figures.get(subject, {}), name):
            lengths, values = zip(*points, strict=True)
            panel.plot(lengths, values, marker="o", label=subject, color=colour)
            _tick_lengths(panel, lengths)
    panel.set_xlabel(over)
    panel.set_ylabel(words)
    panel.margins(x=0.08)
    panel.set_ylim(0, 1.08 * max(max(line.get_ydata()) for line in panel.lines))


def _draw_recall(panel: Any, stages: Mapping[str, Mapping[str, float]], name: str, words: str, over: str) -> None:
    """One line a stage, over the length of the context, with standard errors."""
    colours = iter(_COLOURS * (1 + len(stages) // len(_COLOURS)))
    for id_, values in stages.items():
        lengths, heights = zip(*_by_length(values, name), strict=True)
        errors = [values[f"{name}@{length}_se"] for length in lengths]
        colour = _SOURCE_COLOUR if id_ == SOURCE else next(colours)
        panel.errorbar(lengths, heights, yerr=errors, marker="o", capsize=3, label=id_, color=colour)
        _tick_lengths(panel, lengths)
    panel.set_xlabel(over)
    panel.set_ylabel(words)
    panel.margins(x=0.08)
    if name != "perplexity":
        panel.set_ylim(-0.05, 1.05)
    if name == "mqar":
        chance = values["mqar_chance"]
        panel.axhline(chance, color="grey", linestyle=":")
        panel.annotate("guessing a value", (lengths[0], chance), (0, 3), textcoords="offset points", color="grey")


def _tick_lengths(panel: Any, lengths: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()


def _by_length(values: Mapping[str, float], name: str) -> list[tuple[int, float]]:
    matches = ((re.fullmatch(rf"{name}@(\d+)", key), value) for key, value in values.items())
    return sorted((int(match[1]), value) for match, value in matches if match)


def _panels(count: int, width: float = PANEL_INCHES[0]) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, PANEL_INCHES[1]), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _name_lines(figure: Any) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=130)
    return file
