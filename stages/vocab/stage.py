"""`reduce-vocab`: the vocabulary without the tokens that the data does not need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem, StageFailed
from compress.models.anatomy import ModelShape
from compress.models.folder import VOCABULARIES, VOCABULARY
from compress.options import counted
from compress.stage import Given, Stage, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.stages.vocab.tokenizer import Vocabulary

_TALK = ({"role": "system", "content": " "}, {"role": "user", "content": " "}, {"role": "assistant", "content": " "})


class ReduceVocab(Stage):
    """Drops tokens from the vocabulary and their rows from the tables. Any text still encodes, in more tokens.

    What stays: bytes or single characters, special and added tokens, those of the chat template, the tokens that the
    text uses most, each with the tokens that merges make it of, and the rest by rank up to `keep`.
    """

    name: ClassVar[str] = "reduce-vocab"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "drop the tokens that the text does not need"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train"})
    libraries: ClassVar[frozenset[str]] = frozenset({"torch", "transformers", "tokenizers"})
    example: ClassVar[Mapping[str, Any]] = {"keep": 448}

    keep: int | None = Field(None, ge=1, description="tokens that stay")
    coverage: float | None = Field(
        None, gt=0, lt=1, description="in place of keep: as many as make up this share of the text's tokens"
    )
    tokens: int = Field(2_000_000, ge=1, description="training tokens that are counted, at most")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.coverage is None):
            raise ValueError("give either keep or coverage")
        return self

    def settled(self, given: Given) -> Mapping[str, Any]:
        return counted(self)

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether there are more tokens than shall stay."""
        if self.keep is not None and self.keep >= model.vocab_size:
            what = f"{self.keep} of a vocabulary of {model.vocab_size} tokens leaves none out"
            yield Problem("keep", what, f"choose fewer than {model.vocab_size}")

    def shape(self, model: ModelShape) -> ModelShape:
        """The same with `keep` tokens; how many make up a share of the text is not known before."""
        return model if self.keep is None else replace(model, vocab_size=self.keep)

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter of the smaller model in float32."""
        return 4.0 * model.num_parameters

    def twin(self) -> Self:
        """Counts little text: the twin's vocabulary is the whole one."""
        return self.model_copy(update={"tokens": 20_000})

    def run(self, context: StageContext) -> Metrics:
        """Count, choose, and write the smaller model with `vocabulary.json`, which says what each token was."""
        from compress.models.load import load_model, load_tokenizer, save_model
        from compress.stages.vocab.choice import choose
        from compress.stages.vocab.model import reduced, special_ids

        folder = context.input.path
        vocabulary, tokenizer = _vocabulary(folder), load_tokenizer(folder)
        model = load_model(folder)
        texts, used = self._counted(tokenizer, context)
        named = special_ids(model.config.to_dict())
        always = {*_template_tokens(tokenizer), *(id for ids in named.values() for id in ids)}
        _check_special(named, vocabulary)
        chosen = choose(vocabulary, used, always, self.keep, self.coverage)
        context.reporter.log.info(
            "reduce-vocab: %d of %d tokens, %.2f %% of the text's", len(chosen.tokens), len(vocabulary.ids),
            100 * chosen.coverage,
        )  # fmt: skip
        smaller = reduced(model, chosen.tokens)
        save_model(smaller, folder, context.out)
        _write_tokenizer(vocabulary, chosen.tokens, context.out)
        before = _origins(folder) or list(range(len(vocabulary.ids)))
        origins = [before[token] for token in chosen.tokens]
        write_json(context.out / VOCABULARY, {"origin_tokens": origins, "coverage": chosen.coverage})
        now = load_tokenizer(context.out)
        lengths = [sum(map(len, each(texts, add_special_tokens=False)["input_ids"])) for each in (tokenizer, now)]
        num_parameters = sum(parameter.numel() for parameter in smaller.parameters())
        figures = {"parameters": num_parameters, "vocab_size": len(chosen.tokens), "coverage": chosen.coverage}
        return {"result": {**figures, "tokens_ratio": lengths[1] / lengths[0]}}

    def _counted(
        self, tokenizer: PreTrainedTokenizerBase, context: StageContext
    ) -> tuple[list[str], dict[int, int]]:
        """The first texts, which hold about `tokens`, and how often they have each token."""
        from collections import Counter

        used: Counter[int] = Counter()
        texts = []
        with context.reporter.progress("counting tokens", self.tokens) as advance:
            for text in context.data.texts("train"):
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                used.update(ids)
                texts.append(text)
                advance(len(ids))
                if used.total() >= self.tokens:
                    break
        return texts, dict(used)


def _vocabulary(folder: Path) -> Vocabulary:
    from compress.stages.vocab.tokenizer import Vocabulary

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StageFailed("reduce-vocab", "the model has no tokenizer.json", "save its fast tokenizer beside it")
    return Vocabulary(json.loads(file.read_text("utf-8")))


def _origins(folder: Path) -> list[int] | None:
    """Which token of the source each token is, where a stage before this one dropped some."""
    file = folder / VOCABULARY
    return json.loads(file.read_text("utf-8"))["origin_tokens"] if file.is_file() else None


def _check_special(named: Mapping[str, list[int]], vocabulary: Vocabulary) -> None:
    """Raises StageFailed for an id of the config that no token has."""
    known = set(vocabulary.ids.values())
    for key, ids in named.items():
        if missing := [id for id in ids if id not in known]:
            what = f"config.json names {missing[0]} as {key}, and the tokenizer has {len(known)} tokens"
            raise StageFailed("reduce-vocab", what, "use the model's own tokenizer, with its special tokens")


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of what a chat template writes around a talk."""
    if not tokenizer.chat_template:
        return set()
    from jinja2.exceptions import TemplateError

    for talk in (_TALK, _TALK[1:]):
        try:
            text = tokenizer.apply_chat_template(list(talk), tokenize=False, add_generation_prompt=True)
        except TemplateError:  # not every template takes a system's turn
            continue
        return set(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    return set()


def _write_tokenizer(vocabulary: Vocabulary, tokens: list[int], out: Path) -> None:
    """Put the smaller tokenizer in place of the one that was copied: `tokenizer.json` alone holds its tokens."""
    for pattern in (*VOCABULARIES, "merges.txt", "added_tokens.json"):
        for file in out.glob(pattern):
            file.unlink()
    (out / "tokenizer.json").write_text(json.dumps(vocabulary.reduced(tokens), ensure_ascii=False), "utf-8")
    file = out / "tokenizer_config.json"
    if file.is_file():
        config, new = json.loads(file.read_text("utf-8")), {str(old): str(at) for at, old in enumerate(tokens)}
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {new[id]: token for id, token in decoder.items() if id in new}
        config.pop("vocab_file", None)
        write_json(file, config)
