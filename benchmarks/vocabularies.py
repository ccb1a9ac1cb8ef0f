"""Two models with different vocabularies, asked about the same pieces of text, each in its own tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.benchmarks.evaluation import Question, next_tokens
from compress.benchmarks.quality import Ints
from compress.data.spelling import Pair, Tokens, pairs, spelled_bytes
from compress.data.text import TextData, block_starts, token_ids
from compress.errors import StageFailed
from compress.models.folder import config_of
from compress.models.heads import Task, architecture_of, named_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_comparable(subject: Path) -> None:
    """Raises StageFailed for a model that says something of each token without predicting text."""
    architecture = architecture_of(config_of(subject) or {})
    head = named_head(architecture)
    if head is not None and head.per_token:
        what = f"{architecture} says something of tokens, and the two models have different ones"
        raise StageFailed("evaluate", what, "compare it with a model of its own vocabulary: against: that stage's id")


def two_ways(
    data: TextData, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, task: Task,
    sequence_length: int, max_tokens: int,
) -> list[Question]:  # fmt: skip
    """Pieces of the eval text as questions, each with its `theirs`: the same piece in the tokens of `other`.

    They are the blocks of `other`, cut to where tokens of both begin and end, and to `sequence_length` of either; what
    is predicted is the same bytes. Raises StageFailed where there are fewer than two, or where the tokenizers do not
    spell the same text.
    """
    texts = data.texts("eval")
    theirs, ours = (
        Tokens(np.asarray(token_ids(texts, each), np.int64), spelled_bytes(each)) for each in (other, tokenizer)
    )
    spelt = {_spelt(each, tokens.ids_N) for each, tokens in ((other, theirs), (tokenizer, ours))}
    if len(spelt) > 1:
        what = "the two tokenizers do not spell the same text"
        raise StageFailed("evaluate", what, "use ones that normalise it alike")
    length = sequence_length if task == "causal" else sequence_length - 2
    starts = block_starts(len(theirs.ids_N), length, max_tokens, "eval")
    found = list(pairs(theirs, ours, starts, length))
    if len(found) < 2:
        raise StageFailed("evaluate", f"the eval text has {len(found)} blocks that both models can be asked of",
                          "give more text, more tokens or another sequence_length")  # fmt: skip
    if task == "causal":
        return [_predicted(pair, ours.lengths_V, theirs.lengths_V) for pair in found]
    return [replace(_whole(pair.ids_M, tokenizer), theirs=_whole(pair.ids_N, other)) for pair in found]


def edges(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """An encoder's first and last token, where its tokenizer has them."""
    first, last = ([] if edge is None else [edge] for edge in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return first, last


def _predicted(pair: Pair, lengths_V: Ints, their_lengths_V: Ints) -> Question:
    theirs = next_tokens(pair.ids_N, pair.first_N, their_lengths_V)
    return replace(next_tokens(pair.ids_M, pair.first_M, lengths_V), theirs=theirs)


def _spelt(tokenizer: PreTrainedTokenizerBase, ids_N: Ints) -> str:
    text = str(tokenizer.decode(ids_N.tolist(), clean_up_tokenization_spaces=False))
    ends = [token for token in (tokenizer.eos_token, tokenizer.sep_token) if token]
    for end in ends:  # what it is called has no say
        text = text.replace(str(end), "\0")
    return text


def _whole(ids_T: Ints, tokenizer: PreTrainedTokenizerBase) -> Question:
    first, last = edges(tokenizer)
    return Question(np.array([*first, *ids_T, *last], np.int64), slice(None), None)
