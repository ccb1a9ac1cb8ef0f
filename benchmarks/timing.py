"""Samples of time into figures: what is typical, what is rare, and how sure a ratio of two models is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """Median, 90th and 99th percentile and spread (median absolute deviation) of n samples, all in ms.

    A percentile is only as good as n: of fewer than 100 samples p99 is close to the largest.
    """

    median: float
    p10: float
    p90: float
    p99: float
    mad: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one model's time divided by another's, with a 95 % bootstrap interval over rounds."""

    median: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def summarise(samples_ms: Sequence[float]) -> Summary:
    """The summary of at least one sample."""
    values = np.asarray(samples_ms, np.float64)
    median = float(np.median(values))
    p10, p90, p99 = (float(np.percentile(values, q)) for q in (10, 90, 99))
    return Summary(median, p10, p90, p99, float(np.median(np.abs(values - median))), len(values))


def ratio(ours_ms: Sequence[float], theirs_ms: Sequence[float]) -> Ratio:
    """How many times as long as theirs ours takes; the i-th values of both are of the same round, so drift cancels."""
    ratios = np.asarray(ours_ms, np.float64) / np.asarray(theirs_ms, np.float64)
    picks = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
