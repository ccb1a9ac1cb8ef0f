"""MQAR, the needle and perplexity by position of one model and of its reference, with standard errors over texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.benchmarks import quality
from compress.benchmarks.haystack import Haystack
from compress.benchmarks.probes import ask, mqar_probe, needle_probe
from compress.benchmarks.quality import Ints
from compress.benchmarks.recall import Recall, needle_at
from compress.benchmarks.scorers import Scorer
from compress.errors import StageFailed
from compress.stage import Progress
from compress.units import UNKEPT, Units

_BUCKET_ROWS = 256
"""So many positions of a bucket are looked at, evenly spread: bounds the memory that logits take."""
Values = NDArray[Any]
TextSum = list[float]
"""The sum over the predictions of one text, and their number."""


@dataclass(frozen=True)
class Sums:
    """One figure's sum over the predictions of each of N texts, and their number. Perplexity's is in nats."""

    sums_N: NDArray[np.float64]
    counts_N: Ints


@dataclass(frozen=True)
class Recollection:
    """What a model remembered of what it had read, by figure, and what its reference did of the same texts."""

    own: Mapping[str, Sums]
    theirs: Mapping[str, Sums]
    num_pairs: int

    def result(self) -> dict[str, float]:
        """The model's figures with standard errors over texts, and what guessing gives for `mqar_choice`."""
        return _figures(self.own, self.num_pairs)

    def reference(self) -> dict[str, float]:
        """The reference's figures."""
        return _figures(self.theirs, self.num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Each text's sums, by figure, so that comparisons on the same texts can be paired."""
        return {"result": _sums(self.own), "reference": _sums(self.theirs)}


def recollect(
    score: Scorer, reference: Scorer | None, haystack: Haystack, blocks_NT: Ints, recall: Recall, advance: Progress,
    units: Units = UNKEPT,
) -> Recollection:  # fmt: skip
    """Put every task to both models; the same scorer twice is run once.

    haystack: with twice as many words as there are pairs. blocks_NT: text for perplexity by position, in blocks of
    one token more than the longest context. units: texts that they hold are not read again. Raises StageFailed where a
    model's output is not finite.
    """
    scorers = list(dict.fromkeys(each for each in (score, reference) if each is not None))

    def of_each(number: int) -> list[dict[str, TextSum]]:
        return [_of_text(each, haystack, blocks_NT[number : number + 1], recall, number) for each in scorers]

    texts = []
    for number in range(recall.samples):
        texts.append(units.once(f"recall text {number}", partial(of_each, number)))
        advance(1)
    told = dict(zip(scorers, (_gather(own) for own in zip(*texts, strict=True)), strict=True))
    return Recollection(told[score], told[reference] if reference is not None else {}, recall.mqar_pairs)


def rows_by_bucket(edges: Sequence[int]) -> dict[int, Ints]:
    """By the end b of each bucket, rows after which more than the bucket before's and up to b tokens have been read."""
    return {
        last: np.unique(np.linspace(first, last - 1, _BUCKET_ROWS).astype(np.int64))
        for first, last in pairwise([0, *edges])
    }


def _of_text(score: Scorer, haystack: Haystack, block_1T: Ints, recall: Recall, number: int) -> dict[str, TextSum]:
    """By figure."""
    values: dict[str, list[Values]] = defaultdict(list)
    for length in recall.contexts:
        answers = ask(score, mqar_probe(haystack, number, recall.samples, recall.mqar_pairs, length))
        values[f"mqar@{length}"].append(answers.right_R)
        values[f"mqar_choice@{length}"].append(answers.chosen_R)
        values[f"mqar_logprob@{length}"].append(answers.logprob_R)
        for depth in recall.needle_depths:
            answers = ask(score, needle_probe(haystack, number, recall.samples, depth, length))
            found_1 = np.array([answers.right_R.all()])
            values[f"needle@{length}"].append(found_1)
            values[needle_at(length, depth)].append(found_1)
            values[f"needle_logprob@{length}"].append(answers.logprob_R)
    for ids_T in block_1T:
        for edge, nll_R in _by_position(score, ids_T, recall.edges):
            values[f"perplexity@{edge}"].append(nll_R)
    told = {name: np.concatenate(each) for name, each in values.items()}
    for name, each in told.items():
        if not np.isfinite(each).all():
            raise StageFailed("evaluate", f"the model's output is not finite ({name})", "read shorter contexts")
    return {name: [float(each.sum()), len(each)] for name, each in told.items()}


def _by_position(score: Scorer, ids_T: Ints, edges: Sequence[int]) -> Iterator[tuple[int, Values]]:
    buckets = rows_by_bucket(edges)
    rows_R = np.concatenate(list(buckets.values()))
    nll_R = quality.token_nll(score(ids_T[:-1], rows_R), ids_T[rows_R + 1])
    ends = np.cumsum([len(rows) for rows in buckets.values()])
    return zip(buckets, np.split(nll_R, ends[:-1]), strict=True)


def _gather(texts: Sequence[Mapping[str, TextSum]]) -> dict[str, Sums]:
    """By figure, over the texts that have it: short text holds fewer blocks for perplexity than samples are asked."""
    return {
        name: Sums(
            np.array([text[name][0] for text in texts if name in text], np.float64),
            np.array([text[name][1] for text in texts if name in text], np.int64),
        )
        for name in texts[0]
    }


def _sums(sums: Mapping[str, Sums]) -> dict[str, Any]:
    return {
        name: {"sums": each.sums_N.tolist(), "num_predictions": each.counts_N.tolist()} for name, each in sums.items()
    }


def _figures(sums: Mapping[str, Sums], num_pairs: int) -> dict[str, float]:
    if not sums:
        return {}
    figures = {"mqar_chance": 1 / num_pairs}
    for name, each in sums.items():
        found = quality.cluster_mean(each.sums_N, each.counts_N)
        if name.startswith("perplexity"):
            found = quality.exponential(found)
        figures |= {name: found.value, f"{name}_se": found.se}
    return figures
