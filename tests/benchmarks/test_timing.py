"""Summaries and paired ratios."""

from __future__ import annotations

import numpy as np
import pytest

from compress.benchmarks.timing import ratio, summarise


def test_summary_of_known_samples() -> None:
    found = summarise([float(value) for value in range(1, 102)])
    assert (found.median, found.p90, found.p99, found.mad, found.n) == (51, 91, 100, 25, 101)


def test_ratio_cancels_what_both_models_feel_in_a_round() -> None:
    generator = np.random.default_rng(0)
    drift = np.exp(np.linspace(0, 2, 40))  # the machine gets 7 times slower
    theirs = drift * generator.normal(10, 0.1, 40)
    ours = 0.5 * drift * generator.normal(10, 0.1, 40)
    found = ratio(ours.tolist(), theirs.tolist())
    assert found.median == pytest.approx(0.5, rel=0.01)
    assert found.low <= found.median <= found.high
    assert found.high - found.low < 0.02


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        ours, theirs = generator.lognormal(0, 0.2, (2, 15))
        found = ratio(ours.tolist(), theirs.tolist())
        covered += found.low <= 1.0 <= found.high
    assert covered >= 50
