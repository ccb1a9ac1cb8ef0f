"""How tokens are chosen: what a model's `generation_config.json` says, in the words of onnxruntime-genai's `search`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_SAMPLED: Mapping[str, object] = {"min_p": 0, "top_h": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
_ALWAYS: Mapping[str, object] = {
    "num_beams": 1, "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
}  # fmt: skip
"""Keys that change which tokens come and that the runtime does not know, or our graph can't be run by, and the value by
which each changes nothing; the first where tokens are drawn."""


def search_options(generation: Mapping[str, Any], vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """`search`'s options of a parsed `generation_config.json`, and what to say of what it has that they can't.

    Of a model that samples, temperature, top_k and top_p are always there, since what the two take for left out
    differs: transformers' 1, 50 and 1. A number that can't be is taken for left out.
    """
    sampled = generation.get("do_sample") is True
    unknown = {**_ALWAYS, **(_SAMPLED if sampled else {})}
    notes = [
        f"{key}: {generation[key]} is left out: onnxruntime-genai can't run the folder so"
        for key, neutral in unknown.items()
        if generation.get(key) not in (None, neutral)
    ]

    def number(key: str, otherwise: float, least: float, most: float = math.inf) -> float:
        value = generation.get(key)
        if value is None:
            return otherwise
        kinds = int if isinstance(otherwise, int) else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most and value != math.inf:
            return type(otherwise)(value)
        notes.append(f"{key}: {value!r} can't be, {otherwise} is taken")
        return otherwise

    options: dict[str, Any] = {"do_sample": sampled, "num_beams": 1}
    if sampled:
        chosen = {
            "temperature": number("temperature", 1.0, 0),
            "top_k": min(number("top_k", 50, 0), vocab_size),  # 0 is all of them
            "top_p": number("top_p", 1.0, 0, 1),
        }
        if chosen["temperature"] and chosen["top_p"]:
            options |= chosen
        else:
            options["do_sample"] = False
            notes.append("a temperature or top_p of 0 is the likeliest token always: do_sample: false")
    if (penalty := number("repetition_penalty", 1.0, math.ulp(0))) != 1:
        options["repetition_penalty"] = penalty
    if num_tokens := number("no_repeat_ngram_size", 0, 0):
        options["no_repeat_ngram_size"] = num_tokens
    return options, notes
