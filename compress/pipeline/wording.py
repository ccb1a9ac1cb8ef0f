"""pydantic's errors in plain words: where it is, what was received, what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.errors import Problem
from compress.pipeline.document import Steps, shown
from compress.registry import did_you_mean

_MISSING = "is missing"
ModelT = TypeVar("ModelT", bound=BaseModel)

_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "tuple": "a list", "set": "a list", "frozen_set": "a list", "dict": "a mapping (key: value)",
    "model": "a mapping (key: value)", "path": "a path", "none": "left out", "finite": "a finite number",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}  # fmt: skip

_MOVED: Mapping[Steps, str] = {
    ("data", "sequence_length"): "stages have a sequence_length each: give it to those that read the text",
}  # fmt: skip
"""Where an option went that a file may still have."""

Fault = tuple[Steps, str, str]
"""Where below the validated value, what is wrong, what to do."""


def validate(model: type[ModelT], value: Mapping[str, Any]) -> tuple[ModelT | None, list[Fault]]:
    """An instance of `model`, or what is wrong with it.

    Strict as JSON is: lists may stand for tuples and text for paths, but `true` is no number and `"3"` neither.
    """
    text = json.dumps(value)
    try:
        return model.model_validate_json(text, strict=True), []
    except ValidationError as error:
        errors = [each for each in error.errors(include_url=False) if not _is_list_for_tuple(each)]
    if not errors:
        try:
            return model.model_validate_json(text), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
    return None, list(_faults(model, value, errors))


def _is_list_for_tuple(error: ErrorDetails) -> bool:
    """Whether it is only that a validator of the model's own handed on a list, which strict tuples and sets refuse."""
    return isinstance(error["input"], list) and error["type"] in ("tuple_type", "set_type", "frozen_set_type")


def located(faults: Sequence[Fault], place: Callable[..., str], *above: str | int) -> Iterator[Problem]:
    """The faults as problems; `place` is the document's, `above` the steps to the validated value."""
    for steps, what, fix in faults:
        yield Problem(place(*above, *steps), what, fix)


def _faults(model: type[BaseModel], value: Any, errors: Sequence[ErrorDetails]) -> Iterator[Fault]:
    by_steps: dict[Steps, list[ErrorDetails]] = {}
    for error in errors:
        by_steps.setdefault(_steps(value, error), []).append(error)
    schema = model.model_json_schema()
    nearest = {steps: group for steps, group in by_steps.items() if not _is_outdone(steps, by_steps)}
    words = {steps: _words(schema, steps, group) for steps, group in nearest.items()}
    suggested = {(*steps[:-1], fix[14:-2]) for steps, (_, fix) in words.items() if fix.startswith("did you mean '")}
    for steps, (what, fix) in words.items():
        if what != _MISSING or steps not in suggested:  # it is there, misspelt
            yield steps, what, fix


def _is_outdone(steps: Steps, others: Iterable[Steps]) -> bool:
    """Whether another branch of the same union went further in: its fault is the nearer one."""
    return any(len(other) > len(steps) > 0 and other[: len(steps)] == steps for other in others)


def _steps(value: Any, error: ErrorDetails) -> Steps:
    """Where the error is in `value`: its `loc` without the names of a union's branches."""
    steps: list[str | int] = []
    for index, step in enumerate(error["loc"]):
        known: Iterable[object] = value if isinstance(value, Mapping) else ()
        if step in (range(len(value)) if isinstance(value, list) else known):
            value = value[step]
            steps.append(step)
        elif error["type"] == "missing" and index == len(error["loc"]) - 1:
            steps.append(step)
    return tuple(steps)


def _words(schema: Mapping[str, Any], steps: Steps, group: Sequence[ErrorDetails]) -> tuple[str, str]:
    first = group[0]
    match first["type"]:
        case "extra_forbidden" if steps[-2:] in _MOVED:
            return "is no option here any more", _MOVED[steps[-2:]]
        case "extra_forbidden":
            return "is no option here", did_you_mean(str(steps[-1]), _options(schema, steps[:-1]))
        case "missing":
            described = _options(schema, steps[:-1]).get(str(steps[-1]), "")
            return _MISSING, f"give {described[:1].lower()}{described[1:]}" if described else f"add {steps[-1]!r}"
        case "value_error" | "assertion_error":
            what, _, fix = str(first["ctx"]["error"]).partition("; ")
            return (what if isinstance(first["input"], dict) else f"{what}, got {shown(first['input'])}"), fix
        case "string_pattern_mismatch":
            return f"is malformed: {shown(first['input'])}", _options(schema, steps[:-1]).get(str(steps[-1]), "")
    got = shown(first["input"])
    bounds = [error for error in group if error["type"] in _BOUNDS]
    musts = dict.fromkeys(filter(None, map(_must, bounds or group)))
    if not musts:
        return f"{first['msg'][:1].lower()}{first['msg'][1:]}, got {got}", ""
    return f"must be {' or '.join(musts)}, got {got}", _fix(group, first["input"])


def _must(error: ErrorDetails) -> str:
    """What the value must be, in words that follow `must be`; "" where there are none of ours."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        word, limit = _BOUNDS[kind]
        return f"{word} {context[limit]:g}"
    match kind:
        case "literal_error" | "enum":
            return str(context["expected"])
        case "too_short" | "too_long" | "string_too_short" | "string_too_long":
            bound, count = ("least", "min_length") if kind.endswith("short") else ("most", "max_length")
            return f"at {bound} {context[count]} {'character' if 'string' in kind else 'value'}(s) long"
    return _TYPES.get(kind.removesuffix("_type").removesuffix("_parsing").split("_")[0], "")


def _fix(group: Sequence[ErrorDetails], value: object) -> str:
    kinds = {error["type"].split("_")[0] for error in group}
    if isinstance(value, str) and (literals := [e["ctx"]["expected"] for e in group if e["type"] == "literal_error"]):
        words = [word.strip(" '") for word in " or ".join(literals).replace(" or ", ",").split(",")]
        suggestion = did_you_mean(value, words)
        return suggestion if suggestion.startswith("did") else ""
    if "int" in kinds and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}" if abs(value) < 1e15 else ""
    if "string" in kinds and isinstance(value, int | float):
        return "put it in quotes"
    if "bool" in kinds and value in ("yes", "no", "on", "off"):
        return f"write {str(value in ('yes', 'on')).lower()}"
    if isinstance(value, str) and kinds & {"int", "float"} and value.replace(".", "", 1).isdigit():
        return "write it without quotes"
    return ""


def _options(schema: Mapping[str, Any], steps: Steps) -> Mapping[str, str]:
    """The options (and their descriptions) of the object at `steps` of a JSON schema, of all branches of a union."""
    here = list(_branches(schema, schema))
    for step in steps:
        below = [branch["items" if isinstance(step, int) else "properties"] for branch in here if _has(branch, step)]
        here = [branch for part in below for branch in _branches(schema, part if isinstance(step, int) else part[step])]
    options = [option for branch in here for option in branch.get("properties", {}).items()]
    return {name: option.get("description", "") for name, option in options}


def _has(branch: Mapping[str, Any], step: str | int) -> bool:
    return "items" in branch if isinstance(step, int) else step in branch.get("properties", {})


def _branches(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "$ref" in part:
        yield from _branches(schema, schema["$defs"][part["$ref"].removeprefix("#/$defs/")])
        return
    unions = [branch for word in ("anyOf", "oneOf", "allOf") for branch in part.get(word, ())]
    for branch in unions:
        yield from _branches(schema, branch)
    if not unions:
        yield part
