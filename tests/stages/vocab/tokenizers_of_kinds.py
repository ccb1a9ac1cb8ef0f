"""Models with a small tokenizer of every kind that `reduce-vocab` knows, trained on the interpreter's documentation."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pico import make_pico

VOCAB_SIZE = 768
TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + ' zyzzyva</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def byte_level() -> Tokenizer:
    """GPT-2's kind: BPE over bytes, merges as strings, an added token at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return with_json(tokenizer, merges=lambda merges: [" ".join(pair) for pair in merges])


def sentencepiece_bpe() -> Tokenizer:
    """Gemma's kind: BPE over characters that falls back on bytes, with every merge that makes a token, as pairs."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 256 - len(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces)]
    ids = {name: id_ for id_, name in enumerate(names)}
    parsed = json.loads(tokenizer.to_str())
    parsed["model"]["vocab"] = ids
    parsed["model"]["merges"] = [
        [piece[:at], piece[at:]]
        for piece, _ in pieces for at in range(1, len(piece)) if piece[:at] in ids and piece[at:] in ids
    ]  # fmt: skip
    parsed["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(parsed))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def wordpiece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=MARKS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    edges = [(mark, tokenizer.token_to_id(mark)) for mark in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*edges)
    return tokenizer


def unigram() -> Tokenizer:
    """XLM-R's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def with_json(tokenizer: Tokenizer, **changes: Callable[[Any], Any]) -> Tokenizer:
    """The same tokenizer with other values in its model's JSON."""
    parsed = json.loads(tokenizer.to_str())
    parsed["model"] |= {name: change(parsed["model"][name]) for name, change in changes.items()}
    return Tokenizer.from_str(json.dumps(parsed))


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level, "sentencepiece-bpe": sentencepiece_bpe, "wordpiece": wordpiece, "unigram": unigram,
}  # fmt: skip


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The tokenizer of that kind, trained once. Do not change it."""
    return KINDS[kind]()


def make_model(kind: str, folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A pico model with a tokenizer of that kind."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizer_of(kind)
    special = (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        if kind == "wordpiece"
        else {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    )
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items() if name in _IN_CONFIG}
    unnamed = dict.fromkeys(("bos_token_id", "eos_token_id"), None)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2}
    make_pico(model_type, folder, **{**sizes, **unnamed, **ids, **options})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if kind != "wordpiece":
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


_IN_CONFIG = ("bos_token", "eos_token", "pad_token")
