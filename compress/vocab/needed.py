"""The tokens that any model of a vocabulary needs, whatever the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from compress.vocab.tokens import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = tuple({"role": role, "content": content} for role, content in (
    ("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hello."), ("user", "Who are you?"),
))  # fmt: skip
_CHATS = (_TURNS, _TURNS[1:], _TURNS[1:2])


def needed_ids(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Bytes, characters, special tokens, and those that the chat templates write."""
    needed = vocabulary.indispensable() | _template_ids(tokenizer)
    return needed | (vocabulary.names.keys() & set(tokenizer.all_special_ids))


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of what the chat templates write around short turns of a system, a user and an assistant."""
    rendered = [text for name in _template_names(tokenizer) for text in _rendered(tokenizer, name)]
    return {id_ for text in rendered for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]}


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
