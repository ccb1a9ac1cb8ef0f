"""`report.md` and `report.html`: a run's tables, verdicts and plots, for people who were not there."""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

from compress.hardware import VECTOR_FLAGS
from compress.report.optional import optional
from compress.report.tables import Table, as_markdown, recall_table, result_table, stages_table
from compress.runner.record import RunRecord, State

MARKDOWN, HTML, PLOTS = "report.md", "report.html", "plots"
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #dde3ea }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
img { max-width: 100% } pre { background: #f4f6f8; padding: 1rem; overflow-x: auto }
.missed { color: #b3261e; font-weight: 600 }
"""


def write_report(run_dir: Path, record: RunRecord) -> None:
    """Write `report.md`, `report.html` (which needs no other file) and the plots to `run_dir`."""
    from compress.report.plots import draw

    plots = _stage_plots(run_dir, record)
    with optional("the plots of the report"):
        plots = [*draw(record, run_dir / PLOTS), *plots]
    _put(run_dir / MARKDOWN, _markdown(run_dir, record, plots))
    _put(run_dir / HTML, _html(run_dir, record, plots))


def has_report(run_dir: Path) -> bool:
    """Whether there is one already."""
    return all((run_dir / name).is_file() for name in (MARKDOWN, HTML))


def remove_report(run_dir: Path) -> None:
    """Remove the one that is there, if any."""
    for name in (MARKDOWN, HTML):
        (run_dir / name).unlink(missing_ok=True)


def _markdown(run_dir: Path, record: RunRecord, plots: list[Path]) -> str:
    parts = [f"# {record.name}", _summary(record), as_markdown(result_table(record))]
    parts += ["## After each stage", as_markdown(stages_table(record))]
    if (recall := recall_table(record)) is not None:
        parts += ["## Recall", as_markdown(recall)]
    if record.verdicts:
        parts += ["## Requirements", "\n".join(f"- {verdict.sentence}" for verdict in record.verdicts)]
    if plots:
        names = [plot.relative_to(run_dir).as_posix() for plot in plots]
        parts += ["## Plots", "\n\n".join(f"![{name}]({name})" for name in names)]
    parts += ["## Circumstances", "\n".join(f"- {name}: {value}" for name, value in _circumstances(record))]
    return "\n\n".join(parts) + "\n"


def _html(run_dir: Path, record: RunRecord, plots: list[Path]) -> str:
    parts = [f"<h1>{escape(record.name)}</h1>", f"<p>{escape(_summary(record))}</p>", _table(result_table(record))]
    parts += ["<h2>After each stage</h2>", _table(stages_table(record))]
    if (recall := recall_table(record)) is not None:
        parts += ["<h2>Recall</h2>", _table(recall)]
    if record.verdicts:
        items = "".join(
            f'<li class="{"met" if verdict.met else "missed"}">{escape(verdict.sentence)}</li>'
            for verdict in record.verdicts
        )
        parts += ["<h2>Requirements</h2>", f"<ul>{items}</ul>"]
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        name = escape(plot.relative_to(run_dir).as_posix())
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    items = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in _circumstances(record))
    parts += ["<h2>Circumstances</h2>", f"<ul>{items}</ul>"]
    parts += ["<h2>Pipeline</h2>", f"<pre>{escape((run_dir / 'pipeline.yaml').read_text('utf-8'))}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(record.name)}</title><style>{_CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _summary(record: RunRecord) -> str:
    deploy = f" Folder to deploy: {record.deploy.directory}." if record.deploy else ""
    missed = sum(not verdict.met for verdict in record.verdicts)
    end = f"missed {missed} of {len(record.verdicts)} requirements" if record.state is State.MISSED else record.state
    return f"{record.source.name}, {len(record.stages)} stages: {end}.{deploy}"


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
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _stage_plots(run_dir: Path, record: RunRecord) -> list[Path]:
    return [plot for stage in record.stages for plot in sorted((run_dir / stage.directory).glob("*.png"))]


def _put(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, file)
