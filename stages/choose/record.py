"""What was seen of every candidate, as JSON, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.artifact import write_json
from compress.benchmarks.report import footnote
from compress.hardware import VECTOR_FLAGS
from compress.report.optional import drawing
from compress.report.tables import Table, as_markdown, number
from compress.stages.choose.choice import Candidate, Choice

QUALITY = {
    "perplexity_ratio": "perplexity ×", "kl": "KL", "top1_agreement": "top-1 agreement", "cosine": "cosine",
}  # fmt: skip
"""The figures that compare a candidate with the reference: of those measured, the first is drawn."""

_LINE = 0.055
"""The height of a name in a panel, as a share of the panel's."""


def write_record(choice: Choice, found: Mapping[str, Any], out: Path) -> str:
    """Write `formats.json`, `formats.md` and `formats.png` to `out`; what was chosen, where and why, in a sentence.

    found: as `latency.json` holds it.
    """
    flags = [flag for flag in found["environment"]["cpu_flags"] if flag.startswith(VECTOR_FLAGS)]
    why = " + ".join(f"{weight:g} {phase}" for phase, weight in choice.weights.items() if weight)
    best = choice.best
    sentence = (
        f"{best.name} takes least of what is within the budget: {number(choice.cost_ms(best))} ms for {why} "
        f"on {found['environment']['cpu']} ({' '.join(flags) or 'no vector instructions known'})"
    )
    write_json(out / "formats.json", {
        "chosen": best.name, "why": sentence, "weights": dict(choice.weights), "warnings": list(choice.warnings),
        "vector_flags": flags, "candidates": {each.name: _as_json(each, choice) for each in choice.candidates},
        "latency": found,
    })  # fmt: skip
    warnings = [f"**{warning}.**" for warning in choice.warnings]
    text = "\n\n".join([as_markdown(table(choice)), f"Chosen: {sentence}.", *warnings, footnote(found)])
    (out / "formats.md").write_text(text + "\n", "utf-8")
    plot(choice, out / "formats.png")
    return sentence


def table(choice: Choice) -> Table:
    """One line a candidate: size, time of each phase, what it costs beside the best one, quality and verdicts."""
    phases = list(choice.best.rounds_ms)
    quality = [name for name in QUALITY if name in choice.best.figures]
    rows = []
    for each in choice.candidates:
        times = choice.ratio(each)
        rows.append((
            f"**{each.name}**" if each is choice.best else each.name, number(each.size_mb),
            *(number(each.ms(phase)) for phase in phases), f"{times.median:.2f}× [{times.low:.2f}, {times.high:.2f}]",
            *(_with_error(each.figures, name) for name in quality),
            "; ".join(verdict.sentence for verdict in each.verdicts if not verdict.met) or "within",
        ))  # fmt: skip
    columns = ("", "MB", *(f"{phase} (ms)" for phase in phases), "time beside the best", *map(QUALITY.get, quality))
    return Table("formats", (*map(str, columns), "budget"), tuple(rows))


@drawing
def plot(choice: Choice, file: Path) -> None:
    """Size against time, one panel a phase; the colour is what quality it costs, the ring is the chosen one."""
    from matplotlib.figure import Figure

    phases = list(choice.best.rounds_ms)
    quality = next(name for name in QUALITY if name in choice.best.figures)
    values = [each.figures[quality] for each in choice.candidates]
    figure = Figure(figsize=(4.6 * len(phases) + 1, 3.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=True):
        sizes, times = [each.size_mb for each in choice.candidates], [each.ms(phase) for each in choice.candidates]
        dots = axes.scatter(
            sizes, times, c=values, cmap="viridis", s=60, zorder=2,
            vmin=min(values), vmax=max(values) if max(values) > min(values) else min(values) + 1e-3,
        )  # fmt: skip
        axes.plot(choice.best.size_mb, choice.best.ms(phase), "o", markersize=15, fillstyle="none", color="#b0413e")
        top, height = 1.15 * max(times), 0.0
        for ms, size, each in sorted(zip(times, sizes, choice.candidates, strict=True), key=lambda dot: dot[0]):
            height = max(ms, height + _LINE * top)  # names stand beside the panel, one above the other
            axes.annotate(
                each.name if each.is_good else f"({each.name})", (size, ms), (1.02, height), va="center", fontsize=8,
                textcoords=axes.get_yaxis_transform(), arrowprops={"arrowstyle": "-", "color": "0.8", "lw": 0.7},
            )  # fmt: skip
        axes.set(xlabel="weights and graph (MB)", ylim=(0, top))
        axes.set_title(f"{phase}: ms (ringed: chosen; in brackets: beyond the budget)", loc="left", fontsize=9)
        axes.margins(x=0.2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(dots, ax=panels, label=QUALITY[quality])
    figure.savefig(file)


def _as_json(each: Candidate, choice: Choice) -> dict[str, Any]:
    return {
        "size_mb": each.size_mb, "within_budget": each.is_good, "figures": dict(each.figures),
        "ms": {phase: each.ms(phase) for phase in each.rounds_ms}, "cost_ms": choice.cost_ms(each),
        "ratio_to_chosen": choice.ratio(each).as_dict(), "verdicts": [verdict.sentence for verdict in each.verdicts],
    }  # fmt: skip


def _with_error(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.4f} ± {figures[f'{name}_se']:.4f}"
