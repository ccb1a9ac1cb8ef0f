"""Folders and text in, an evaluation out: what the `evaluate` stage and `compress eval` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.benchmarks.evaluation import Evaluation, evaluate, questions
from compress.benchmarks.quality import Ints
from compress.benchmarks.scorers import logits_of, open_scorer, task_of
from compress.data.text import TextData
from compress.errors import StageFailed
from compress.models.load import load_tokenizer
from compress.stage import Reporter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def judge(
    subject: Path, reference: Path | None, data: TextData, *,
    sequence_length: int, max_tokens: int, threads: int, reporter: Reporter,
) -> Evaluation:  # fmt: skip
    """Evaluate the model in `subject` on the eval split, beside the one in `reference` where there is one.

    Raises StageFailed where the two folders' tokenizers disagree on this text (then no figure of one could be held
    against the other's), where there are fewer than two blocks, or where a model's output is not finite.
    """
    task = task_of(reference or subject)
    tokenizer = load_tokenizer(reference or subject)
    inner = sequence_length if task == "causal" else sequence_length - 2
    blocks_NT: Ints = data.blocks("eval", tokenizer, inner, max_tokens)
    if len(blocks_NT) < 2:
        raise StageFailed(
            "evaluate", f"the eval text has {len(blocks_NT)} block(s) of {sequence_length} tokens; 2 are the least",
            "give more text, more tokens or a shorter sequence_length",
        )  # fmt: skip
    if reference is not None and not _same_tokenizer_file(subject, reference):
        theirs_NT = data.blocks("eval", load_tokenizer(subject), inner, max_tokens)
        if not np.array_equal(blocks_NT, theirs_NT):
            raise StageFailed("evaluate", f"the tokenizers of {subject} and {reference} differ", "use the same one")
    if task != "causal":
        blocks_NT = _with_edges(blocks_NT, tokenizer)
    score = open_scorer(subject, task, threads=threads)
    beside = score if reference == subject else None
    if reference is not None and beside is None:
        beside = open_scorer(reference, task, threads=threads)
    asked = questions(blocks_NT, task, tokenizer.mask_token_id)
    with reporter.progress("evaluate", len(asked)) as advance:
        return evaluate(score, beside, asked, task, advance)


def compare(subject: nn.Module, reference: nn.Module, blocks_NT: Ints) -> Evaluation:
    """Evaluate one causal model beside another, both loaded, on blocks of token ids (N, T)."""
    asked = questions(blocks_NT, "causal")
    with Reporter().progress("compare", len(asked)) as advance:
        return evaluate(logits_of(subject), logits_of(reference), asked, "causal", advance)


def _with_edges(blocks_NT: Ints, tokenizer: PreTrainedTokenizerBase) -> Ints:
    """Each block between an encoder's first and last token, where its tokenizer has them."""
    first, last = ([] if edge is None else [edge] for edge in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return np.array([[*first, *block_T, *last] for block_T in blocks_NT], np.int64)


def _same_tokenizer_file(first: Path, second: Path) -> bool:
    files = [folder / "tokenizer.json" for folder in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
