"""The JSON Schema of the pipeline file, made from the stages' own classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from compress.pipeline.file import ID_PATTERN, PipelineFile
from compress.pipeline.require import COMPARISON_PATTERN
from compress.registry import stage_class, stage_names
from compress.stage import Stage

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFS = "#/$defs/{model}"


def file_schema() -> dict[str, Any]:
    """The schema of a whole pipeline file (JSON Schema 2020-12)."""
    classes = [stage_class(name) for name in stage_names()]
    refs, definitions = models_json_schema(
        [(PipelineFile, "validation"), *((cls, "validation") for cls in classes)], ref_template=_REFS
    )
    parts = definitions["$defs"]
    names = [str(refs[cls, "validation"]["$ref"]).rpartition("/")[2] for cls in classes]
    for cls, name in zip(classes, names, strict=True):
        parts[name] = _stage_schema(parts[name], cls)
    top = parts.pop(str(refs[PipelineFile, "validation"]["$ref"]).rpartition("/")[2])
    top["properties"]["stages"]["items"] = _item_schema(classes, names, parts)
    comparison = {"type": "string", "pattern": f"^\\s*{COMPARISON_PATTERN}\\s*$"}
    top["properties"]["require"]["additionalProperties"] = comparison
    return {"$schema": _DIALECT, **top, "title": "compress pipeline file", "$defs": parts}


def _stage_schema(schema: Mapping[str, Any], cls: type[Stage]) -> dict[str, Any]:
    id_ = {"type": "string", "pattern": ID_PATTERN, "description": "the name of this stage, where one occurs twice"}
    described = {"description": cls.summary, "additionalProperties": False}
    return {**schema, **described, "properties": {**schema.get("properties", {}), "id": id_}}


def _item_schema(classes: list[type[Stage]], names: list[str], parts: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's name alone, where all of its options have defaults, or a mapping of its name to its options."""
    bare = [cls.name for cls, name in zip(classes, names, strict=True) if not parts[name].get("required")]
    options = {
        cls.name: {
            "description": cls.summary,
            "anyOf": [{"$ref": f"#/$defs/{name}"}, *([{"type": "null"}] if cls.name in bare else [])],
        }
        for cls, name in zip(classes, names, strict=True)
    }
    single = {"minProperties": 1, "maxProperties": 1, "additionalProperties": False}
    return {"anyOf": [{"enum": bare}, {"type": "object", "properties": options, **single}]}
