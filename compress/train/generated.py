"""Text that a teacher writes itself: where there is no other, or none that is like what the teacher was trained on.

LLM-QAT (Liu et al., 2023): a document's first token is drawn from the whole vocabulary, the next three to five are the
likeliest ones, which make sense of it, and all others are drawn from what the teacher predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import StageFailed
from compress.mixers.cache_name import CACHE
from compress.models.parts import Parts
from compress.stage import Reporter, StageContext
from compress.train.options import Precision, StepOptions
from compress.train.precision import uses_bf16
from compress.train.teacher import load_teacher
from compress.units import Unit, Units

Ids = NDArray[np.int64]
_LIKELIEST = (3, 5)
"""The least and the most tokens after the first one that are the likeliest ones."""
_CHUNK_TOKENS = 16_384
"""At most so many are written at a time: what a kill loses, and what bounds the cache of keys and values."""
_CHUNK_DOCUMENTS = 64
_NONE = -1
"""Stands behind the end of a document."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: those that every document starts with, those that it may have, those that end it."""

    start: tuple[int, ...]
    plain: Ids
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Vocabulary:
        """Without special tokens, which packed text has not either, but the beginning where the tokenizer puts one."""
        settings = (tokenizer, model.config, model.generation_config)
        named = [getattr(each, "eos_token_id", None) for each in settings]
        known = range(model.config.vocab_size)
        listed = [id_ for each in named for id_ in (each if isinstance(each, list) else [each])]
        ends = {id_ for id_ in listed if isinstance(id_, int) and id_ in known}
        plain = {id_ for id_ in tokenizer.get_vocab().values() if id_ in known} - {*tokenizer.all_special_ids, *ends}
        start = tuple(id_ for id_ in tokenizer("")["input_ids"] if id_ == tokenizer.bos_token_id)
        return cls(start, np.array(sorted(plain), np.int64), tuple(sorted(ends)))


@dataclass(frozen=True)
class Author:
    """A teacher that writes. load: the model in eval mode, on its device; called when something is to be written."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def model(self) -> PreTrainedModel:
        """The teacher. Raises StageFailed where it has no head to write with."""
        model = self.load()
        if not Parts(model).prefix:
            raise StageFailed("data", "the teacher is a backbone without a head and writes no text", "use data: text")
        return model

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What documents consist of."""
        return Vocabulary.of(self.tokenizer, self.model)

    @torch.inference_mode()
    def write(self, num: int, length: int, rng: np.random.Generator) -> Ids:
        """(num, length): documents that end before, with their end token and _NONE behind it, or are cut there."""
        vocabulary, begun = self.vocabulary, len(self.vocabulary.start) + 1
        ids_BT = np.full((num, length), _NONE, np.int64)
        ids_BT[:, : begun - 1] = vocabulary.start
        ids_BT[:, begun - 1] = rng.choice(vocabulary.plain, num)
        drawn_BT = np.arange(length) >= begun + rng.integers(_LIKELIEST[0], _LIKELIEST[1] + 1, (num, 1))
        chance_BT, rows_B = rng.random((num, length)), np.arange(num)
        new_BT, cache = ids_BT[:, :begun], None
        for t in range(begun, length):
            given_BT = torch.from_numpy(new_BT).to(self.model.device)
            output: Any = self.model(input_ids=given_BT, use_cache=True, **{CACHE: cache})
            cache = getattr(output, CACHE)
            token_B = self._next(output.logits[:, -1].float(), chance_BT[rows_B, t], drawn_BT[rows_B, t])
            ids_BT[rows_B, t] = token_B
            goes_on_B = ~np.isin(token_B, vocabulary.ends)
            rows_B, new_BT = rows_B[goes_on_B], token_B[goes_on_B][:, None]
            if not len(rows_B):
                break
            if not goes_on_B.all():
                cache.batch_select_indices(torch.from_numpy(goes_on_B.nonzero()[0]).to(self.model.device))
        return ids_BT

    def _next(self, logits_BV: Tensor, chance_B: NDArray[np.float64], drawn_B: NDArray[np.bool_]) -> Ids:
        """(B,): where `drawn_B`, what `chance_B`, in [0, 1), falls on; elsewhere the likeliest that ends nothing."""
        plain_BV = logits_BV + self._barred_V
        likeliest_B = plain_BV.argmax(-1)
        plain_BV[:, self.vocabulary.ends] = logits_BV[:, self.vocabulary.ends]
        cumulative_BV = plain_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
        if not cumulative_BV[:, -1].isfinite().all():
            raise StageFailed("data", "the teacher's logits are not finite", "is the model whole?")
        chance_B1 = torch.from_numpy(chance_B).to(logits_BV.device)[:, None]
        token_B = torch.searchsorted(cumulative_BV, chance_B1 * cumulative_BV[:, -1:], right=True)[:, 0]
        return np.where(drawn_B, token_B.cpu().numpy(), likeliest_B.cpu().numpy())

    @cached_property
    def _barred_V(self) -> Tensor:
        """0 for the tokens that a document may have and -inf for others, to be added to logits."""
        barred_V = torch.full((self.model.config.vocab_size,), -torch.inf, device=self.model.device)
        barred_V[self.vocabulary.plain] = 0.0
        return barred_V


def train_blocks(
    options: StepOptions, num_tokens: int, tokenizer: PreTrainedTokenizerBase, context: StageContext,
    teacher: Path | None, teacher_bits: int | None = None,
) -> Ids:  # fmt: skip
    """Blocks of about `num_tokens` to train on: of a pipeline's text or, where options say so, written by `teacher`.

    teacher: the folder of a model with `tokenizer`. Raises StageFailed where there is too little text, or where the
    teacher can't write any.
    """
    length = options.sequence_length
    if options.data == "text":
        return context.data.blocks("train", tokenizer, length, num_tokens)
    assert teacher is not None
    author = Author(partial(_to_write, teacher, teacher_bits, options.precision), tokenizer)
    return generate_blocks(author, max(1, num_tokens // length), length, context.seed, context.work, context.reporter)


def generate_blocks(author: Author, num_blocks: int, length: int, seed: int, work: Path, reporter: Reporter) -> Ids:
    """(num_blocks, length) tokens that `author` writes.

    A document that fills a block has one to itself; shorter ones follow one another, each behind the end token of the
    one before, as text is packed. work: survives kills, and what lies there is not written again: of two calls, the one
    for fewer blocks gets the first of the other's. The same seed and calls give the same tokens on the same machine.
    Raises StageFailed where the teacher has no head.
    """
    units = Units(f"text of {length} tokens", work / "generated" / str(length), of=seed, log=reporter.log)
    most = max(1, min(_CHUNK_DOCUMENTS, _CHUNK_TOKENS // length))
    blocks: list[Ids] = []
    rest_T, num_chunks = np.empty(0, np.int64), 0
    with reporter.progress("writing text", num_blocks) as advance:
        while len(blocks) < num_blocks:
            name, missing = f"chunk {num_chunks}", num_blocks - len(blocks)
            if (unit := units.find(name)) is None:
                ids_BT = author.write(min(most, missing), length, np.random.default_rng([seed, num_chunks]))
                unit = Unit(tensors={"ids": torch.from_numpy(ids_BT)})
                units.keep(name, unit)
            more, rest_T = packed(unit.tensors["ids"].numpy(), rest_T)
            blocks += more
            num_chunks += 1
            advance(min(len(more), missing))
    return np.stack(blocks[:num_blocks])


def packed(documents_DT: Ids, rest_T: Ids) -> tuple[list[Ids], Ids]:
    """Blocks of T tokens of documents padded with _NONE, and what is left over; rest_T: what was left over before."""
    length, blocks = documents_DT.shape[1], []
    for row_T in documents_DT:
        document_T = row_T[row_T != _NONE]
        if len(document_T) == length:
            blocks.append(document_T)
            continue
        rest_T = np.concatenate([rest_T, document_T])
        if len(rest_T) >= length:
            blocks.append(rest_T[:length])
            rest_T = rest_T[length:]
    return blocks, rest_T


def _to_write(teacher: Path, bits: int | None, precision: Precision) -> PreTrainedModel:
    """The teacher on the GPU, where there is one, in bfloat16 where `precision` means that."""
    model = load_teacher(teacher, bits)
    if not getattr(model, "is_quantized", False):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cast(nn.Module, model).to(device, torch.bfloat16 if uses_bf16(precision) else torch.float32)
    return model
