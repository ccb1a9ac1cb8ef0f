"""The text of a pipeline: its documents, how they are split, and how they are packed into blocks of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.config import DataConfig, DatasetSpec, FileSpec, Split
from compress.data.read import content_of, package_facts, read_documents
from compress.data.split import SPLITTING, Overlap, hold_out, overlap_of
from compress.errors import StageFailed
from compress.fetch.cache import entry_path, recall, remember
from compress.fetch.packages import Downloader, download

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


class TextData:
    """What `config` names, fetched when it is first needed. All of it is deterministic."""

    def __init__(self, config: DataConfig, download: Downloader = download) -> None:
        self.config = config
        self._download = download

    def texts(self, split: Split) -> list[str]:
        """The documents of `split`.

        Raises StageFailed where there is no text, or where the eval text also stands in the train text.
        """
        if split == "eval":
            self._check_overlap()
        return list(self._documents[split])

    def digest(self, split: Split) -> str:
        """SHA-256 (hex) of the documents of `split`."""
        if split == "eval":
            self._check_overlap()
        return self._digests[split]

    def resolved(self) -> dict[str, Mapping[str, str]]:
        """The SHA-256 of the archive of each package that text comes from, by the name of the text, where fetched."""
        specs = [spec for spec in (*self.config.train, *(self.config.eval or ())) if not isinstance(spec, DatasetSpec)]
        names = [spec.path if isinstance(spec, FileSpec) else spec for spec in specs]
        return {name: package_facts(name) for name in names}

    def blocks(
        self, split: Split, tokenizer: PreTrainedTokenizerBase, sequence_length: int, max_tokens: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Documents, each ended by the tokenizer's end (or separator) token, packed into blocks.

        Returns int64 (num_blocks, sequence_length). A last, incomplete block is left out. Where `max_tokens` holds
        fewer blocks than there are, they are spread evenly over the text. Raises StageFailed where the text is too
        short for one block.
        """
        import numpy as np

        ids = token_ids(self.texts(split), tokenizer)
        starts = block_starts(len(ids), sequence_length, max_tokens, split)
        blocks_NT: np.ndarray[Any, np.dtype[np.int64]] = np.asarray(ids)[starts[:, None] + np.arange(sequence_length)]
        return blocks_NT

    @cached_property
    def _documents(self) -> dict[str, list[str]]:
        config = self.config
        train = read_documents(config.train, "data.train", self._download)
        if config.holds_out:
            train, held_out = hold_out(train, config.eval_share)
        else:
            assert config.eval is not None
            held_out = read_documents(config.eval, "data.eval", self._download)
        if not train or not held_out:
            what = f"{sum(map(len, train))} characters are too few to hold some out for evaluation"
            raise StageFailed("data.train", what, "add text, or name other text as eval")
        return {"train": train, "eval": held_out}

    @cached_property
    def _digests(self) -> dict[str, str]:
        """SHA-256 (hex) of each split's documents. Text that was read once is not read again to tell them."""
        memo = entry_path("splits", json.dumps([SPLITTING, *self._ingredients()])).with_suffix(".json")
        known: dict[str, str] | None = recall(memo)
        if known is None:
            documents = self._documents.items()
            known = {split: hashlib.sha256(json.dumps(texts).encode()).hexdigest() for split, texts in documents}
            remember(memo, known)
        return known

    def _ingredients(self) -> list[Any]:
        """What the documents of the splits follow from."""
        train = content_of(self.config.train, "data.train", self._download)
        if self.config.holds_out:
            return [train, self.config.eval_share]
        assert self.config.eval is not None
        return [train, content_of(self.config.eval, "data.eval", self._download)]

    @cached_property
    def overlap(self) -> Overlap:
        """How much of the eval text also stands in the train text."""
        memo = entry_path("overlap", " ".join(self._digests.values())).with_suffix(".json")
        known = recall(memo)
        if known is not None:
            return Overlap(**known)
        found = overlap_of(self._documents["train"], self._documents["eval"])
        remember(memo, vars(found))
        return found

    def _check_overlap(self) -> None:
        if self.overlap.share > self.config.max_overlap:
            what = f"{self.overlap.share:.1%} of it also stands in data.train, as: {self.overlap.example!r}"
            fix = "name other text, leave `eval` out so that some is held out, or raise max_overlap"
            raise StageFailed("data.eval", what, fix)


def check_special_ids(folder: Path, vocab_size: int) -> None:
    """Raises StageFailed where the configs in `folder` name a special token that a model of `vocab_size` has not."""
    from compress.vocab.rewrite import special_ids

    for file, key, id_ in special_ids(folder):
        if id_ >= vocab_size:
            what = f"says {key} {id_} of a model of {vocab_size} embeddings"
            raise StageFailed(file, what, "correct the id, or use the files that the model was trained with")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises StageFailed where `tokenizer` gives tokens that a model of `vocab_size` embeddings doesn't have."""
    special = {token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token}
    beyond = [
        (id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= vocab_size and token not in special
    ]
    if beyond:
        highest, token = max(beyond)
        what = f"gives token {highest} ({token!r}) to a model of {vocab_size} embeddings"
        raise StageFailed("tokenizer", what, "use the tokenizer that the model was trained with")


def block_starts(
    num_tokens: int, sequence_length: int, max_tokens: int | None, split: Split
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where blocks begin in so many tokens, (num_blocks,): those of `TextData.blocks`. Raises as it does."""
    import numpy as np

    num_blocks = num_tokens // sequence_length
    num_wanted = num_blocks if max_tokens is None else min(num_blocks, max_tokens // sequence_length)
    if num_wanted == 0:
        has = f"the {split} text has {num_tokens} tokens" if num_blocks == 0 else f"max_tokens is {max_tokens}"
        raise StageFailed(
            f"data.{split}", f"{has} and one block needs {sequence_length}", "add text, or shorten sequence_length"
        )
    return np.arange(num_wanted) * num_blocks // num_wanted * sequence_length


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of all documents, each ended by the tokenizer's end (or separator) token, if it has one."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    end = next((id_ for id_ in ends if isinstance(id_, int)), None)
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [id_ for document in encoded for id_ in (document if end is None else [*document, end])]
