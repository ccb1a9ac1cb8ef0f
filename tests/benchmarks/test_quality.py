"""The estimators against naive computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.benchmarks import quality


def _logits(seed: int, rows: int = 150, vocab: int = 40) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 3).astype(np.float32)


def _naive_log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_nll_equals_the_naive_one_over_several_chunks() -> None:
    logits, targets = _logits(0), np.random.default_rng(1).integers(0, 40, 150)
    naive = -_naive_log_softmax(logits)[np.arange(150), targets]
    np.testing.assert_allclose(quality.token_nll(logits, targets), naive, atol=2e-6)


def test_kl_equals_the_naive_one_and_is_zero_against_itself() -> None:
    reference, other = _logits(0), _logits(1)
    log_p, log_q = _naive_log_softmax(reference), _naive_log_softmax(other)
    np.testing.assert_allclose(quality.token_kl(reference, other), (np.exp(log_p) * (log_p - log_q)).sum(1), atol=5e-6)
    assert np.all(quality.token_kl(reference, reference) == 0)
    assert np.allclose(quality.token_kl(reference, reference + 5), 0, atol=1e-5), "a shift changes no distribution"


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, 0.0]], np.float32)
    np.testing.assert_allclose(quality.token_nll(logits, np.array([0, 0])), [0, 1000])


def test_agreement_counts_equal_largest_logits() -> None:
    reference = np.array([[0, 1, 0], [2, 1, 0], [0, 0, 3]], np.float32)
    other = np.array([[0, 9, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    assert quality.top1_agreement(reference, other).tolist() == [1, 0, 1]


def test_cosine_of_scaled_and_of_orthogonal_rows() -> None:
    rows = np.array([[1, 2], [1, 0]], np.float32)
    np.testing.assert_allclose(quality.cosine(rows, np.array([[2, 4], [0, 3]], np.float32)), [1, 0], atol=1e-12)


def test_standard_error_is_that_of_a_bootstrap_over_blocks() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 200, 80)
    level = generator.normal(3.0, 0.5, 80)  # tokens of a block share a level: a token-wise error would be too small
    sums = counts * level + generator.normal(0, 1, 80) * np.sqrt(counts)
    found = quality.cluster_mean(sums, counts)
    picks = generator.integers(0, 80, (4000, 80))
    bootstrap = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    assert found.se == pytest.approx(bootstrap, rel=0.07)
    assert quality.exponential(found).se == pytest.approx(
        np.exp(sums[picks].sum(1) / counts[picks].sum(1)).std(), rel=0.1
    )


def test_the_error_of_one_block_is_unknown() -> None:
    assert math.isnan(quality.cluster_mean(np.array([3.0]), np.array([2])).se)
