"""Every cell of the matrix is run, not only listed: model type × stage × export, on pico models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compress.models.anatomy import FAMILIES
from compress.pipeline.check import valid_pipeline
from compress.pipeline.matrix import Cell, cells
from compress.runner.execute import Setting, execute
from compress.runner.journal import Journal, blank_record
from compress.runner.plan import Plan, make_plan
from compress.runner.prepare import prepare
from compress.stage import Reporter
from pico import MODEL_TYPES


def test_the_matrix_has_a_row_for_every_supported_model_type() -> None:
    assert {cell.model_type for cell in cells()} == {name for family in FAMILIES for name in family.model_types}
    assert set(MODEL_TYPES) == {cell.model_type for cell in cells()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_cell_runs_or_is_refused_by_name(model_type: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    for cell in (cell for cell in cells() if cell.model_type == model_type):
        if not cell.is_supported:
            assert model_type in cell.reason, cell
            continue
        plan = run_cell(cell, pico(model_type), tmp_path)
        exported = [step for step in plan.steps if step.stage.returns == "onnx"]
        assert exported, cell
        assert all((step.directory / "model.onnx").is_file() for step in exported)
        assert all(step.is_cached for step in plan.steps), cell


def run_cell(cell: Cell, model: Path, folder: Path) -> Plan:
    """Run a cell's stages, made small, in one directory for all cells of a model, so that they share what is cached."""
    file = folder / "cell.yaml"
    data = {"train": "python-docs"}
    content = {"name": "cells", "model": str(model), "data": data, "target": {"threads": 1}, "stages": cell.stages}
    file.write_text(json.dumps(content))
    prepared = prepare(valid_pipeline(file), folder, Reporter())
    nodes = tuple(replace(node, stage=node.stage.twin()) for node in prepared.graph.nodes)
    small = replace(prepared.graph, nodes=nodes)
    pipeline, texts = prepared.pipeline, prepared.data
    plan = make_plan(
        small, sources=prepared.plan.sources, data=texts, seed=0, target=pipeline.target, run_dir=folder
    )
    setting = Setting(prepared.model, texts, 0, pipeline.target, Reporter())
    execute(plan, setting, Journal(folder, blank_record(pipeline, plan)))
    return plan
