"""Figures of the arms as tables: what is lost, with paired standard errors, and what share of plain rounding's is left.

A loss is the increase of perplexity, e^(mean difference of the log-likelihoods) − 1, or 1 − cosine of embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.benchmarks.quality import Estimate
from compress.report.tables import Table, as_markdown

Sums = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Judged:
    """One arm on one text: sums over each window by figure, means over seeds, and the predictions in each."""

    sums: Sums
    num_N: NDArray[np.float64]

    @classmethod
    def of(cls, windows: Sequence[Mapping[str, Any]]) -> Judged:
        """From `Evaluation.to_json` of each seed."""
        names = [name for name, values in windows[0].items() if isinstance(values, list)]
        means = {name: np.mean([each[name] for each in windows], axis=0) for name in names}
        return cls(means, means.pop("num_predictions"))

    @property
    def is_causal(self) -> bool:
        """Whether it predicts tokens; an encoder only embeds."""
        return "nll" in self.sums

    def loss(self, keep_N: NDArray[np.bool_]) -> float:
        """The loss over the windows in `keep_N`."""
        num = float(self.num_N[keep_N].sum())
        if not self.is_causal:
            return 1.0 - float(self.sums["cosine"][keep_N].sum()) / num
        difference_N = self.sums["nll"] - self.sums["reference_nll"]
        return float(np.expm1(min(difference_N[keep_N].sum() / num, 700.0)))

    def mean(self, figure: str, keep_N: NDArray[np.bool_]) -> float:
        """The mean over predictions in the windows in `keep_N`."""
        return float(self.sums[figure][keep_N].sum() / self.num_N[keep_N].sum())


def jackknife(figure: Callable[[NDArray[np.bool_]], float], num_windows: int) -> Estimate:
    """`figure` of all windows, and its standard error from leaving out one after the other (Tukey): paired, where
    `figure` holds two models against each other.
    """
    everything_N = np.ones(num_windows, bool)
    value = figure(everything_N)
    if num_windows < 2:
        return Estimate(value, float("nan"))
    left_out = ~np.eye(num_windows, dtype=bool)
    without_N = np.array([figure(keep_N) for keep_N in left_out])
    variance = (num_windows - 1) / num_windows * float(((without_N - without_N.mean()) ** 2).sum())
    return Estimate(value, float(np.sqrt(variance)))


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """All arms: sizes and costs, a table for each text and each form in which they were judged, and their options."""
    judging, data = rows[-1]["judging"], rows[-1]["pipeline"]["data"]
    lines = ["# What quantising costs", "", f"Judged: `{json.dumps(judging)}`; data: `{json.dumps(data)}`."]
    lines += ["", footnote(rows[-1]), "", "## Size and cost", "", as_markdown(costs(rows))]
    for text in judging["judged"]:
        for form in ("quantized", "onnx"):
            chosen = [row for row in rows if form in row["judged"]]
            if chosen:
                where = "in torch, activations rounded" if form == "quantized" else "exported, in ONNX Runtime"
                lines += ["", f"## {text}: {where}", "", as_markdown(qualities(chosen, text, form))]
    options = {row["arm"]: json.dumps(row["pipeline"]["stages"]) for row in rows}
    lines += ["", "## Options", "", *(f"- {arm}: `{stages}`" for arm, stages in options.items())]
    return "\n".join([*lines, ""])


def costs(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bits of a quantised weight, MB of each artifact, and seconds and peak memory of the whole process."""
    lines = []
    for row in rows:
        by_form = {stage["returns"]: stage["metrics"].get("result", {}) for stage in row["stages"]}
        bits = by_form["quantized"].get("bits_per_weight", float("nan"))
        sizes = [f"{by_form[form]['size_mb']:.1f}" if form in by_form else "" for form in ("quantized", "onnx")]
        process = row["process"]
        cost = (f"{process['seconds']:.0f}", f"{process['peak_rss_mb']:.0f}", str(row["environment"]["threads"]))
        name = row["arm"] if row["seed"] == 0 else f"{row['arm']}, seed {row['seed']}"
        lines.append((name, f"{bits:.2f}", *sizes, *cost))
    return Table("", ("arm", "bits a weight", "MB", "MB in ONNX", "s", "peak RSS, MB", "threads"), tuple(lines))


def qualities(rows: Sequence[Mapping[str, Any]], text: str, form: str) -> Table:
    """One line an arm, its seeds averaged window by window; seeds apart are in the last column."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    windows = {arm: [r["judged"][form][text]["windows"] for r in rows if r["arm"] == arm] for arm in arms}
    found = {arm: Judged.of(each) for arm, each in windows.items()}
    causal = next(iter(found.values())).is_causal
    plain = {row["arm"]: found.get(row["plain"]) for row in rows}
    lines = tuple((arm, *_cells(found[arm], plain[arm]), _apart(windows[arm])) for arm in arms)
    quality = ("perplexity ratio", "KL, nats", "top-1 agreement") if causal else ("1 − cosine",)
    shares = ("of rtn's increase, %", "of rtn's KL, %") if causal else ("of rtn's loss, %",)
    return Table("", ("arm", *quality, *shares, "seeds apart"), lines)


def footnote(row: Mapping[str, Any]) -> str:
    """Where it was measured last."""
    machine = row["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = sorted(flag for flag in machine["cpu_flags"] if "vnni" in flag or flag == "amx_int8")
    return (
        "± standard errors over windows, by the jackknife, paired with the source and with what an arm is held "
        "against: rounding to nearest (rtn); of an int8 cache, the same with a float32 one. "
        f"{machine['cpu']} ({' '.join(flags) or 'no VNNI'}), {machine['threads']} thread(s), {versions}, "
        f"commit {machine['commit']}."
    )


def _cells(judged: Judged, plain: Judged | None) -> Iterator[str]:
    num = len(judged.num_N)
    if judged.is_causal:
        yield _plus_minus(jackknife(lambda keep_N: 1.0 + judged.loss(keep_N), num), 4)
        yield _plus_minus(jackknife(lambda keep_N: judged.mean("kl", keep_N), num), 4)
        yield _plus_minus(jackknife(lambda keep_N: judged.mean("top1_agreement", keep_N), num), 3)
    else:
        yield _plus_minus(jackknife(judged.loss, num), 5)
    if plain is None or plain is judged:
        yield from ("", "")[: 1 + judged.is_causal]
        return
    yield _plus_minus(jackknife(lambda keep_N: 100.0 * judged.loss(keep_N) / plain.loss(keep_N), num), 1)
    if judged.is_causal:
        share = jackknife(lambda keep_N: 100.0 * judged.mean("kl", keep_N) / plain.mean("kl", keep_N), num)
        yield _plus_minus(share, 1)


def _apart(windows: Sequence[Mapping[str, Any]]) -> str:
    each = [Judged.of([one]) for one in windows]
    losses = [one.loss(np.ones(len(one.num_N), bool)) for one in each]
    return " ".join(f"{loss:.4f}" for loss in losses) if len(losses) > 1 else ""


def _plus_minus(estimate: Estimate, decimals: int) -> str:
    return f"{estimate.value:.{decimals}f} ± {estimate.se:.{decimals}f}"
