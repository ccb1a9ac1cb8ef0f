"""The plots of a report: what each stage did to quality and to recall, and how time goes with the prompt's length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.pipeline.require import RESULT
from compress.report.figures import Figures, figures_of, stage_lines
from compress.runner.record import RunRecord
from compress.stage import SOURCE

PANEL_INCHES = (4.6, 3.2)
_QUALITY = (("perplexity", "perplexity"), ("kl", "KL to the source (nats per token)"))
_SPEED = (("ttft_ms", "time to first token (ms)"), ("tpot_ms", "time per token (ms)"))
_RECALL = (
    ("mqar", "pairs recalled (MQAR)", "context (tokens)"), ("needle", "needle found", "context (tokens)"),
    ("perplexity", "perplexity of the next token", "tokens read before it"),
)  # fmt: skip


def draw(record: RunRecord, folder: Path) -> list[Path]:
    """Write the plots that the figures allow to `folder` as PNG and return them."""
    folder.mkdir(exist_ok=True)
    figures = figures_of(record)
    stages = {SOURCE: figures[SOURCE], **{line.stage.id: line.measured for line in stage_lines(record)}}
    quality = [(name, words) for name, words in _QUALITY if sum(name in values for values in stages.values()) > 1]
    speed = [(name, words) for name, words in _SPEED if _by_length(figures.get(RESULT, {}), name)]
    drawn = []
    if quality:
        figure, panels = _panels(len(quality))
        for panel, (name, words) in zip(panels, quality, strict=True):
            _draw_stages(panel, stages, name, words)
        drawn.append(_save(figure, folder / "quality.png"))
    remembering = {id_: values for id_, values in stages.items() if _by_length(values, "mqar")}
    if remembering:
        figure, panels = _panels(len(_RECALL))
        for panel, (name, words, over) in zip(panels, _RECALL, strict=True):
            _draw_recall(panel, remembering, name, words, over)
        drawn.append(_save(figure, folder / "recall.png"))
    if speed:
        figure, panels = _panels(len(speed))
        for panel, (name, words) in zip(panels, speed, strict=True):
            _draw_lengths(panel, figures, record, name, words)
        drawn.append(_save(figure, folder / "speed.png"))
    return drawn


def _draw_stages(panel: Any, stages: Mapping[str, Mapping[str, float]], name: str, words: str) -> None:
    """One point a stage, with its standard error."""
    measured = {id_: values for id_, values in stages.items() if name in values}
    heights = [values[name] for values in measured.values()]
    errors = [values.get(f"{name}_se", 0.0) for values in measured.values()]
    panel.errorbar(range(len(measured)), heights, yerr=errors, marker="o", capsize=3)
    panel.set_xticks(range(len(measured)), list(measured), rotation=20, ha="right")
    panel.set_ylabel(words)


def _draw_lengths(panel: Any, figures: Figures, record: RunRecord, name: str, words: str) -> None:
    """One line a subject, over the length of the prompt."""
    stage_ids = {stage.id for stage in record.stages}
    for subject in sorted(set(figures) - stage_ids, key=lambda subject: (subject != SOURCE, subject)):
        points = _by_length(figures[subject], name)
        if points:
            lengths, values = zip(*points, strict=True)
            panel.plot(lengths, values, marker="o", label=subject)
            _tick_lengths(panel, lengths)
    panel.set_xlabel("prompt (tokens)")
    panel.set_ylabel(words)
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _draw_recall(panel: Any, stages: Mapping[str, Mapping[str, float]], name: str, words: str, over: str) -> None:
    """One line a stage, over the length of the context, with standard errors."""
    for id_, values in stages.items():
        lengths, heights = zip(*_by_length(values, name), strict=True)
        errors = [values[f"{name}@{length}_se"] for length in lengths]
        panel.errorbar(lengths, heights, yerr=errors, marker="o", capsize=3, label=id_)
        _tick_lengths(panel, lengths)
    panel.set_xlabel(over)
    panel.set_ylabel(words)
    if name == "perplexity":
        panel.legend(frameon=False)
    else:
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


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES[0] * count, PANEL_INCHES[1]), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=130)
    return file
