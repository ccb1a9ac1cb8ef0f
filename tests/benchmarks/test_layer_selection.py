"""The benchmark of layer choices on a tiny model: every way has its row, and a second call measures nothing again."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from compress.benchmarks import layer_selection
from compress.benchmarks.layer_selection import Settings

TINY = {
    "layers": 2, "hidden": 16, "heads": 2, "vocabulary": 16, "pairs": 3, "length": 16, "batch": 4, "repeat_steps": 2,
    "recall_steps": 2, "recall_rounds": 1, "align_steps": 2, "kl_steps": 1, "distill_steps": 2, "draws": 2,
    "questions": 4,
}  # fmt: skip


def test_repeats_repeat():
    rows = layer_selection.repeats(8, 32, 50, seed=3)
    assert rows.shape == (8, 32)
    for ids in rows:
        periods = [p for p in range(4, 16) if np.array_equal(ids[p:], ids[:-p])]
        assert periods


def test_random_is_every_choice_where_there_are_few():
    assert layer_selection.others(Settings(layers=4, draws=6), 1, 0) == [(0,), (1,), (2,), (3,)]
    drawn = layer_selection.others(Settings(layers=6, draws=5), 2, 1)
    assert len(set(drawn)) == 5
    assert drawn != layer_selection.others(Settings(layers=6, draws=5), 2, 2)


def test_it_compares_all_choices_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    arguments = ["x", "--out", str(tmp_path), "--seeds", "1", "--keep", "1", "--settings", json.dumps(TINY)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(layer_selection, "SELECTED", ("kl", "uniform"))
    layer_selection.main()
    report = (tmp_path / "layer-selection.md").read_text()
    for method in ("softmax", *layer_selection.SELECTED, "random"):
        assert f"| {method} | " in report
    assert "± " in next(line for line in report.splitlines() if line.startswith("| uniform"))
    assert not list(tmp_path.glob("*.work"))
    kept = {file.name: json.loads(file.read_text())["kept"] for file in tmp_path.glob("*-kl-1.json")}
    assert all(len(layers) == 1 for layers in kept.values())
    monkeypatch.setattr(layer_selection, "measure", lambda *_: pytest.fail("measured again"))
    layer_selection.main()
    assert (tmp_path / "layer-selection.md").read_text() == report
    capsys.readouterr()
