"""Which options count: those that are on, with what null and auto stand for in their place. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel

Group = TypeVar("Group", bound=BaseModel)


def counted(options: BaseModel, meant: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that are on, by name, groups as mappings; the rest is left out, so that a new option touches no key.

    meant: what stands in place of an option's own value: what null or auto means here, and None for what has no say.
    An option has one value that is off: null where it takes null, else what is false, 0 or empty. Whatever else it can
    be tells two artifacts apart, its default too: `keep: 0` and no `keep` are two things.
    """
    values = dict(options) | dict(meant or {})
    fields = type(options).model_fields
    on = {name: value for name, value in values.items() if not _is_off(value, fields[name].annotation)}
    return {name: counted(value) if isinstance(value, BaseModel) else value for name, value in on.items()}


def replaced(options: Group, changes: Mapping[str, Any]) -> Group:
    """The same with other values, which count as given no more than those in their place did."""
    if not changes:
        return options
    return type(options).model_construct(set(options.model_fields_set), **dict(options) | dict(changes))


def limited(options: Group, positions: int) -> Group:
    """The same, and its groups, with no `sequence_length` beyond a model's positions that nobody gave."""
    changes: dict[str, Any] = {}
    for name, value in options:
        if isinstance(value, BaseModel) and (fitted := limited(value, positions)) is not value:
            changes[name] = fitted
        elif name == "sequence_length" and name not in options.model_fields_set and value > positions:
            changes[name] = positions
    return replaced(options, changes)


def _is_off(value: object, annotation: object) -> bool:
    return value is None or (NoneType not in get_args(annotation) and not value)
