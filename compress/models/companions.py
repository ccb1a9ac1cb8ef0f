"""What the files beside `config.json` and the weights may say: a tokenizer's, and how to generate. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.fetch.cache import entry_path, file_sha256, recall, remember
from compress.models.config import FLAG, IDS, MAPPING, NUMBER, WORD, Rule, fault_of

TOKENIZER = "tokenizer.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_decoder(value: object) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_token(token) for key, token in value.items())


def _is_template(value: object) -> bool:
    named = value if isinstance(value, list) else []
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
                for one in named)
    )  # fmt: skip


_TOKEN = Rule("a token: its text, or a mapping with it as content", _is_token, null=True)
_TOKEN_LIST = Rule(
    "a list of tokens",
    lambda value: all(map(_is_token, value if isinstance(value, list) else value.values()))
    if isinstance(value, list | dict) else False, null=True,
)  # fmt: skip
_RULES: Mapping[str, Mapping[str, Rule]] = {
    "tokenizer_config.json": {
        **dict.fromkeys(_TOKENS, _TOKEN),
        **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKEN_LIST),
        **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), WORD._replace(null=True)),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), FLAG._replace(null=True)),
        "model_max_length": NUMBER,
        "added_tokens_decoder": Rule("a mapping of numbers to tokens", _is_decoder, null=True),
        "chat_template": Rule("a template, or a list of such with names", _is_template, null=True),
    },
    "special_tokens_map.json": {
        **dict.fromkeys(_TOKENS, _TOKEN), "additional_special_tokens": _TOKEN_LIST,
    },
    "generation_config.json": {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), IDS),
        **dict.fromkeys(("do_sample", "use_cache", "early_stopping"), FLAG._replace(null=True)),
        **dict.fromkeys(
            ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "max_new_tokens",
             "min_length", "num_beams", "num_return_sequences"), NUMBER,
        ),
    },
}  # fmt: skip
"""By file: what of it is read, here or by transformers."""


def companion_fault(folder: Path) -> str:
    """The file that can't be used and what is wrong with it (`tokenizer.json that …`); "" where none is.

    Files that are not there are no fault.
    """
    for name, rules in _RULES.items():
        if (folder / name).is_file() and (fault := _said(recall(folder / name), rules)):
            return f"{name} {fault}"
    file = folder / TOKENIZER
    fault = _unreadable(file) if file.is_file() else ""
    return f"{TOKENIZER} that can't be read ({fault})" if fault else ""


def _said(parsed: Any, rules: Mapping[str, Rule]) -> str:
    if fault_of("", parsed, MAPPING, null=False):
        return "that is no mapping in JSON"
    faults = (fault_of(key, parsed[key], rule) for key, rule in rules.items() if key in parsed)
    return next((f"whose {fault}" for fault in faults if fault), "")


def _unreadable(file: Path) -> str:
    """Why the tokenizers library can't read a file; "" where it can. Remembered by the file's content."""
    import tokenizers

    memo = entry_path("tokenizers", f"{file_sha256(file)} {tokenizers.__version__}").with_suffix(".json")
    known = recall(memo)
    if isinstance(known, str):
        return known
    try:
        json.loads(file.read_text("utf-8"))
        tokenizers.Tokenizer.from_file(str(file))
        fault = ""
    except Exception as error:  # noqa: BLE001 - the library raises nothing more special
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
    remember(memo, fault)
    return fault
