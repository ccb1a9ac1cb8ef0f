"""`compress stages`: what can be done to a model, and with which options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.screen import print_json
from compress.errors import InvalidInput

if TYPE_CHECKING:
    from compress.stage import Stage


def stages(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The stage to show.", show_default=False)] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Show what works for which model, as a table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the stages, or show one: its options with defaults, what it takes and hands on, the figures it measures.

    Formats say which stages can follow which. `torch` is a save_pretrained folder, `quantized` the same with codes and
    scales in place of weights, `onnx` a folder that ONNX Runtime loads; a `measurement` leaves the model as it is.
    """
    from compress.registry import did_you_mean, stage_class, stage_names

    found: Any
    if matrix:
        from compress.pipeline.matrix import as_markdown, cells

        found, text = [cell.to_json() for cell in cells()], as_markdown(cells())
    elif name is None:
        found = [describe(stage_class(each)) for each in stage_names()]
        text = "\n".join(_listing(found))
    elif name not in stage_names():
        raise InvalidInput(name, "there is no such stage", did_you_mean(name, stage_names()))
    else:
        found = describe(stage_class(name))
        text = "\n".join(_page(found))
    if as_json:
        print_json(found)
    else:
        print(text)


def describe(cls: type[Stage]) -> dict[str, Any]:
    """A stage as plain values: summary, formats, kinds of model, options and figures."""
    from pydantic import ValidationError

    schema = cls.model_json_schema()
    required = schema.get("required", ())
    try:
        figures: Sequence[str] = cls().produces()
    except ValidationError:  # some of its options have no default
        figures = ()
    return {
        "name": cls.name,
        "summary": cls.summary,
        "about": " ".join((cls.__doc__ or "").split()),
        "accepts": sorted(cls.accepts),
        "returns": cls.returns,
        "kinds": sorted(cls.kinds),
        "options": [
            {
                "name": option,
                "type": type_in_words(schema, part),
                "required": option in required,
                "default": part.get("default"),
                "description": part.get("description", ""),
            }
            for option, part in schema.get("properties", {}).items()
        ],
        "figures": list(figures),
    }


def type_in_words(schema: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """`whole number, at least 1`, `one of a, b`: a JSON schema's part for people."""
    if "$ref" in part:
        return type_in_words(schema, schema["$defs"][part["$ref"].removeprefix("#/$defs/")])
    for union in ("anyOf", "oneOf"):
        if union in part:
            words = [type_in_words(schema, branch) for branch in part[union] if branch.get("type") != "null"]
            return " or ".join(dict.fromkeys(words))
    if "const" in part:
        return str(part["const"])
    if "enum" in part:
        return " | ".join(map(str, part["enum"]))
    if part.get("type") == "array":
        return f"list of {type_in_words(schema, part.get('items', {}))}"
    if part.get("type") == "object":
        below = ", ".join(part.get("properties", {}))
        return f"{{{below}}}" if below else "mapping"
    word = {"integer": "whole number", "number": "number", "boolean": "true | false", "string": "text"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    return f"{word.get(part.get('type', ''), 'any')} {', '.join(limits)}".rstrip()


def _listing(described: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    width = max(len(stage["name"]) for stage in described)
    formats = [f"{' | '.join(stage['accepts'])} → {stage['returns']}" for stage in described]
    for stage, text in zip(described, formats, strict=True):
        yield f"{stage['name']:{width}}  {stage['summary']}"
        yield f"{'':{width}}  {text}"
    yield "\n`compress stages NAME` shows the options of one."


def _page(stage: Mapping[str, Any]) -> Iterator[str]:
    from compress.pipeline.document import shown

    yield f"{stage['name']}: {stage['summary']}\n"
    yield f"{fill(stage['about'], 110)}\n"
    yield f"takes {' or '.join(stage['accepts'])}, hands on {stage['returns']}"
    yield f"works on {' and '.join(stage['kinds'])} models"
    yield "\noptions:" if stage["options"] else "\nno options"
    for option in stage["options"]:
        default = "optional" if option["default"] is None else f"default {shown(option['default'])}"
        yield f"  {option['name']}: {option['type']} ({'required' if option['required'] else default})"
        yield fill(option["description"], 110, initial_indent=6 * " ", subsequent_indent=6 * " ")
    if stage["figures"]:
        yield f"\nfigures for `require`: {', '.join(stage['figures'])}"
