"""What text says of a vocabulary: how often it uses each token, and how much longer it gets with fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from compress.data.text import TextData
from compress.stages.vocab.choice import Counts
from compress.vocab.tokens import TOKENIZER, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 500_000
"""Characters of text whose tokens are counted before and after."""


def count(
    data: TextData, tokenizer: PreTrainedTokenizerBase, block: int, max_tokens: int, config: Mapping[str, Any]
) -> Counts:
    """How often the train text has each token of a model of V embeddings, (V,), in blocks spread evenly over it."""
    blocks_NT = data.blocks("train", tokenizer, block, max_tokens)
    return np.bincount(blocks_NT.ravel(), minlength=config["vocab_size"])[: config["vocab_size"]]


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
