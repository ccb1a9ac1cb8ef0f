"""The figures of a run, gathered from what its stages measured: by subject, and as the loss that each stage cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compress.pipeline.require import MODEL_FIGURES, RESULT
from compress.runner.record import RunRecord, StageRecord
from compress.stage import INPUT, SOURCE

MEASUREMENT = "measurement"
Figures = Mapping[str, Mapping[str, float]]


def figures_of(record: RunRecord) -> dict[str, dict[str, float]]:
    """Figures by subject: `result` (the last model of the file), `source`, every named baseline and every stage's id.

    A stage's figures are its own and those that measurements took of it. Where a figure was measured at several places
    in the file, `result` and the baselines have the latest: the one nearest to what is deployed.
    """
    found: dict[str, dict[str, float]] = {RESULT: {}, SOURCE: _source_figures(record)}
    for stage in record.stages:
        measured = stage.inputs[INPUT] if stage.returns == MEASUREMENT else stage.id
        for subject, values in stage.metrics.items():
            subjects = {stage.inputs[INPUT] if subject == INPUT else subject}
            if subject == RESULT:
                subjects = {measured, stage.id} | (set() if stage.hidden else {RESULT})
            for name in subjects:
                found.setdefault(name, {}).update(values)
        for role in stage.inputs.keys() & stage.metrics.keys() - {INPUT}:  # a baseline weighs what its own export does
            baseline = found.get(stage.inputs[role], {})
            weighed = {name: baseline[name] for name in MODEL_FIGURES if name in baseline}
            found[role] = {**weighed, **found[role]}
    return found


@dataclass(frozen=True)
class StageLine:
    """A stage that changed the model, what was measured of what it wrote, and how long it took."""

    stage: StageRecord
    measured: Mapping[str, float]
    seconds: float | None


def stage_lines(record: RunRecord) -> list[StageLine]:
    """Every stage of the file that writes a model, in order, with its own figures and what others measured of it."""
    found = figures_of(record)
    models = [stage for stage in record.stages if stage.returns != MEASUREMENT and not stage.hidden]
    return [StageLine(stage, found.get(stage.id, {}), _seconds(record, stage)) for stage in models]


def _seconds(record: RunRecord, stage: StageRecord) -> float | None:
    """What a stage took, with the hidden ones that it is short for."""
    if stage.seconds is None:
        return None
    before = next((other for other in record.stages if other.id == stage.inputs[INPUT] and other.hidden), None)
    return stage.seconds + ((before and _seconds(record, before)) or 0.0)


def _source_figures(record: RunRecord) -> dict[str, float]:
    pairs = {"parameters": record.source.parameters, "size_mb": record.source.size_mb}
    return {name: value for name, value in pairs.items() if value is not None}
