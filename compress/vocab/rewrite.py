"""The files of a tokenizer and of configs with the ids of a smaller vocabulary: pure functions of parsed JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.artifact import write_json
from compress.errors import StageFailed
from compress.fetch.cache import recall
from compress.models.folder import GENERATION, VOCABULARIES
from compress.vocab.tokens import TOKENIZER, Parsed, Vocabulary, pair_of

NewIds = Mapping[int, int]
"""The new id of each token that stays, by its old one."""
_CONFIGS = ("config.json", GENERATION)
_SUPERSEDED = (*VOCABULARIES, "merges.txt", "added_tokens.json")
"""Files that hold the vocabulary, or ids, once more: `tokenizer.json` has them all."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids")
_FORCED = "forced_decoder_ids"
_BIASES = "sequence_bias"


def rewrite_folder(folder: Path, parsed: Parsed, new_ids: NewIds) -> None:
    """Give a copy of the model's folder, in place, the vocabulary of `new_ids` in every file but the weights.

    parsed: its `tokenizer.json` as it was.
    """
    rewrite_tokenizer(folder, parsed, new_ids)
    for name in _CONFIGS:
        if (folder / name).is_file():
            write_json(folder / name, with_new_ids(json.loads((folder / name).read_text("utf-8")), new_ids))


def rewrite_tokenizer(folder: Path, parsed: Parsed, new_ids: NewIds) -> None:
    """As `rewrite_folder`, in the tokenizer's files alone."""
    for pattern in _SUPERSEDED:
        for file in folder.glob(pattern):
            file.unlink()
    text = json.dumps(smaller_tokenizer(parsed, new_ids), indent=2, ensure_ascii=False)
    (folder / TOKENIZER).write_text(text, "utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text("utf-8"))
        if decoder := config.get("added_tokens_decoder"):
            kept = {str(new_ids[int(id_)]): token for id_, token in decoder.items() if int(id_) in new_ids}
            write_json(file, config | {"added_tokens_decoder": kept})


def smaller_tokenizer(parsed: Parsed, new_ids: NewIds) -> dict[str, Any]:
    """A parsed `tokenizer.json` with only the tokens in `new_ids`, and only the merges that are among them."""
    vocabulary, model = Vocabulary(parsed), dict(parsed["model"])
    kept = {name for name, id_ in vocabulary.ids.items() if id_ in new_ids}
    if vocabulary.kind == "Unigram":
        model["vocab"] = [entry for id_, entry in enumerate(model["vocab"]) if id_ in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {name: new_ids[id_] for name, id_ in vocabulary.ids.items() if id_ in new_ids}
    if "merges" in model:
        model["merges"] = [
            merge for merge in model["merges"]
            if {*pair_of(merge), vocabulary.joined(*pair_of(merge))} <= kept
        ]  # fmt: skip
    added = [{**token, "id": new_ids[token["id"]]} for token in parsed.get("added_tokens") or ()]
    padding = parsed.get("padding") and {**parsed["padding"], "pad_id": new_ids[parsed["padding"]["pad_id"]]}
    processor = _processor(parsed.get("post_processor"), new_ids)
    return {**parsed, "model": model, "added_tokens": added, "padding": padding, "post_processor": processor}


def named_ids(folder: Path, vocabulary: Vocabulary) -> set[int]:
    """The ids that the folder's configs name as special tokens.

    Raises StageFailed where one of them is no token of the vocabulary.
    """
    found = set()
    for name, key, id_ in special_ids(folder):
        if id_ not in vocabulary.names:
            what = f"{name} says {key} {id_}, and {TOKENIZER} has no such token"
            raise StageFailed("reduce-vocab", what, "name the tokenizer that the model was trained with")
        found.add(id_)
    return found


def special_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(file, key, id) of each special token that the folder's configs name."""
    for name in _CONFIGS:
        config = recall(folder / name)
        if isinstance(config, Mapping):
            yield from ((name, key, id_) for key, id_ in _special_ids(config))


def with_new_ids(config: Mapping[str, Any], new_ids: NewIds) -> dict[str, Any]:
    """A config whose token ids, whatever they are for, are the new ones; those of tokens that went are left out."""
    return {key: _value(key, value, new_ids) for key, value in config.items()}


def _value(key: str, value: Any, new_ids: NewIds) -> Any:
    if isinstance(value, Mapping) and key != _BIASES:
        return with_new_ids(value, new_ids)
    if _is_special(key) and isinstance(value, int) and not isinstance(value, bool):
        return new_ids.get(value, value)  # one that is no token, -1 perhaps, stands for none
    if not isinstance(value, list):
        return value
    if key in _LISTS or _is_special(key):
        return [new_ids.get(id_, id_) for id_ in value if id_ in new_ids or id_ < 0]
    if key in _SEQUENCES:
        return [[new_ids[id_] for id_ in ids] for ids in value if all(id_ in new_ids for id_ in ids)]
    if key == _FORCED:
        return [[place, new_ids[id_]] for place, id_ in value if id_ in new_ids]
    if key == _BIASES:
        return [[[new_ids[id_] for id_ in ids], bias] for ids, bias in value if all(id_ in new_ids for id_ in ids)]
    return value


def _special_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif _is_special(key):
            ids = value if isinstance(value, list) else [value]
            yield from ((key, id_) for id_ in ids if isinstance(id_, int) and id_ >= 0)


def _is_special(key: str) -> bool:
    """Whether a key of a config names special tokens: `eos_token_id`, `forced_bos_token_id`, `eos_token_ids`."""
    return key.endswith(("_token_id", "_token_ids"))


def _processor(processor: Any, new_ids: NewIds) -> Any:
    """What puts special tokens around a text, with their new ids."""
    if not isinstance(processor, Mapping):
        return processor
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [_processor(each, new_ids) for each in found["processors"]]
    if "special_tokens" in found:
        found["special_tokens"] = {
            name: {**token, "ids": [new_ids[id_] for id_ in token["ids"]]}
            for name, token in found["special_tokens"].items()
        }
    for edge in ("sep", "cls"):  # BertProcessing's and RobertaProcessing's (token, id)
        if edge in found:
            token, id_ = found[edge]
            found[edge] = [token, new_ids[id_]]
    return found
