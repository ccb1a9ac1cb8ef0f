"""What text says of a vocabulary: how often it uses each token, and how much longer it gets with fewer of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer

from compress.data.text import TextData
from compress.stages.vocab.choice import Counts
from compress.stages.vocab.tokens import TOKENIZER, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 500_000
"""Characters of text whose tokens are counted before and after."""
_TURNS = tuple({"role": role, "content": content} for role, content in (
    ("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hello."), ("user", "Who are you?"),
))  # fmt: skip
_CHATS = (_TURNS, _TURNS[1:], _TURNS[1:2])


def count(
    data: TextData, tokenizer: PreTrainedTokenizerBase, block: int, max_tokens: int, config: Mapping[str, Any]
) -> Counts:
    """How often the train text has each token of a model of V embeddings, (V,), in blocks spread evenly over it."""
    blocks_NT = data.blocks("train", tokenizer, block, max_tokens)
    return np.bincount(blocks_NT.ravel(), minlength=config["vocab_size"])[: config["vocab_size"]]


def template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of what the chat templates write around short turns of a system, a user and an assistant."""
    rendered = [text for name in _template_names(tokenizer) for text in _rendered(tokenizer, name)]
    return {id_ for text in rendered for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]}


def lengthening(texts: Sequence[str], before: Vocabulary, folder: Path) -> float:
    """Tokens of a sample of `texts` by the tokenizer in `folder`, over those by the vocabulary before."""
    sample = _sample(texts)
    after = Tokenizer.from_file(str(folder / TOKENIZER))
    numbers = [
        sum(len(each.ids) for each in encoder.encode_batch(sample, add_special_tokens=False))
        for encoder in (after, before.encoder)
    ]
    return numbers[0] / numbers[1]


def _sample(texts: Sequence[str]) -> list[str]:
    """_SAMPLE characters, or a little more: the beginnings of all texts where they have more."""
    share = min(1.0, _SAMPLE / sum(map(len, texts)))
    return [text[: max(1, round(share * len(text)))] for text in texts]


def _template_names(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    template = tokenizer.chat_template
    return list(template) if isinstance(template, dict) else [None] if template else []


def _rendered(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Iterator[str]:
    """The conversations that the template takes; not every one has a system's turn, or a second one."""
    for chat in _CHATS:
        for goes_on in (False, True):
            try:
                yield str(tokenizer.apply_chat_template(
                    [dict(turn) for turn in chat], chat_template=name, tokenize=False, add_generation_prompt=goes_on,
                ))  # fmt: skip
            except TemplateError:
                continue
