"""The report of a comparison with a peer: verdict, speed, quality, and what the two graphs hold."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.benchmarks import quality, report
from compress.benchmarks.contest import Runtime
from compress.benchmarks.evaluation import Evaluation
from compress.benchmarks.quality import Estimate
from compress.report.tables import Table, as_markdown

RUNTIMES: tuple[Runtime, ...] = ("genai", "ort")
Found = Mapping[Runtime, Mapping[str, Any]]
_TITLES = {"genai": "onnxruntime-genai", "ort": "bare ONNX Runtime"}
PRUNED_HEAD = ("prune_lm_head=true",)
PRUNED_PEER = "peer, pruned head"
_POINTS = ("tpot_ms@128", "tpot_ms@4096", "ttft_ms@1024")  # where ours must be no slower
_MOST = {"speed": 1.03, "size": 1.02, "perplexity": 1.0}  # the most that ours may be, as a share of the peer's


@dataclass(frozen=True)
class Quality:
    """Both folders judged against the source on the same blocks of one text, and ours against the peer's, paired."""

    text: str
    ours: Evaluation
    peer: Evaluation

    @property
    def ratio(self) -> Estimate:
        """Our perplexity divided by the peer's."""
        difference_N = self.ours.sums["nll"] - self.peer.sums["nll"]
        return quality.exponential(quality.cluster_mean(difference_N, self.ours.num_predictions_N))


def page(
    options: argparse.Namespace,
    folders: Mapping[str, Path],
    found: Found,
    judged: Sequence[Quality],
) -> str:
    """The whole report in Markdown."""
    any_found = found["genai"]
    machine = any_found["environment"]
    lines = [
        f"# {options.source.name}, {options.precision}: our export and onnxruntime-genai's own build", "",
        f"{datetime.date.today()}, commit {machine['commit'] or 'unknown'}, {machine['cpu']}, {machine['threads']} "
        f"threads, onnxruntime-genai {version('onnxruntime-genai')}. Made with "
        f"`python -m compress.benchmarks.peer_int4 {' '.join(sys.argv[1:])}`.", "",
        "The peer is its model builder's output with default options"
        + (", given as a folder" if options.peer else "") + ". All ran with the same "
        "`intra_op_num_threads`, written into every `genai_config.json`.", "",
        "**Time to first token:** our graph computes the logits of the prompt's last token alone (its optional input "
        "`logits_to_keep` asks for more); the peer's default build computes those of every prompt token, which is part "
        "of what it loses there. "
        + (
            f"`{PRUNED_PEER}` is the same build with `{PRUNED_HEAD[0]}`, which does as ours."
            if PRUNED_PEER in folders else f"Its builder could not make a build with `{PRUNED_HEAD[0]}` here."
        ), "",
        "## Verdict", "", _verdict(found, judged), "",
    ]  # fmt: skip
    for runtime in RUNTIMES:
        lines += [f"## Speed through {_TITLES[runtime]}", "", as_markdown(report.table(found[runtime])), ""]
    lines += [report.footnote(any_found), "", "## Quality", "", as_markdown(_quality_table(judged)), ""]
    lines += ["± is the standard error over blocks of 256 tokens; ratios are paired block by block.", ""]
    lines += ["## What the graphs hold", ""]
    lines += [f"- {name}: {_graph_summary(folder / 'model.onnx')}" for name, folder in folders.items()]
    return "\n".join(lines) + "\n"


def _verdict(found: Found, judged: Sequence[Quality]) -> str:
    """The points that are promised, held against the default build; beside them the ratio to the pruned one."""
    rows = []
    for runtime in RUNTIMES:
        ratios = found[runtime]["ratios"]
        for figure in _POINTS:
            if seen := ratios["peer"].get(figure):
                pruned = ratios.get(PRUNED_PEER, {}).get(figure)
                beside = f"{pruned['median']:.3f} {_interval(pruned)}" if pruned else ""
                rows.append(_row(f"{figure}, {runtime}", seen["median"], _interval(seen), _MOST["speed"], beside))
    ours, peer = (found["ort"]["subjects"][name]["size_mb"] for name in ("ours", "peer"))
    rows.append(_row("MB on disk", ours / peer, "", _MOST["size"]))
    rows += [
        _row(f"perplexity, {one.text}", one.ratio.value, f"± {one.ratio.se:.3f}", _MOST["perplexity"]) for one in judged
    ]
    columns = ("figure", "ours / peer", "95 % interval or SE", "at most", "", f"ours / {PRUNED_PEER}")
    return as_markdown(Table("", columns, tuple(rows)))


def _interval(ratio: Mapping[str, float]) -> str:
    return f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _row(what: str, ratio: float, error: str, most: float, beside: str = "") -> tuple[str, ...]:
    return what, f"{ratio:.3f}", error, f"{most:g}", "met" if ratio <= most else "**missed**", beside


def _quality_table(judged: Sequence[Quality]) -> Table:
    rows = []
    for one in judged:
        for name, figures in (
            ("source", one.ours.reference()),
            ("ours", one.ours.result()),
            ("peer", one.peer.result()),
        ):
            cells = [
                f"{figures[key]:.4g} ± {figures[f'{key}_se']:.2g}" if key in figures else ""
                for key in ("perplexity", "perplexity_ratio", "kl", "top1_agreement")
            ]
            rows.append((f"{one.text}: {name}", *cells))
    columns = ("", "perplexity", "ratio to the source", "KL to the source, nats", "top-1 agreement")
    return Table("", columns, tuple(rows))


def _graph_summary(file: Path) -> str:
    """How many nodes of each kind, and how the quantised matrices are stored."""
    import onnx

    nodes = onnx.load(file, load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    wanted = ("bits", "block_size", "accuracy_level")
    settings = Counter(
        ", ".join(f"{a.name} {a.i}" for a in node.attribute if a.name in wanted)
        for node in nodes
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    )
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return counted + "".join(f"; {count} with {setting}" for setting, count in settings.items())
