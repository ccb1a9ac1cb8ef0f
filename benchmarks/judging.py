"""Folders and text in, an evaluation out: what the `evaluate` stage and `compress eval` share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.benchmarks.evaluation import Evaluation, Question, evaluate, questions
from compress.benchmarks.haystack import Haystack
from compress.benchmarks.quality import Floats, Ints
from compress.benchmarks.recall import Recall
from compress.benchmarks.recollection import recollect
from compress.benchmarks.scorers import Scorer, logits_of, open_scorer, task_of
from compress.benchmarks.vocabularies import check_comparable, edges, two_ways
from compress.data.spelling import spelled_bytes
from compress.data.text import TextData
from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.folder import config_of
from compress.models.heads import Task
from compress.models.load import load_tokenizer
from compress.models.origins import Origins, answering_channels
from compress.stage import Reporter
from compress.units import UNKEPT, Units

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def judge(
    subject: Path, reference: Path | None, data: TextData, *,
    sequence_length: int, max_tokens: int, threads: int, reporter: Reporter, recall: Recall | None = None,
    units: Units = UNKEPT,
) -> Evaluation:  # fmt: skip
    """Evaluate the model in `subject` on the eval split, beside the one in `reference` where there is one.

    recall: what else is asked, of language models only, and where; of the subject alone where its vocabulary is not the
    reference's. units: what they hold is not asked again. Where the two tokenizers disagree on this text, each model
    reads its own tokens of the same pieces of it, see `two_ways`.
    Raises StageFailed where the text is too short, or where a model's output is not finite.
    """
    task = task_of(reference or subject)
    tokenizer = load_tokenizer(subject)
    asked = asked_of(data, tokenizer, task, sequence_length, max_tokens)
    alike = True
    if reference is not None and not _same_tokenizer_file(subject, reference):
        other = load_tokenizer(reference)
        theirs = asked_of(data, other, task, sequence_length, max_tokens)
        alike = [question.ids_T.tolist() for question in asked] == [question.ids_T.tolist() for question in theirs]
        if not alike:
            check_comparable(subject)
            asked = two_ways(data, tokenizer, other, task, sequence_length, max_tokens)
            reporter.log.info("evaluate: two vocabularies: bits per byte of the same text, and no perplexities")
    # before any model is loaded: the text may be too short
    material = None if recall is None else _material(data, tokenizer, recall)
    score = open_scorer(subject, task, threads=threads)
    beside = score if reference == subject else None
    if reference is not None and beside is None:
        beside = open_scorer(reference, task, threads=threads)
        beside = _of_channels(beside, subject, reference) if task == "embedding" else beside
    with reporter.progress("evaluate", len(asked)) as advance:
        found = evaluate(score, beside, asked, task, advance, units)
    if recall is None or material is None:
        return found
    with reporter.progress("recall", recall.samples) as advance:
        asks = (score, beside if alike else None)
        return replace(found, recollection=recollect(*asks, *material, recall, advance, units))


def _of_channels(score: Scorer, subject: Path, reference: Path) -> Scorer:
    """What `score` says of the reference's hidden states, of the channels that the subject still has.

    Raises StageFailed where the subject is of another width and does not say which they are.
    """
    ours, theirs = config_of(subject) or {}, config_of(reference) or {}
    channels = answering_channels(Origins.of(ours), Origins.of(theirs))
    if channels is None:
        widths = shape_of(ours).hidden_size, shape_of(theirs).hidden_size
        if widths[0] != widths[1]:
            what = f"hidden states of {widths[0]} channels can't be compared with {widths[1]}"
            raise StageFailed("evaluate", what, "compare with the model that it was cut from")
        return score

    def of_channels(ids_T: Ints, rows: Ints | slice = slice(None)) -> Floats:
        return score(ids_T, rows)[:, channels]

    return of_channels


def compare(subject: nn.Module, reference: nn.Module, blocks_NT: Ints) -> Evaluation:
    """Evaluate one causal model beside another, both loaded, on blocks of token ids (N, T)."""
    asked = questions(blocks_NT, "causal")
    with Reporter().progress("compare", len(asked)) as advance:
        return evaluate(logits_of(subject), logits_of(reference), asked, "causal", advance)


def asked_of(
    data: TextData, tokenizer: PreTrainedTokenizerBase, task: Task, sequence_length: int, max_tokens: int
) -> list[Question]:
    """Blocks of the eval text as questions, each between an encoder's first and last token where it has them.

    Raises StageFailed where the text makes fewer than two.
    """
    inner = sequence_length if task == "causal" else sequence_length - 2
    blocks_NT = _blocks(data, tokenizer, inner, max_tokens, "sequence_length")
    if task != "causal":
        blocks_NT = _with_edges(blocks_NT, tokenizer)
    lengths_V = spelled_bytes(tokenizer) if task == "causal" else None
    return questions(blocks_NT, task, tokenizer.mask_token_id, lengths_V)


def _blocks(data: TextData, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int, option: str) -> Ints:
    """At least two blocks of the eval text (N, length)."""
    blocks_NT: Ints = data.blocks("eval", tokenizer, length, max_tokens)
    if len(blocks_NT) < 2:
        raise StageFailed(
            "evaluate", f"the eval text has {len(blocks_NT)} block(s) of {length} tokens; 2 are the least",
            f"give more text, more tokens or a shorter {option}",
        )  # fmt: skip
    return blocks_NT


def _material(data: TextData, tokenizer: PreTrainedTokenizerBase, recall: Recall) -> tuple[Haystack, Ints]:
    """The text that recall is asked in, as sentences and in blocks of one token more than the longest context."""
    length = recall.longest + 1
    blocks_NT = _blocks(data, tokenizer, length, recall.samples * length, "recall.contexts")
    haystack = Haystack(data.texts("eval"), tokenizer)
    needed, found = 2 * recall.mqar_pairs, len(haystack.words)
    if found < needed:
        what = f"{needed} lower-case words that are one token are needed, and the eval text has {found}"
        raise StageFailed("evaluate.recall.mqar_pairs", what, "ask for fewer pairs, or give more text")
    return haystack, blocks_NT


def _with_edges(blocks_NT: Ints, tokenizer: PreTrainedTokenizerBase) -> Ints:
    """Each block between an encoder's first and last token, where its tokenizer has them."""
    first, last = edges(tokenizer)
    return np.array([[*first, *block_T, *last] for block_T in blocks_NT], np.int64)


def _same_tokenizer_file(first: Path, second: Path) -> bool:
    files = [folder / "tokenizer.json" for folder in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
