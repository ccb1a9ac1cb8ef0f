"""What the installed transformers calls the cache: the one place that knows.

From 5.24 on every decoder's `forward`, its layers, the mask builders, `generate` and the outputs say `cache`, and take
`past_key_values` with a warning until 5.40; before, they know `past_key_values` alone. Imports only transformers: a
converted artifact carries a copy.
"""

from __future__ import annotations

from inspect import signature
from typing import TypeVar

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""The keyword and the output field."""

T = TypeVar("T")


def one_cache(cache: T | None, past_key_values: T | None) -> T | None:
    """The cache, by whichever of its two names it was given. Raises TypeError where they are two different ones."""
    if cache is None:
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise TypeError("cache and past_key_values are two names of one argument, but two caches came: give one")
    return cache
