"""`reduce-vocab`: keep the tokens that the text needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem, StageFailed
from compress.models.anatomy import ModelShape
from compress.models.folder import VOCABULARY, config_of
from compress.stage import Stage, StageContext

if TYPE_CHECKING:
    from pathlib import Path

    from compress.data.text import TextData
    from compress.stages.vocab.choice import Choice, Counts

_BLOCK = 256
"""Tokens of the blocks that the counted text is spread over."""
_LEAST_TEXT = 1024
"""Tokens of text below which what it uses says nothing."""
_GUESSED_SHARE = 0.5
"""Of the vocabulary, for an estimate: what `coverage` keeps is known once the text was read."""


class ReduceVocab(Stage):
    """Keeps the tokens that the train text needs; any text still encodes, into more tokens where it is another.

    Whatever the text, bytes and characters that others fall back on, special and added tokens and those of the chat
    template stay, and with each token all that it is merged from. Then come tokens by their use: with `coverage` by the
    text's alone, with `keep` by what more text, and other text, can be expected to use, of which the tokens' rank in
    the vocabulary tells. Logits are those of the model before at the tokens that stay. Perplexities before and after
    can't be compared: `evaluate` has bits per byte.
    """

    name: ClassVar[str] = "reduce-vocab"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "keep the tokens that the text needs, in the tokenizer, the embeddings and the head"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train"})
    libraries: ClassVar[frozenset[str]] = frozenset({"tokenizers", "transformers"})
    example: ClassVar[Mapping[str, Any]] = {"keep": 400}

    keep: int | None = Field(None, ge=1, description="tokens to keep, exactly so many")
    coverage: float | None = Field(
        None, gt=0, le=1,
        description="in place of keep: the share of the train text's tokens that those that are kept make up (0.999)",
    )  # fmt: skip
    tokens: int = Field(2_000_000, ge=_LEAST_TEXT, description="tokens of the train text that are counted, at most")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.coverage is None):
            raise ValueError("give either keep or coverage")
        return self

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the vocabulary gets smaller, and the text that is counted can tell by how much."""
        if self.keep is not None and self.keep >= model.vocab_size:
            what = f"{self.keep} of {model.vocab_size} tokens leaves none out"
            yield Problem("keep", what, f"fewer than {model.vocab_size}")
        elif self.keep is not None and self.tokens < self.keep:
            what = f"{self.tokens} tokens of text are too few to choose {self.keep} from by their use"
            yield Problem("tokens", what, f"at least {self.keep}, or leave it out")

    def shape(self, model: ModelShape) -> ModelShape:
        """The same model with fewer tokens: half of them where the text will tell how many."""
        return replace(model, vocab_size=self.keep or math.ceil(_GUESSED_SHARE * model.vocab_size))

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter of the smaller model, in the type that it had."""
        return model.weight_bytes

    def forward_tokens(self, model: ModelShape) -> float:
        """None: tokens are counted, and no model reads them."""
        return 0.0

    def twin(self) -> Self:
        """Half of a little text: a twin has too few tokens for `keep`, which `check_source` has judged by then."""
        return self.model_copy(update={"tokens": _LEAST_TEXT + _BLOCK, "keep": None, "coverage": 0.5})

    def check_source(self, folder: Path, data: TextData) -> None:
        """Whether the real vocabulary can be cut to `keep` tokens, and there is as much text as has to be."""
        from compress.models.load import load_tokenizer
        from compress.stages.vocab.choice import least
        from compress.stages.vocab.text import count
        from compress.vocab.needed import needed_ids
        from compress.vocab.rewrite import named_ids
        from compress.vocab.tokens import Vocabulary, read_tokenizer

        vocabulary, tokenizer = Vocabulary(read_tokenizer(folder)), load_tokenizer(folder)
        enough = min(self.tokens, self._least_text + _BLOCK)
        counts_V = count(data, tokenizer, _BLOCK, enough, config_of(folder) or {})
        self._refuse_short_text(counts_V)
        needed = needed_ids(vocabulary, tokenizer) | named_ids(folder, vocabulary)
        least(vocabulary, needed, self.keep, len(counts_V))

    def run(self, context: StageContext) -> Metrics:
        """Choose the tokens and write the smaller model with its tokenizer and `vocabulary.json`."""
        from compress.models.load import load_model, load_tokenizer, save_model
        from compress.stages.vocab.choice import choose
        from compress.stages.vocab.surgery import keep_tokens
        from compress.stages.vocab.text import count, lengthening
        from compress.vocab.needed import needed_ids
        from compress.vocab.rewrite import named_ids, rewrite_folder
        from compress.vocab.tokens import Vocabulary, read_tokenizer

        folder = context.input.path
        parsed = read_tokenizer(folder)
        vocabulary = Vocabulary(parsed)
        tokenizer = load_tokenizer(folder)
        needed = needed_ids(vocabulary, tokenizer) | named_ids(folder, vocabulary)
        counts_V = count(context.data, tokenizer, _BLOCK, self.tokens, context.input.config)
        self._refuse_short_text(counts_V)
        choice = choose(vocabulary, counts_V, needed, self.keep, self.coverage)
        model = load_model(folder)
        keep_tokens(model, choice.kept)
        save_model(model, folder, context.out)
        rewrite_folder(context.out, parsed, choice.new_ids)
        ratio = lengthening(context.data.texts("train"), vocabulary, context.out)
        context.reporter.log.info(
            "reduce-vocab: %d of %d tokens stay: %d in any case, %d by use, %d by rank; text has %.3fx the tokens",
            len(choice.kept), len(counts_V), choice.num_indispensable, choice.num_by_use, choice.num_by_rank, ratio,
        )  # fmt: skip
        figures = {"vocab_size": float(len(choice.kept)), "coverage": choice.coverage, "tokens_ratio": ratio}
        _write_record(context, choice, figures)
        return {"result": {"parameters": sum(parameter.numel() for parameter in model.parameters()), **figures}}

    @property
    def _least_text(self) -> int:
        """Tokens of text from which can be chosen."""
        return max(self.keep or 0, _LEAST_TEXT)

    def _refuse_short_text(self, counts_V: Counts) -> None:
        total, least = int(counts_V.sum()), self._least_text
        if total < least:
            what = f"{total} tokens (in blocks of {_BLOCK}) are too few to choose {self.keep or 'tokens'} from by use"
            raise StageFailed("data.train", what, f"name more text: at least {least} tokens")


def _write_record(context: StageContext, choice: Choice, figures: Mapping[str, float]) -> None:
    """`vocabulary.json`: which of the very first model's tokens stayed, through every reduction, and why so many."""
    from compress.fetch.cache import recall

    before = recall(context.input.path / VOCABULARY)
    origins = before["origin_tokens"] if isinstance(before, dict) else None
    origin_tokens = [*choice.kept, *choice.beyond] if origins is None else [
        origins[id_] for id_ in (*choice.kept, *choice.beyond)
    ]  # fmt: skip
    reasons = {
        "indispensable": choice.num_indispensable, "by_use": choice.num_by_use, "by_rank": choice.num_by_rank,
    }  # fmt: skip
    write_json(context.out / VOCABULARY, {"origin_tokens": origin_tokens, "kept": reasons, **figures})
