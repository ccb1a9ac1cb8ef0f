"""A tokenizer as its `tokenizer.json` says it: what each token is made of, and the same tokenizer with fewer tokens.

BPE with byte-level letters or byte fallback, WordPiece and Unigram. Imports neither torch nor transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress.errors import StageFailed

KINDS = ("BPE", "WordPiece", "Unigram")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_ID_LISTS = ("sep", "cls")
"""Of BertProcessing and RobertaProcessing: [token, id]."""


@dataclass(frozen=True)
class Vocabulary:
    """A parsed `tokenizer.json`. Raises StageFailed where its model is none of KINDS or its ids have gaps."""

    parsed: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            what = f"tokenizer.json has a model of the type {self.kind}"
            raise StageFailed("reduce-vocab", what, f"supported: {', '.join(KINDS)}")
        if sorted(self.ids.values()) != list(range(len(self.ids))):
            raise StageFailed("reduce-vocab", "the tokenizer's ids have gaps", "use the model's own tokenizer")

    @property
    def kind(self) -> str:
        """The type of its model."""
        return str(self.parsed.get("model", {}).get("type"))

    @cached_property
    def own(self) -> dict[str, int]:
        """The ids of the model's tokens, without those that were added."""
        vocab = self.parsed["model"]["vocab"]
        return dict(vocab) if isinstance(vocab, dict) else {token: id for id, (token, _) in enumerate(vocab)}

    @cached_property
    def ids(self) -> dict[str, int]:
        """The ids of all tokens."""
        return {**self.own, **{added["content"]: added["id"] for added in self.parsed.get("added_tokens") or ()}}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that BPE joins, in order of rank."""
        pairs = self.parsed["model"].get("merges") or ()
        halves = (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)
        return [(left, right) for left, right in halves]

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """The two tokens that each merged token is first made of."""
        found: dict[int, tuple[int, int]] = {}
        for left, right in self.merges:
            if left + right in self.own:
                found.setdefault(self.own[left + right], (self.own[left], self.own[right]))
        return found

    def with_parts(self, tokens: Iterable[int]) -> Iterator[int]:
        """The tokens and all that they are made of, the parts first, each once."""
        seen: set[int] = set()
        for token in tokens:
            waiting = [token]
            while waiting:
                top = waiting[-1]
                missing = [part for part in self.parts.get(top, ()) if part not in seen]
                if top in seen or not missing:
                    waiting.pop()
                    if top not in seen:
                        seen.add(top)
                        yield top
                else:
                    waiting += missing

    @cached_property
    def needed(self) -> frozenset[int]:
        """What no text can do without: added tokens, bytes or else single characters, and the unknown token."""
        model = self.parsed["model"]
        added = {token["id"] for token in self.parsed.get("added_tokens") or ()}
        unknown = model.get("unk_id") if self.kind == "Unigram" else self.own.get(model.get("unk_token") or "")
        fixed = added | ({unknown} if isinstance(unknown, int) else set())
        if model.get("byte_fallback") and self.own.keys() >= _BYTES:
            return frozenset(fixed | {self.own[byte] for byte in _BYTES})
        if self.kind == "BPE":  # the letters that stand for bytes, where it is of bytes, and whatever no merge makes
            return frozenset(fixed | {id for id in self.own.values() if id not in self.parts})
        return frozenset(fixed | {self.own[token] for token in self._without_spelling})

    @cached_property
    def _without_spelling(self) -> set[str]:
        """Tokens of one character, and those with a character that has no token of its own where it stands."""
        mark = self.parsed["model"].get("continuing_subword_prefix", "##") if self.kind == "WordPiece" else ""
        return {token for token in self.own if not all(piece in self.own for piece in _spelt(token, mark)[1:])
                or len(_spelt(token, mark)) == 1 or _spelt(token, mark)[0] not in self.own}  # fmt: skip

    def reduced(self, kept: Collection[int]) -> dict[str, Any]:
        """`tokenizer.json` with the tokens `kept`, whose ids are their places among them in order."""
        new = {old: place for place, old in enumerate(sorted(kept))}
        parsed = copy.deepcopy(dict(self.parsed))
        model = parsed["model"]
        stay = {token: new[id] for token, id in self.own.items() if id in new}
        if self.kind == "Unigram":
            model["vocab"] = [entry for id, entry in enumerate(model["vocab"]) if id in new]
            model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
        else:
            model["vocab"] = stay
        if self.kind == "BPE":
            alive = [all(part in stay for part in (left, right, left + right)) for left, right in self.merges]
            model["merges"] = [pair for pair, lives in zip(model["merges"], alive, strict=True) if lives]
        for added in parsed.get("added_tokens") or ():
            added["id"] = new[added["id"]]
        if isinstance(parsed.get("padding"), dict):
            parsed["padding"]["pad_id"] = new[parsed["padding"]["pad_id"]]
        _renumber_processor(parsed.get("post_processor"), new)
        return parsed


def _spelt(token: str, mark: str) -> list[str]:
    """A token's characters as tokens: the first as it stands, the others as they would follow."""
    if mark and token.startswith(mark) and token != mark:
        return [mark + character for character in token[len(mark) :]]
    return [token[:1], *(mark + character for character in token[1:])]


def _renumber_processor(processor: Any, new: Mapping[int, int]) -> None:
    """Give the special tokens of a post-processor, or of those that it is made of, their new ids."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or ():
        _renumber_processor(inner, new)
    for special in (processor.get("special_tokens") or {}).values() if processor.get("type") != "Sequence" else ():
        special["ids"] = [new[id] for id in special["ids"]]
    for name in _ID_LISTS:
        if isinstance(processor.get(name), list):
            processor[name][1] = new[processor[name][1]]
