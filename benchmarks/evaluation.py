"""One pass over blocks of text: what a model predicts there, alone and beside a reference model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.benchmarks import quality
from compress.benchmarks.quality import Estimate, Floats, Ints
from compress.benchmarks.recollection import Recollection
from compress.benchmarks.scorers import Scorer
from compress.data.spelling import lengths_of
from compress.errors import StageFailed
from compress.models.heads import Task
from compress.stage import Progress
from compress.units import UNKEPT, Units

_MASKED_SHARE = 0.15  # of a masked language model's tokens, as in its own training (BERT, sec. 3.1)


@dataclass(frozen=True)
class Question:
    """What a model is shown (ids, (T,)), which rows of its answer count, and the true token of each (R,), if any.

    num_bytes: of the text that those tokens spell; 0 where that says nothing. theirs: the same text as the reference is
    shown it, where its vocabulary is another.
    """

    ids_T: Ints
    rows: Ints | slice
    targets_R: Ints | None
    num_bytes: int = 0
    theirs: Question | None = None


@dataclass(frozen=True)
class Evaluation:
    """Sums over each of N blocks, by figure, and the number of predictions (N,) that they are sums of.

    num_bytes_N: of the text that was predicted, where all of it was. num_tokens: how many tokens of text the model was
    shown. same_tokens: whether the reference was shown the same ones. recollection: what they remembered, where it was
    asked.
    """

    num_predictions_N: Ints
    sums: Mapping[str, NDArray[np.float64]]
    num_bytes_N: Ints
    num_tokens: int
    same_tokens: bool = True
    recollection: Recollection | None = None

    def mean(self, figure: str) -> Estimate:
        """The mean over predictions, with its standard error over blocks."""
        return quality.cluster_mean(self.sums[figure], self.num_predictions_N)

    def of_blocks(self, rows: slice) -> Evaluation:
        """What these blocks alone say, of text; what else was asked is left out."""
        counts = self.num_predictions_N[rows]
        num_tokens = self.num_tokens * len(counts) // len(self.num_predictions_N)
        sums = {figure: values_N[rows] for figure, values_N in self.sums.items()}
        return Evaluation(counts, sums, self.num_bytes_N[rows], num_tokens, self.same_tokens)

    def result(self) -> dict[str, float]:
        """The model's own figures, those of its distance from the reference, and the paired ratios.

        Where the two have different vocabularies there are no perplexities, which could not be compared.
        """
        figures = self._of("nll")
        if self.same_tokens and "nll" in self.sums and "reference_nll" in self.sums:
            difference_N = self.sums["nll"] - self.sums["reference_nll"]
            paired = quality.cluster_mean(difference_N, self.num_predictions_N)
            figures |= _named("perplexity_ratio", quality.exponential(paired))
        if "reference_nll" in self.sums and self.num_bytes_N.any():
            ratio = quality.cluster_mean(self.sums["nll"], self.sums["reference_nll"])
            figures |= _named("bits_per_byte_ratio", ratio)
        for figure in ("kl", "top1_agreement", "cosine"):
            if figure in self.sums:
                figures |= _named(figure, self.mean(figure))
        return figures | (self.recollection.result() if self.recollection else {})

    def reference(self) -> dict[str, float]:
        """The reference's own figures on the same blocks."""
        if "reference_nll" not in self.sums:
            return {}
        remembered = self.recollection.reference() if self.recollection else {}
        return self._of("reference_nll") | remembered

    def to_json(self) -> dict[str, Any]:
        """Each block's sums, so that a later comparison on the same blocks can be paired."""
        sums = {figure: values.tolist() for figure, values in self.sums.items()}
        recall = {"recall": self.recollection.to_json()} if self.recollection else {}
        num_blocks = len(self.num_predictions_N)
        counts = {"num_predictions": self.num_predictions_N.tolist(), "num_bytes": self.num_bytes_N.tolist()}
        return {"num_blocks": num_blocks, **counts} | sums | recall

    @classmethod
    def from_json(cls, written: Mapping[str, Any], num_tokens: int) -> Evaluation:
        """The inverse of `to_json`, of models with one vocabulary, without what else was asked."""
        counts = {"num_predictions", "num_bytes", "num_blocks", "recall"}
        sums = {figure: np.array(values) for figure, values in written.items() if figure not in counts}
        return cls(np.array(written["num_predictions"]), sums, np.array(written["num_bytes"]), num_tokens)

    def _of(self, nll: str) -> dict[str, float]:
        """What follows from one model's negative log-likelihoods, if it has any."""
        figures: dict[str, float] = {}
        if nll in self.sums and self.same_tokens:
            figures |= _named("perplexity", quality.exponential(self.mean(nll)))
        if nll in self.sums and self.num_bytes_N.any():
            figures |= _named("bits_per_byte", quality.bits_per_byte(self.sums[nll], self.num_bytes_N))
        return figures


def questions(blocks_NT: Ints, task: Task, mask_id: int | None = None, lengths_V: Ints | None = None) -> list[Question]:
    """One question a block: the next token of every prefix, or the hidden tokens of a masked language model.

    Which tokens are hidden depends on the block's number only, so every model is asked the same. lengths_V: how many
    bytes of text each token spells.
    """
    if task == "causal":
        return [next_tokens(ids_T, 1, lengths_V) for ids_T in blocks_NT]
    if task != "masked" or mask_id is None:
        return [Question(ids_T, slice(None), None) for ids_T in blocks_NT]
    asked = []
    for number, ids_T in enumerate(blocks_NT):
        num_hidden = max(1, round(_MASKED_SHARE * (len(ids_T) - 2)))
        inner = np.random.default_rng(number).choice(len(ids_T) - 2, num_hidden, replace=False)
        rows = np.sort(inner) + 1  # the first and last token are [CLS] and [SEP]
        hidden_T = ids_T.copy()
        hidden_T[rows] = mask_id
        asked.append(Question(hidden_T, rows, ids_T[rows]))
    return asked


def next_tokens(ids_T: Ints, first: int, lengths_V: Ints | None) -> Question:
    """What each token is from the `first` on, given all before it."""
    targets_R = ids_T[first:]
    num_bytes = 0 if lengths_V is None else int(lengths_of(targets_R, lengths_V).sum())
    return Question(ids_T, slice(first - 1, -1), targets_R, num_bytes)


def evaluate(
    score: Scorer, reference: Scorer | None, asked: Sequence[Question], task: Task, advance: Progress,
    units: Units = UNKEPT,
) -> Evaluation:  # fmt: skip
    """Ask both models every question, one block in memory at a time. The same scorer twice is run once.

    units: blocks that they hold are not asked again. Raises StageFailed where a model answers with numbers that are not
    finite.
    """

    def sums_of(number: int, question: Question) -> dict[str, Any]:
        answer = _finite(score(question.ids_T, question.rows), number)
        theirs = None
        if reference is not None:
            same, shown = reference is score, question.theirs or question
            theirs = answer if same else _finite(reference(shown.ids_T, shown.rows), number)
        sums = {figure: float(values.sum()) for figure, values in _figures(answer, theirs, question, task)}
        return {"sums": sums, "predictions": len(answer)}

    found = []
    for number, question in enumerate(asked):
        found.append(units.once(f"block {number}", partial(sums_of, number, question)))
        advance(1)
    sums = {figure: np.array([each["sums"][figure] for each in found]) for figure in found[0]["sums"]}
    counts = np.array([each["predictions"] for each in found])
    num_bytes = np.array([question.num_bytes for question in asked])
    num_tokens = sum(len(question.ids_T) for question in asked)
    return Evaluation(counts, sums, num_bytes, num_tokens, all(question.theirs is None for question in asked))


def _figures(
    answer: Floats, theirs: Floats | None, question: Question, task: Task
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    if question.targets_R is not None:
        yield "nll", quality.token_nll(answer, question.targets_R)
        if theirs is not None:
            targets_R = (question.theirs or question).targets_R
            assert targets_R is not None
            yield "reference_nll", quality.token_nll(theirs, targets_R)
    if theirs is None or (question.theirs is not None and task == "causal"):
        return
    if task == "embedding":
        yield "cosine", quality.cosine(theirs, answer)
        return
    if task != "classification":
        size = min(theirs.shape[-1], answer.shape[-1])  # beyond it one vocabulary is padded, and holds no tokens
        theirs, answer = theirs[..., :size], answer[..., :size]
    yield "kl", quality.token_kl(theirs, answer)
    yield "top1_agreement", quality.top1_agreement(theirs, answer)


def _finite(answer: Floats, number: int) -> Floats:
    if not np.isfinite(answer).all():
        raise StageFailed(
            "evaluate", f"the model's output on block {number} is not finite", "compare with the stage before it"
        )
    return answer


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_se": estimate.se}
