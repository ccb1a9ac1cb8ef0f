"""The tokens of a parsed `tokenizer.json`: what each is made of, and which ones text can't do without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from compress.errors import StageFailed

TOKENIZER = "tokenizer.json"
Kind = Literal["BPE", "WordPiece", "Unigram"]
Parsed = Mapping[str, Any]

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens that a text falls back on, byte by byte, where its characters have none."""


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The parsed `tokenizer.json` of a folder. Raises StageFailed where there is none, or of a kind that is not known.

    Known are BPE, WordPiece and Unigram.
    """
    try:
        parsed = json.loads((folder / TOKENIZER).read_text("utf-8"))
    except (OSError, ValueError) as error:
        fix = "save it once with AutoTokenizer.from_pretrained(…).save_pretrained(…), which writes one"
        raise StageFailed("reduce-vocab", f"the model has no {TOKENIZER} that can be read", fix) from error
    kind = parsed.get("model", {}).get("type") if isinstance(parsed, dict) else None
    if kind not in get_args(Kind):
        what = f"{TOKENIZER} has a vocabulary of the type {kind}"
        raise StageFailed("reduce-vocab", what, f"known are {', '.join(get_args(Kind))}")
    found: dict[str, Any] = parsed
    return found


class Vocabulary:
    """The vocabulary of a parsed `tokenizer.json`.

    ids: of the model's own tokens, by name. added: ids of tokens that are looked for before any other, special ones
    among them. names: of all, by id.
    """

    def __init__(self, parsed: Parsed) -> None:
        model = parsed["model"]
        self.kind: Kind = model["type"]
        if self.kind == "Unigram":
            self.ids: dict[str, int] = {piece: id_ for id_, (piece, _) in enumerate(model["vocab"])}
        else:
            self.ids = dict(model["vocab"])
        self.added = {int(token["id"]) for token in parsed.get("added_tokens") or ()}
        self.names = {id_: name for name, id_ in self.ids.items()}
        self.names |= {int(token["id"]): token["content"] for token in parsed.get("added_tokens") or ()}
        self.merges = [pair_of(merge) for merge in model.get("merges") or ()]
        self._parsed, self._model = parsed, model
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}

    def letters(self, name: str) -> list[str]:
        """The shortest tokens that `name` could be made of, one a character, be they in the vocabulary or not."""
        ends = bool(self._suffix) and name.endswith(self._suffix) and name != self._suffix
        name = name.removesuffix(self._suffix) if ends else name
        begins = not (self._prefix and name.startswith(self._prefix) and name != self._prefix)
        characters = name if begins else name.removeprefix(self._prefix)
        found = [each if begins and not place else self._prefix + each for place, each in enumerate(characters)]
        return [*found[:-1], found[-1] + self._suffix] if ends else found

    def joined(self, left: str, right: str) -> str:
        """What merging two tokens makes."""
        return left + right[len(self._prefix) :]

    def parents(self, id_: int) -> frozenset[int]:
        """The tokens that lie between a token's characters and the token itself, its characters too, and itself.

        They are those that BPE's merges go through: without one of them the token could not be made. A token that is
        found whole, as all of WordPiece's and Unigram's are, has none but itself.
        """
        made = self._derived(self.names[id_]) if self.kind == "BPE" and id_ not in self.added else None
        return frozenset({id_, *(self.ids[name] for name in made or () if name in self.ids)})

    def is_reachable(self, id_: int) -> bool:
        """Whether any text is encoded with that token."""
        if self.kind != "BPE" or id_ in self.added or self._model.get("ignore_merges"):
            return True
        return self._derived(self.names[id_]) is not None

    def indispensable(self) -> set[int]:
        """What any text may need: added tokens, what stands for bytes or characters, and what is like no others.

        Where all 256 bytes have tokens, those and the ones of ASCII are enough; otherwise every character that has a
        token keeps it, as does every token with a character that has none of its own.
        """
        found = self.added | self._unknown()
        found |= {self.ids[name] for name in BYTES if name in self.ids and self._falls_back}
        found |= {id_ for name, id_ in self.ids.items() if self._is_letter(name)}
        if self.kind != "BPE" and not self._falls_back:
            found |= {id_ for name, id_ in self.ids.items() if any(e not in self.ids for e in self.letters(name))}
        ascii_ids = self.encoder.encode_batch([chr(code) for code in range(128)], add_special_tokens=False)
        return found | {id_ for encoding in ascii_ids for id_ in encoding.ids}

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer itself, without padding or truncation."""
        encoder: Tokenizer = Tokenizer.from_str(json.dumps(self._parsed))
        encoder.no_padding()
        encoder.no_truncation()
        return encoder

    @cached_property
    def _falls_back(self) -> bool:
        """Whether characters without a token become bytes."""
        return bool(self._model.get("byte_fallback")) and all(name in self.ids for name in BYTES)

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """What any text is written in before its characters are merged; None where that is any character."""
        parts = (part for name in ("normalizer", "pre_tokenizer") for part in self._part(name))
        if any(part.get("type") == "ByteLevel" for part in parts):
            return frozenset(ByteLevel.alphabet())
        return frozenset() if self._falls_back else None

    def _is_letter(self, name: str) -> bool:
        letters = self.letters(name)
        if len(letters) != 1:
            return False
        bare = name.removeprefix(self._prefix) if self._prefix and len(name) > 1 else name
        return self._alphabet is None or bare.removesuffix(self._suffix) in self._alphabet

    def _part(self, name: str) -> Iterator[Parsed]:
        """A normalizer or pre-tokenizer and all that it is a sequence of."""
        waiting = [self._parsed.get(name)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, Mapping):
                yield part
                waiting += [*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())]

    def _unknown(self) -> set[int]:
        if self.kind == "Unigram":
            return {self._model["unk_id"]} if self._model.get("unk_id") is not None else set()
        unknown = self._model.get("unk_token")
        return {self.ids[unknown]} if unknown in self.ids else set()

    def _derived(self, name: str) -> list[str] | None:
        """The characters of a token and what merging them makes, by the lowest rank first; None if not that token."""
        parts = self.letters(name)
        made = list(parts)
        while len(parts) > 1:
            pairs = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if (parts[at], parts[at + 1]) not in self._ranks:
                return None
            parts[at : at + 2] = [self.joined(parts[at], parts[at + 1])]
            made.append(parts[at])
        return made if parts == [name] and all(each in self.ids for each in made) else None


def pair_of(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two tokens of a merge, written `"a b"` or `["a", "b"]`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def closed(vocabulary: Vocabulary, ids: Iterable[int]) -> set[int]:
    """`ids` with all that they are made of."""
    return cast(set[int], set().union(*(vocabulary.parents(id_) for id_ in ids)))
