"""What works on what: model type × stage × export, as `compress check` itself judges it. Imports no torch.

Nothing is listed by hand. Each cell is a small pipeline, the stage's own `example` with one export, held against the
shape of a model of that type; a cell is empty where `check` refuses it, and the reason is what `check` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from compress.models.anatomy import FAMILIES, ModelShape, family_of, shape_of
from compress.pipeline.file import Entry
from compress.pipeline.graph import build_graph
from compress.registry import stage_class, stage_names
from compress.stage import Stage

ALONE = "export alone"
AUTO = "auto"
_SHAPE = {
    "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 32000, "max_position_embeddings": 8192, "sliding_window": None,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One combination. stages: as a pipeline file would list them. reason: why it is refused; "" where it works."""

    model_type: str
    stage: str
    export: str
    stages: tuple[Mapping[str, Mapping[str, Any]], ...]
    reason: str

    @property
    def is_supported(self) -> bool:
        """Whether `check` lets it pass."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """The same for other programs."""
        return asdict(self)


@cache
def cells() -> tuple[Cell, ...]:
    """All combinations of model type, stage and export."""
    return tuple(
        _cell(model_type, stage, label, export)
        for family in FAMILIES
        for model_type in family.model_types
        for stage in (None, *_classes(exports=False))
        for label, export in _exports(stage)
    )


def as_markdown(found: Sequence[Cell]) -> str:
    """The matrix as a table: model types down, stages across, in each cell the exports that work with it."""
    columns = list(dict.fromkeys(cell.stage for cell in found))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for model_type in dict.fromkeys(cell.model_type for cell in found):
        here = [cell for cell in found if cell.model_type == model_type and cell.is_supported]
        exports = [", ".join(cell.export for cell in here if cell.stage == column) for column in columns]
        lines.append([f"`{model_type}`", *(each or "—" for each in exports)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sample_shape(model_type: str) -> ModelShape:
    """The shape of an ordinary model of that type."""
    key = family_of(model_type).key
    return shape_of({"model_type": model_type, **{key(common): value for common, value in _SHAPE.items()}})


def _cell(model_type: str, cls: type[Stage] | None, label: str, export: Stage | None) -> Cell:
    chain = [export] if export else []
    if cls is not None:
        stage = cls.model_validate(dict(cls.example))
        measures = cls.returns == "measurement" and export is not None and export.returns in cls.accepts
        chain.insert(int(measures), stage)
    entries = [Entry(stage.name, stage, stage.name) for stage in chain]
    _, problems = build_graph(entries, sample_shape(model_type))
    stages = tuple({stage.name: stage.model_dump(mode="json", exclude_unset=True)} for stage in chain)
    return Cell(model_type, cls.name if cls else ALONE, label, stages, "; ".join(map(str, problems)))


def _exports(stage: type[Stage] | None) -> Iterator[tuple[str, Stage | None]]:
    """Each export stage in each of its formats, by the format's name; none behind a stage that exports itself.

    Where the format belongs to the artifact, because it is quantised, there is only `auto`; else `auto` is fp32.
    """
    if stage is not None and stage.returns == "onnx":
        yield AUTO, None
        return
    for cls in _classes(exports=True):
        field = cls.model_fields.get("format")
        formats = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
        if not formats or (stage is not None and stage.returns == "quantized"):
            yield AUTO, cls.model_validate(dict(cls.example))
        else:
            for format_ in (each for each in formats if each != AUTO):
                yield format_, cls.model_validate({**cls.example, "format": format_})


def _classes(*, exports: bool) -> list[type[Stage]]:
    """The stages that export what is handed to them, quantised or not; or all others."""
    classes = map(stage_class, stage_names())
    return [cls for cls in classes if (cls.returns == "onnx" and "quantized" in cls.accepts) == exports]
