"""A run's results as tables of text: made once, shown by the command line and written into reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compress.pipeline.require import DISTANCES, RESULT
from compress.report.figures import Figures, figures_of, stage_lines
from compress.runner.record import RunRecord
from compress.stage import SOURCE

_LABELS = {
    "perplexity": ("perplexity", ""),
    "bits_per_byte": ("bits per byte of text", ""),
    "kl": ("KL to the source", "nats"),
    "top1_agreement": ("top-1 agreement", ""),
    "cosine": ("cosine to the source", ""),
    "mqar": ("pairs recalled (MQAR) over", ""),
    "needle": ("needle found in", ""),
    "size_mb": ("weights on disk", "MB"),
    "parameters": ("parameters", "M"),
    "ttft_ms": ("first token, prompt of", "ms"),
    "prompt_tokens_per_s": ("prompt read, of", "tokens/s"),
    "tpot_ms": ("each token, after", "ms"),
    "latency_ms": ("whole forward pass, of", "ms"),
    "peak_rss_mb": ("peak memory", "MB"),
    "state_mb": ("state of one sequence", "MB"),
    "kv_cache_mb": ("KV cache of one sequence of", "MB"),
    "load_ms": ("load time", "ms"),
}
"""The figures that tables show, in this order (quality, size, time, memory): what they are called, and their unit."""
_SCALE = {"parameters": 1e-6}
_STAGE_LABELS = {
    "parameters": "params (M)", "size_mb": "MB", "perplexity": "perplexity", "bits_per_byte": "bits/byte",
    "kl": "KL", "top1_agreement": "top-1", "cosine": "cosine",
}  # fmt: skip
"""The same for the table of stages, which is wide."""
_RECALL_LABELS = {
    "mqar": "MQAR: next token right", "mqar_choice": "MQAR: right among the values", "mqar_logprob": "MQAR: log p",
    "needle": "needle: all digits right", "needle_logprob": "needle: log p", "perplexity": "perplexity",
}  # fmt: skip
_RECALL_NAME = re.compile(rf"(?P<task>{'|'.join(_RECALL_LABELS)})@(?P<length>\d+)(?P<depth>,depth=[\d.e-]+)?")
_NAME = re.compile(r"(?P<base>\w+?)(?:@(?P<tokens>\d+)(?P<rest>,batch=\d+)?)?")


@dataclass(frozen=True)
class Table:
    """A title, a heading for each column, and rows of cells.

    num_words: so many columns, the first ones, hold words; the others figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    num_words: int = 1


def result_table(record: RunRecord) -> Table:
    """The original and the result side by side, with what else was measured beside them."""
    figures = figures_of(record)
    stage_ids = {stage.id for stage in record.stages}
    known = {subject for subject, values in figures.items() if any(_order(name) is not None for name in values)}
    others = sorted(known - {SOURCE, RESULT} - stage_ids)
    subjects = (SOURCE, *others, RESULT)
    rows = [(*row, _ratio(figures, name)) for name, row in _rows(figures, subjects)]
    title = f"{record.name}: {record.source.name}"
    return Table(title, ("", *subjects, "ratio"), tuple(rows), _judged_on(figures[RESULT]))


def stages_table(record: RunRecord) -> Table:
    """What each stage made of the model: one line a stage."""
    source = figures_of(record)[SOURCE]
    lines: list[tuple[str, Mapping[str, float], str]] = [(SOURCE, source, "")]
    for line in stage_lines(record):
        lines.append((line.stage.id, line.measured, duration(line.seconds)))
    names = [name for name in _STAGE_LABELS if any(name in values for _, values, _ in lines)]
    rows = tuple((id_, *(_value(values, name) for name in names), seconds) for id_, values, seconds in lines)
    title = _stages_title(names)
    note = "What each stage that writes a model made of it. Empty: not measured there."
    return Table(title, ("", *(_STAGE_LABELS[name] for name in names), "took"), rows, note)


def costs_table(record: RunRecord) -> Table:
    """What each stage took, measurements and hidden ones too, beside what was estimated before."""
    rows = [
        (stage.id, duration(stage.seconds), duration(stage.estimated.get("seconds")), _megabytes(stage.peak_rss_mb),
         _megabytes(stage.estimated.get("ram_mb")))
        for stage in record.stages
    ]  # fmt: skip
    columns = ("", "took", "estimated", "peak memory (MB)", "estimated (MB)")
    note = (
        "As it was when the stage was computed, in this run or an earlier one. Peak memory: the most that the process "
        "held during the stage, PyTorch and all else that was loaded included. Estimated: by `compress plan`, roughly."
    )
    return Table("time and memory of each stage", columns, tuple(rows), note)


def _stages_title(names: Sequence[str]) -> str:
    words = {"kl": "KL to the source in nats", "top1_agreement": "top-1 agreement with it",
             "cosine": "cosine to the source"}  # fmt: skip
    told = ", ".join(words[name] for name in names if name in words)
    return "after each stage" + (f" ({told})" if told else "")


def recall_table(record: RunRecord) -> Table | None:
    """What the original and the result remember, by the length of the context; None where it was not measured."""
    figures = figures_of(record)
    matches = [match for name in figures[RESULT] if (match := _RECALL_NAME.fullmatch(name))]
    lengths = sorted({int(match["length"]) for match in matches if match["task"] == "mqar"})
    if not lengths:
        return None
    columns = [(length, subject) for length in lengths for subject in (SOURCE, RESULT)]
    tasks = {(match["task"], match["depth"] or "") for match in matches}
    rows = []
    for task, depth in sorted(tasks, key=lambda row: (list(_RECALL_LABELS).index(row[0]), row[1])):
        cells = (_value(figures[subject], f"{task}@{length}{depth}") for length, subject in columns)
        rows.append((_RECALL_LABELS[task] + depth.replace(",depth=", ", at depth "), *cells))
    chance = figures[RESULT]["mqar_chance"]
    note = (
        f"± standard error over texts. MQAR: {1 / chance:.0f} pairs of words are stated, and all asked for at the end; "
        f"guessing among the values is right {chance:.3g} of the time. Needle: depth 0 is the text's start, 1 its end. "
        "Log p: natural logarithm, a token. Perplexity: of the tokens before that length, as plotted."
    )
    return Table("recall", ("", *(f"{subject} @ {length}" for length, subject in columns)), tuple(rows), note)


def comparison_table(first: RunRecord, second: RunRecord) -> Table:
    """The results of two runs side by side, with their ratio."""
    results = {"A": figures_of(first)[RESULT], "B": figures_of(second)[RESULT]}
    rows = []
    for name, row in _rows(results, ("A", "B")):
        a, b = results["A"].get(name), results["B"].get(name)
        rows.append((*row, f"{b / a:.3g}×" if a and b is not None else ""))
    return Table(f"A = {first.name}, B = {second.name}", ("", "A", "B", "B / A"), tuple(rows))


def as_markdown(table: Table) -> str:
    """The table in Markdown, figures aligned to the right."""
    figures = len(table.columns) - table.num_words
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * table.num_words + "|--:" * figures + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _judged_on(result: Mapping[str, float]) -> str:
    note = "ratio: result / source"
    if "eval_tokens" not in result:
        return note
    return f"{note}; quality: on {result['eval_tokens']:,.0f} tokens of the eval text, ± standard error over its blocks"


def _rows(figures: Figures, subjects: Sequence[str]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(figure's name, (label, a cell for each subject)) of every known figure that a subject has, in order."""
    names = {name for subject in subjects for name in figures.get(subject, {}) if _order(name) is not None}
    for name in sorted(names, key=lambda name: _order(name) or ()):
        yield name, (_label(name), *(_value(figures.get(subject, {}), name) for subject in subjects))


def _order(name: str) -> tuple[int, int, str] | None:
    match = _NAME.fullmatch(name)
    if match is None or match["base"] not in _LABELS or name.startswith("perplexity@"):  # that is for the plot
        return None
    return list(_LABELS).index(match["base"]), int(match["tokens"] or 0), match["rest"] or ""


def _label(name: str) -> str:
    match = _NAME.fullmatch(name)
    assert match is not None
    words, unit = _LABELS[match["base"]]
    where = f" {match['tokens']}" if match["tokens"] else ""
    rest = (match["rest"] or "").replace(",", ", ").replace("=", " ")
    return f"{words}{where}{rest}" + (f" ({unit})" if unit else "")


def _value(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return ""
    scale = _SCALE.get(name, 1.0)
    error = values.get(f"{name}_se")
    if error is None:
        return number(values[name] * scale)
    decimals = max(0, 1 - _exponent(error * scale))
    return f"{values[name] * scale:.{decimals}f} ± {error * scale:.{decimals}f}"


def duration(seconds: float | None) -> str:
    """`<1 s`, `42 s`, `7 min`, `2.5 h`; nothing of None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "<1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def number(value: float) -> str:
    """Three digits that count, four from a hundred on, never an exponent."""
    return f"{value:.{max(0, 2 - _exponent(value))}f}"


def _exponent(value: float) -> int:
    """The power of ten of the first digit of `value`; 0 for 0 and for what is no number."""
    return int(f"{value:e}".partition("e")[2]) if value and abs(value) < float("inf") else 0


def _ratio(figures: Figures, name: str) -> str:
    source, result = figures.get(SOURCE, {}).get(name), figures.get(RESULT, {}).get(name)
    return f"{result / source:.3g}×" if source and result is not None and name not in DISTANCES else ""
