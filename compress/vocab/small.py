"""A few tokens in place of a whole vocabulary, for models that are only tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compress.models.load import has_tokenizer, load_tokenizer
from compress.vocab.needed import needed_ids
from compress.vocab.rewrite import NewIds, rewrite_tokenizer, special_ids, with_new_ids
from compress.vocab.tokens import TOKENIZER, Kind, Parsed, Vocabulary, closed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW = 2048
"""Tokens up to which a vocabulary is small already."""
_SPARE = 512
"""Tokens beside those that any text needs: for `reduce-vocab` to leave out, and for whole words."""


@dataclass(frozen=True)
class SmallVocabulary:
    """`vocab_size` tokens of a folder's vocabulary. parsed: its tokenizer before, None where it has none."""

    parsed: Parsed | None
    new_ids: NewIds
    vocab_size: int

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config's special tokens with their new ids."""
        return with_new_ids(config, self.new_ids)

    def rewrite(self, folder: Path) -> None:
        """Give a copy of the folder's tokenizer and generation settings the new ids, in place."""
        if self.parsed is not None:
            rewrite_tokenizer(folder, self.parsed, self.new_ids)
        file = folder / "generation_config.json"
        if file.is_file():
            file.write_text(json.dumps(self.config(json.loads(file.read_text("utf-8")))), "utf-8")


def small_vocabulary(folder: Path, vocab_size: int) -> SmallVocabulary | None:
    """Some hundred tokens of a model of `vocab_size` embeddings; None where it has few, or is of a kind not known."""
    if vocab_size <= FEW:
        return None
    named = {id_ for _, _, id_ in special_ids(folder)}
    if not has_tokenizer(folder):
        return SmallVocabulary(None, dict.fromkeys(named, 0) | {id_: id_ for id_ in range(_SPARE)}, _SPARE)
    tokenizer = load_tokenizer(folder)
    parsed = _parsed(folder, tokenizer)
    if parsed is None:
        return None
    vocabulary = Vocabulary(parsed)
    wanted = needed_ids(vocabulary, tokenizer) | (named & vocabulary.names.keys())
    wanted |= set(islice(sorted(vocabulary.names.keys() - wanted), _SPARE))
    kept = sorted(closed(vocabulary, wanted))  # those beyond the embeddings last
    new_ids = {old: new for new, old in enumerate(kept)}
    unknown = dict.fromkeys(named - vocabulary.names.keys(), 0)  # of a padded vocabulary: any token does
    return SmallVocabulary(parsed, unknown | new_ids, sum(id_ < vocab_size for id_ in kept))


def _parsed(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Parsed | None:
    """The tokenizer as `tokenizer.json` has it, or would; None where it is of no kind that can be cut."""
    file = folder / TOKENIZER
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if file.is_file():
        parsed: Parsed = json.loads(file.read_text("utf-8"))
    elif backend is not None:
        parsed = json.loads(backend.to_str())
    else:
        return None
    return parsed if parsed["model"]["type"] in get_args(Kind) else None
