"""The step at which widths get faster: measured once a machine, and what `prune-groups` makes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import onnxruntime
import pytest

from compress.models.anatomy import ModelShape, shape_of
from compress.runtime import width_step
from compress.runtime.width_step import STEPS, UNMEASURED, known_step, measured_step
from compress.stage import Given
from compress.stages.prune.groups import PruneGroups

SHAPE: ModelShape = shape_of({**fakes.CONFIG, "intermediate_size": 128})
PANELS = {8: {8: 0.008, 16: 0.016, 32: 0.03, 64: 0.06}, 32: {8: -0.05, 16: 0.001, 32: 0.03, 64: 0.06},
          64: dict.fromkeys(STEPS, 0.0)}  # fmt: skip
"""What cuts save on a machine whose step is the key; where nothing is saved it is the largest there is."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def machine_of(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this machine have that step; the operators that are timed, as they are."""
    asked: list[str] = []

    def saved(operator: str, tokens: int, folder: Path) -> Mapping[int, float]:
        asked.append(operator)
        return PANELS[step]

    monkeypatch.setattr(width_step, "_saved", saved)
    return asked


@pytest.mark.parametrize("step", PANELS)
def test_the_step_is_the_smallest_cut_that_saves_time(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(step, monkeypatch)
    assert known_step() == UNMEASURED
    assert measured_step() == known_step() == step


def test_it_is_measured_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine_of(8, monkeypatch)
    assert (measured_step(), measured_step()) == (8, 8)
    assert asked == ["MatMul"] * 2 + ["DynamicQuantizeMatMul"] * 2 + ["MatMulNBits"] * 2
    monkeypatch.setattr(width_step, "minor_version", lambda package: "0.1")
    assert known_step() == UNMEASURED, "another ONNX Runtime has other kernels"


@pytest.mark.parametrize("operator", ["MatMul", "DynamicQuantizeMatMul", "MatMulNBits"])
def test_what_is_timed_is_the_product(operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are 0.01 (codes 3 and 9 − 8 times 0.01): 48 rows of ones give 48 times that."""
    session = onnxruntime.InferenceSession(width_step._product(operator, 48, 40).SerializeToString())
    weight = {"MatMul": 0.01, "DynamicQuantizeMatMul": 0.03, "MatMulNBits": 0.01}[operator]
    (found,) = session.run(None, {"x": np.ones((2, 48), np.float32)})
    low = 7 - 8  # codes are packed two to a byte, 0x79: 9 and 7
    expected = 24 * weight + 24 * weight * low if operator == "MatMulNBits" else 48 * weight
    assert found.shape == (2, 40)
    assert found == pytest.approx(np.full((2, 40), expected), abs=1e-3)

    monkeypatch.setattr(width_step, "_ROUNDS", {1: 3})
    monkeypatch.setattr(width_step, "_REPEATS", 1)
    saved = width_step._saved(operator, 1, tmp_path)
    assert list(saved) == list(STEPS)
    assert np.isfinite(list(saved.values())).all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"keep": {"intermediate": 0.7}}, {"cut": ["intermediate"], "params": 0.9},
     {"keep": {"intermediate": 96}, "allocate": "global"}],
)  # fmt: skip
def test_shares_go_by_it(options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = PruneGroups.model_validate(options)
    given = Given(SHAPE, {"input": "torch"})
    before = stage.settled(given)
    machine_of(8, monkeypatch)
    stage.measure_first(logging.getLogger())
    assert known_step() == 8
    assert stage.settled(given) != before
    named = PruneGroups.model_validate({**options, "multiple_of": 8})
    assert stage.settled(given) == named.settled(given)
    assert stage.shape(SHAPE) == named.shape(SHAPE)


@pytest.mark.parametrize(
    "options", [{"keep": {"intermediate": 96}}, {"keep": {"intermediate": 0.7}, "multiple_of": 16}]
)
def test_where_nothing_is_rounded_to_it_nothing_is_measured(
    options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = machine_of(8, monkeypatch)
    PruneGroups.model_validate(options).measure_first(logging.getLogger())
    assert not asked
