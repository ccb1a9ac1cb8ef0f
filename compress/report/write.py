"""`report.md` and `report.html`: what a run came to, verdicts, tables and plots, for people who were not there."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from compress.hardware import VECTOR_FLAGS
from compress.registry import stage_class, stage_names
from compress.report.figures import MEASUREMENT
from compress.report.operators import operators_table
from compress.report.optional import optional
from compress.report.plots import CAPTIONS, draw
from compress.report.tables import Table, as_markdown, costs_table, recall_table, result_table, stages_table
from compress.runner.record import RunRecord, State

MARKDOWN, HTML, PLOTS = "report.md", "report.html", "plots"
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #dde3ea }
th:first-child, td:first-child { padding-left: 0 } .words { text-align: left }
.note, figcaption { color: #51606f; font-size: .9rem } figure { margin: 1.5rem 0 }
img { max-width: 100% } pre { background: #f4f6f8; padding: 1rem; overflow-x: auto }
.missed { color: #b3261e; font-weight: 600 }
"""
_MISSED, _WORDS = ' class="missed"', ' class="words"'


def write_report(run_dir: Path, record: RunRecord) -> None:
    """Write `report.md`, `report.html` (which needs no other file) and the plots to `run_dir`."""
    pictures = [*_stage_pictures(run_dir, record)]
    with optional("the plots of the report"):
        pictures = [*(Picture(file, CAPTIONS[file.name]) for file in draw(record, run_dir / PLOTS)), *pictures]
    sections = [*_sections(run_dir, record, pictures)]
    _put(run_dir / MARKDOWN, _markdown(run_dir, record, sections))
    _put(run_dir / HTML, _html(run_dir, record, sections))


def has_report(run_dir: Path) -> bool:
    """Whether there is one already."""
    return all((run_dir / name).is_file() for name in (MARKDOWN, HTML))


def remove_report(run_dir: Path) -> None:
    """Remove the one that is there, if any."""
    for name in (MARKDOWN, HTML):
        (run_dir / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Picture:
    """A plot, and what it shows, in words without a full stop."""

    file: Path
    caption: str


Block = str | Table | Picture | tuple[str, ...]
"""A paragraph, a table, a plot, or the items of a list."""
Section = tuple[str, Sequence[Block]]


def _sections(run_dir: Path, record: RunRecord, pictures: Sequence[Picture]) -> Iterator[Section]:
    """What a report says, in this order: (heading, what is below it)."""
    yield "Result", [result_table(record)]
    if record.verdicts:
        yield "Requirements", [_verdicts_in_brief(record), tuple(verdict.sentence for verdict in record.verdicts)]
    with optional("the table of operators"):
        if (operators := operators_table(run_dir, record)) is not None:
            yield "Operators", [operators]
    yield "After each stage", [stages_table(record)]
    yield "Time and memory", [costs_table(record)]
    if (recall := recall_table(record)) is not None:
        yield "Recall", [recall]
    if pictures:
        yield "Plots", pictures
    yield "Circumstances", [tuple(f"{name}: {value}" for name, value in _circumstances(record))]


def _markdown(run_dir: Path, record: RunRecord, sections: Sequence[Section]) -> str:
    def shown(block: Block) -> str:
        if isinstance(block, Table):
            return as_markdown(block)
        if isinstance(block, Picture):
            return f"![{block.caption}]({block.file.relative_to(run_dir).as_posix()})\n\n*{block.caption}.*"
        return "\n".join(f"- {item}" for item in block) if isinstance(block, tuple) else block

    parts = [f"# {record.name}", _summary(record)]
    for heading, blocks in sections:
        parts += [f"## {heading}", *map(shown, blocks)]
    return "\n\n".join(parts) + "\n"


def _html(run_dir: Path, record: RunRecord, sections: Sequence[Section]) -> str:
    missed = {verdict.sentence for verdict in record.verdicts if not verdict.met}

    def shown(block: Block) -> str:
        if isinstance(block, Table):
            return _table(block)
        if isinstance(block, Picture):
            data, words = base64.b64encode(block.file.read_bytes()).decode(), escape(block.caption)
            image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{words}.</figcaption></figure>"
        if isinstance(block, tuple):
            items = (f"<li{_MISSED if item in missed else ''}>{escape(item)}</li>" for item in block)
            return f"<ul>{''.join(items)}</ul>"
        return f"<p>{escape(block)}</p>"

    parts = [f"<h1>{escape(record.name)}</h1>", f"<p>{escape(_summary(record))}</p>"]
    for heading, blocks in sections:
        parts += [f"<h2>{escape(heading)}</h2>", *map(shown, blocks)]
    parts += ["<h2>Pipeline</h2>", f"<pre>{escape((run_dir / 'pipeline.yaml').read_text('utf-8'))}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(record.name)}</title><style>{_CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _summary(record: RunRecord) -> str:
    stages = [stage.id for stage in record.stages if stage.returns != MEASUREMENT and not stage.hidden]
    road = f" through {', '.join(stages)}" if stages else ""
    deploy = f" Folder to deploy: {record.deploy.directory}." if record.deploy else ""
    missed = sum(not verdict.met for verdict in record.verdicts)
    end = f"missed {missed} of {len(record.verdicts)} requirements" if record.state is State.MISSED else record.state
    return f"{record.source.name}{road}: {end}.{deploy}"


def _verdicts_in_brief(record: RunRecord) -> str:
    met, total = sum(verdict.met for verdict in record.verdicts), len(record.verdicts)
    return f"{met} of {total} met." if met < total else f"All {total} met."


def _circumstances(record: RunRecord) -> list[tuple[str, str]]:
    hardware, target, resolved = record.hardware, record.target, record.resolved.items()
    return [
        ("started", record.started),
        ("machine", f"{hardware['cpu']}, {hardware['num_cpus']} CPUs, {hardware['ram_gb']} GB, {hardware['system']}"),
        ("vector instructions", " ".join(flag for flag in hardware["flags"] if flag.startswith(VECTOR_FLAGS))),
        ("measured with", f"{target['provider']}, {target['threads']} threads"),
        ("seed", str(record.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("commit", record.git_commit or "not from a checkout"),
        *(("model beside the source", model.name) for model in record.models.values()),
        *((name, ", ".join(f"{fact} {value}" for fact, value in facts.items())) for name, facts in resolved),
    ]


def _table(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        words = (_WORDS if index < table.num_words else "" for index in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, words, strict=True))

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<table><thead><tr>{cells(table.columns, 'th')}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _stage_pictures(run_dir: Path, record: RunRecord) -> Iterator[Picture]:
    """The plots that stages drew, in their order."""
    for stage in record.stages:
        for file in sorted((run_dir / stage.directory).glob("*.png")):
            known = stage_class(stage.stage).plots if stage.stage in stage_names() else {}
            yield Picture(file, f"{stage.id}: {known.get(file.name, file.stem.replace('_', ' '))}")


def _put(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, file)
