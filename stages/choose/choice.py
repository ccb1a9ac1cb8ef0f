"""Which of several exports of one model to take: pure functions of what was measured of them.

A phase is `prefill` (the prompt) or `decode` (one token after it) of a decoder, and `forward` of an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.artifact import Metrics
from compress.benchmarks.timing import Ratio, ratio
from compress.pipeline.require import RESULT, Requirement, Verdict

PHASES = {"prefill": "ttft_ms", "decode": "tpot_ms", "forward": "latency_ms"}
"""The figure that times each phase."""


@dataclass(frozen=True)
class Candidate:
    """One export: megabytes of weights and graph, what was measured of it, and its verdicts against the budget.

    rounds_ms: by phase, the mean over all prompts of the median time in each round. The rounds of all candidates are
    the same ones, so times of one round may be held against each other.
    """

    name: str
    size_mb: float
    figures: Mapping[str, float]
    verdicts: Sequence[Verdict]
    rounds_ms: Mapping[str, Sequence[float]]

    @property
    def is_good(self) -> bool:
        """Whether it is within the budget."""
        return all(verdict.met for verdict in self.verdicts)

    def ms(self, phase: str) -> float:
        """The median over rounds of a phase."""
        return float(np.median(self.rounds_ms[phase]))

    def costs_ms(self, weights: Mapping[str, float]) -> list[float]:
        """Each round's time of so many times each phase."""
        rows = [weight * np.asarray(self.rounds_ms[phase]) for phase, weight in weights.items()]
        return [float(cost) for cost in np.sum(rows, axis=0)]


@dataclass(frozen=True)
class Choice:
    """The best of the candidates, by how often each phase counts, and what to be warned of."""

    best: Candidate
    candidates: Sequence[Candidate]
    weights: Mapping[str, float]
    warnings: Sequence[str]

    def cost_ms(self, candidate: Candidate) -> float:
        """The median over rounds of what is to be small."""
        return float(np.median(candidate.costs_ms(self.weights)))

    def ratio(self, candidate: Candidate) -> Ratio:
        """What a candidate costs, as a multiple of what the best one does."""
        return ratio(candidate.costs_ms(self.weights), self.best.costs_ms(self.weights))


def choose(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> Choice:
    """The candidate within the budget that costs least; there must be one. An encoder has no phases to weigh."""
    own = {"forward": 1.0} if "forward" in candidates[0].rounds_ms else weights
    good = [candidate for candidate in candidates if candidate.is_good]
    best = min(good, key=lambda candidate: float(np.median(candidate.costs_ms(own))))
    return Choice(best, candidates, own, list(_warnings(candidates)))


def judge(requirements: Sequence[Requirement], quality: Metrics, size_mb: float) -> list[Verdict]:
    """What the budget says of a candidate, given what `evaluate` measured of it and of the reference."""
    figures = {**quality, RESULT: {**quality[RESULT], "size_mb": size_mb}}
    return [requirement.verdict(figures) for requirement in requirements]


def rounds_ms(subject: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each phase's time in every round, over all prompts, from one of the `subjects` of `latency.json`."""
    found = {}
    for phase, what in PHASES.items():
        rows = [figure["round_medians"] for name, figure in subject["figures"].items() if name.startswith(f"{what}@")]
        if rows:
            found[phase] = [float(mean) for mean in np.mean(rows, axis=0)]
    return found


def _warnings(candidates: Sequence[Candidate]) -> Iterator[str]:
    """For each candidate and phase the fastest larger one, where that is faster beyond what chance explains."""
    for small in candidates:
        larger = [each for each in candidates if each.size_mb > small.size_mb]
        for phase in small.rounds_ms if larger else ():
            large = min(larger, key=lambda candidate: candidate.ms(phase))
            times = ratio(small.rounds_ms[phase], large.rounds_ms[phase])
            if times.low > 1:
                yield (
                    f"SMALLER BUT SLOWER in {phase}: {small.name} ({small.size_mb:.3g} MB) takes {times.median:.2f}x "
                    f"[{times.low:.2f}, {times.high:.2f}] as long as {large.name} ({large.size_mb:.3g} MB), "
                    f"{small.ms(phase):.3g} against {large.ms(phase):.3g} ms"
                )
