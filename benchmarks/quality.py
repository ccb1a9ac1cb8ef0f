"""How far one model's predictions are from another's, and how sure that is: pure functions of logits and of sums.

Tokens of one window depend on each other, so windows ("blocks"), not tokens, are the sampling unit: every standard
error here is that of a ratio estimator over blocks (Cochran, Sampling Techniques, ch. 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

_CHUNK_ROWS = 64  # rows of vocabulary-sized logits that are worked on at once: bounds the temporary memory


class Estimate(NamedTuple):
    """A mean and its standard error, in the same unit."""

    value: float
    se: float


def token_nll(logits_TV: Floats, targets_T: Ints) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, (T,), in nats."""
    nll_T = np.empty(len(targets_T), np.float64)
    for rows in _chunks(len(targets_T)):
        chunk_RV = logits_TV[rows]
        _, log_sum_R, _ = _softmax_parts(chunk_RV)
        nll_T[rows] = log_sum_R - np.take_along_axis(chunk_RV, targets_T[rows, None], axis=1)[:, 0]
    return nll_T


def token_kl(reference_TV: Floats, logits_TV: Floats) -> NDArray[np.float64]:
    """KL(reference ‖ other) of each row's distributions, (T,), in nats.

    KL = Σ p·(z_p − z_q) − (logΣe^{z_p} − logΣe^{z_q}): exactly zero for equal logits.
    """
    kl_T = np.empty(len(logits_TV), np.float64)
    for rows in _chunks(len(logits_TV)):
        weights_RV, log_sum_p_R, sum_R = _softmax_parts(reference_TV[rows])
        _, log_sum_q_R, _ = _softmax_parts(logits_TV[rows])
        weights_RV *= reference_TV[rows] - logits_TV[rows]
        kl_T[rows] = weights_RV.sum(axis=1, dtype=np.float64) / sum_R - (log_sum_p_R - log_sum_q_R)
    return kl_T


def top1_agreement(reference_TV: Floats, logits_TV: Floats) -> NDArray[np.float64]:
    """1.0 where both rows' largest logit is at the same index, else 0.0, (T,)."""
    return np.asarray(reference_TV.argmax(axis=1) == logits_TV.argmax(axis=1), np.float64)


def cosine(reference_TH: Floats, other_TH: Floats) -> NDArray[np.float64]:
    """Cosine similarity of each pair of rows, (T,)."""
    dot_T = (reference_TH * other_TH).sum(axis=1, dtype=np.float64)
    norms_T = np.linalg.norm(reference_TH.astype(np.float64), axis=1) * np.linalg.norm(
        other_TH.astype(np.float64), axis=1
    )
    return np.asarray(dot_T / norms_T, np.float64)


def cluster_mean(sums_N: Floats, counts_N: Floats | Ints) -> Estimate:
    """The mean over all tokens, from each block's sum and number of tokens, and its standard error over blocks.

    Or the ratio of any two sums over the same blocks, which makes it a paired comparison.
    m = Σs/Σc, SE² = N/(N−1)·Σ(s_i − m·c_i)² / (Σc)². The error of a single block is unknown: nan.
    """
    num_blocks, num_tokens = len(sums_N), float(counts_N.sum())
    mean = float(sums_N.sum()) / num_tokens
    if num_blocks < 2:
        return Estimate(mean, math.nan)
    residuals_N = sums_N - mean * counts_N
    return Estimate(mean, math.sqrt(num_blocks / (num_blocks - 1) * float((residuals_N**2).sum())) / num_tokens)


def bits_per_byte(nats_N: Floats, bytes_N: Ints) -> Estimate:
    """Bits that a model needs for a byte of text, from each block's negative log-likelihood and its UTF-8 bytes."""
    nats = cluster_mean(nats_N, bytes_N)
    return Estimate(nats.value / math.log(2), nats.se / math.log(2))


def exponential(log: Estimate) -> Estimate:
    """e^x of an estimate x, with the delta method's standard error: SE(e^x) = e^x·SE(x)."""
    value = math.exp(min(log.value, 700.0))  # e^709 is the largest float
    return Estimate(value, value * log.se)


def _softmax_parts(logits_RV: Floats) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """e^(z − max z) in float32, and log Σe^z and Σe^(z − max z) accumulated in float64."""
    largest_R1 = logits_RV.max(axis=1, keepdims=True)
    weights_RV = np.exp((logits_RV - largest_R1).astype(np.float32, copy=False))
    sum_R = weights_RV.sum(axis=1, dtype=np.float64)
    return weights_RV, np.log(sum_R) + largest_R1[:, 0], sum_R


def _chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _CHUNK_ROWS):
        yield slice(start, min(start + _CHUNK_ROWS, num_rows))
