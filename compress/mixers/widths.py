"""The widths of each layer, where layers differ, as `config.json` says in `layer_widths`. Imports no torch.

One entry a layer, with any of `num_attention_heads`, `num_key_value_heads`, `intermediate_size` and, of a layer with a
mixer, `v_head_dim`: what an entry leaves out is the config's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class LayerWidths:
    """One layer's widths. v_head_dim: lanes of a head's values; its queries and keys have head_dim."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int
    v_head_dim: int


class OwnWidths:
    """A config with `layer_widths`, whose heads may have a head_dim of their own and need not divide hidden_size.

    `config.json` has these keys only where they say something.
    """

    layer_widths: ClassVar[Any] = None

    def validate(self) -> None:
        """What transformers checks of the family's config, but for that."""
        validators: Any = getattr(self, "__class_validators__", ())
        for validator in validators:
            if validator.__name__ != "validate_architecture":
                validator(self)


KEYS = tuple(field.name for field in fields(LayerWidths) if field.name != "head_dim")


def widths_of(config: Any, layer: int) -> LayerWidths:
    """The widths of a layer by a config with Hugging Face's common attributes."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    groups = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    intermediate = config.n_inner if hasattr(config, "n_inner") else config.intermediate_size
    whole = LayerWidths(heads, groups or heads, intermediate or 4 * hidden, head_dim, head_dim)
    entries = getattr(config, "layer_widths", None)
    return with_entry(whole, entries[layer] if entries else None, groups is not None)


def with_entry(whole: Any, entry: Mapping[str, int] | None, grouped: bool) -> LayerWidths:
    """The widths of a layer with this entry, where what it leaves out is as `whole` has it.

    grouped: whether the family tells key/value heads from query heads.
    """
    own = dict(entry or {})
    if not grouped and "num_attention_heads" in own:
        own["num_key_value_heads"] = own["num_attention_heads"]
    return LayerWidths(**{field.name: own.get(field.name, getattr(whole, field.name)) for field in fields(LayerWidths)})


def widths_fault(entries: object, num_layers: int, mixed: list[bool], grouped: bool) -> str:
    """What is wrong with a config's `layer_widths`; "" where nothing is. mixed: which layers have a mixer."""
    if entries is None:
        return ""
    if not isinstance(entries, list) or len(entries) != num_layers:
        number = len(entries) if isinstance(entries, list) else "no"
        return f"layer_widths has {number} entries for {num_layers} layers"
    for layer, entry in enumerate(entries):
        if entry is not None and not isinstance(entry, dict):
            return f"layer_widths[{layer}] is no mapping"
        for name, value in (entry or {}).items():
            if name not in KEYS or (name == "num_key_value_heads" and not grouped):
                return f"layer_widths[{layer}] has an unknown key {name!r}"
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                return f"layer_widths[{layer}].{name} is {value!r}, not a whole number from 1"
            if name == "v_head_dim" and not mixed[layer]:
                return f"layer_widths[{layer}] has a v_head_dim, and its attention is softmax"
    return ""
