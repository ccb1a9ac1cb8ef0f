"""A student whose vocabulary is a part of its teacher's: each reads its own tokens of the same text.

What the teacher says after a place in the text is compared with what the student says after the same place, where
tokens of both end there. The probability of a token that the student lacks counts for the first of the student's tokens
that it is written in: none is lost, and of tokens that both have each counts for itself. Where the student is in the
midst of one of its teacher's tokens, the teacher says nothing, and the text is the target in its place.

B sequences, T tokens of the student's, S of the teacher's; V, W their vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.data.config import Split
from compress.data.spelling import Ints, boundaries, spelled_bytes
from compress.data.text import TextData, block_starts, token_ids
from compress.errors import StageFailed
from compress.models.anatomy import ModelShape
from compress.train.options import LossWeights, TrainingOptions

Ids = NDArray[np.int64]
NOWHERE = -1
"""The place of a token of the student's at whose end no token of the teacher's ends."""
THEIRS = ("their_ids", "places")
"""The columns of a batch that are the teacher's."""
_BY_TOKEN = ("hidden", "attention_map", "attention_output")


@dataclass(frozen=True)
class TwoWays:
    """Sequences of the student's tokens (num, T) with the teacher's of the same text (num, S), padded at the end.

    places_NT: which of the teacher's tokens ends where each of the student's does, or NOWHERE. pieces_W: for each token
    of the teacher's the student's token that it begins with, V where there is none.
    """

    ids_NT: Ids
    their_ids_NS: Ids
    places_NT: Ids
    pieces_W: Ids

    @property
    def shape(self) -> tuple[int, ...]:
        """(num, T)."""
        return tuple(self.ids_NT.shape)

    @property
    def shared_positions(self) -> float:
        """The share of the tokens that are predicted of which the teacher says something."""
        return float((self.places_NT[:, :-1] != NOWHERE).mean())

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, rows: slice) -> TwoWays:
        return TwoWays(self.ids_NT[rows], self.their_ids_NS[rows], self.places_NT[rows], self.pieces_W)

    def theirs(self, row: int) -> dict[str, Tensor]:
        """The columns of one sequence that are the teacher's."""
        columns = zip(THEIRS, (self.their_ids_NS, self.places_NT), strict=True)
        return {name: torch.from_numpy(column[row]) for name, column in columns}


def is_part_of(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether the student's vocabulary is another one than the teacher's, and all of its tokens are the teacher's."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    return ours != theirs and ours.keys() <= theirs.keys()


def check_objective(options: TrainingOptions, model: ModelShape) -> None:
    """Raises StageFailed for what two vocabularies leave without a meaning."""
    if model.family.kind != "decoder":
        what = "has more tokens than the model, and what encoders say of tokens is not comparable then"
        raise StageFailed("teacher", what, "distil before the vocabulary is reduced, or towards a model after it")
    if options.data == "generated":
        what = "the teacher would write in its own tokens, and the model has others"
        raise StageFailed("data", what, "use data: text")
    weights: LossWeights = options.loss
    for name in _BY_TOKEN:
        if getattr(weights, name):
            what = "compares layers token by token, and the teacher has other tokens"
            raise StageFailed(f"loss.{name}", what, "use kl, skew_kl or ce")


def two_ways(
    data: TextData, split: Split, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, length: int,
    max_tokens: int,
) -> TwoWays:  # fmt: skip
    """Blocks of the student's tokens, with the teacher's tokens from the first shared place on.

    Of the eval text those of `TextData.blocks`; of the train text those with the most of the teacher's tokens that are
    split: the others the student knows already. Raises StageFailed where there is too little text, or where the two do
    not spell the same.
    """
    texts = data.texts(split)
    ids_N, their_ids_M = (np.asarray(token_ids(texts, each), np.int64) for each in (student, teacher))
    ends_N, ends_M = boundaries(ids_N, spelled_bytes(student)), boundaries(their_ids_M, spelled_bytes(teacher))
    if ends_N[-1] != ends_M[-1]:
        fix = "choose a teacher whose tokenizer normalises text alike"
        raise StageFailed("teacher", f"its tokenizer does not spell the same {split} text as the student's", fix)
    if split == "train":
        starts = _most_split(ends_N, ends_M, block_starts(len(ids_N), length, None, split), length, max_tokens)
    else:
        starts = block_starts(len(ids_N), length, max_tokens, split)
    ids_NT = ids_N[starts[:, None] + np.arange(length)]
    their_ids_NS = np.zeros_like(ids_NT)
    places_NT = np.full_like(ids_NT, NOWHERE)
    for row, start in enumerate(starts):
        begin_M = _first_shared(ends_N[start:], ends_M)
        read = their_ids_M[begin_M : begin_M + length]
        their_ids_NS[row, : len(read)] = read
        ends_T = ends_N[start + 1 : start + 1 + length]
        found = np.searchsorted(ends_M, ends_T)
        place = found - 1 - begin_M
        shared = (ends_M[found] == ends_T) & (place >= 0) & (place < len(read))
        places_NT[row, shared] = place[shared]
    return TwoWays(ids_NT, their_ids_NS, places_NT, first_pieces(student, teacher))


def first_pieces(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Ids:
    """For each of the teacher's ids (W,) the student's token that it begins with; the number of those if there is none.

    A token that the student has begins with itself.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    backend: Any = student.backend_tokenizer
    none = max(ours.values()) + 1
    pieces_W = np.full(max(theirs.values()) + 1, none, np.int64)
    for name, id_ in theirs.items():
        if name in ours:
            pieces_W[id_] = ours[name]
        elif tokens := backend.model.tokenize(name):
            pieces_W[id_] = tokens[0].id
    return pieces_W


def in_students_tokens(logits_BSW: Tensor, places_BT: Tensor, pieces_W: Tensor, vocab_size: int) -> Tensor:
    """What the teacher says, at the student's places and of the student's tokens: log-probabilities (B, T, V).

    Rows of places that are NOWHERE mean nothing. Ids that are no token of the teacher's count for nothing.
    """
    rows_BT = places_BT.clamp_min(0)
    num_read = logits_BSW.shape[-1]
    pieces = pieces_W[:num_read].clamp_max(vocab_size)
    said_NW = logits_BSW[torch.arange(len(rows_BT), device=rows_BT.device)[:, None], rows_BT].flatten(0, 1)
    said_NW = said_NW[:, : len(pieces)].float().softmax(-1)
    found_NV = said_NW.new_zeros(len(said_NW), vocab_size + 1).index_add_(1, pieces, said_NW)[:, :-1]
    smallest = torch.finfo(torch.float32).tiny
    return found_NV.clamp_min(smallest).log().view(*places_BT.shape, vocab_size)


def _most_split(ends_N: Ints, ends_M: Ints, starts: Ids, length: int, max_tokens: int) -> Ids:
    """Of blocks that begin at `starts`, as many as `max_tokens` are: those in which most of the teacher's are split.

    Each counts once, into however many pieces: a run of spaces would outweigh a page of words.
    """
    shared_N = np.isin(ends_N, ends_M, assume_unique=True)  # ends_N[0] is the text's start
    begins_N = shared_N[:-1] & ~shared_N[1:]
    splits_B = begins_N[starts[:, None] + np.arange(length)].sum(1)
    return np.sort(starts[np.argsort(-splits_B, kind="stable")[: max(1, max_tokens // length)]])


def _first_shared(ends_N: Ids | Any, ends_M: Ids | Any) -> int:
    """The index of the first of `ends_M`, rising, that is one of `ends_N`."""
    found = np.searchsorted(ends_M, ends_N)
    alike = np.flatnonzero(ends_M[found] == ends_N)
    return int(found[alike[0]])
