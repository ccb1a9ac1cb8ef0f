"""The benchmark of losses on attention, on a pico encoder: every method has its row, and nothing is measured twice."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.benchmarks import attention_losses, reviews
from compress.models.load import load_tokenizer


def write_reviews(folder: Path) -> str:
    lines = [line for text in list(topics.topics.values())[:9] for line in text.splitlines() if len(line) > 40][:60]
    for i, name in enumerate(reviews.FILES):
        rows = [{"text": line, "class": n % 2} for n, line in enumerate(lines[i::3])]
        (folder / f"{name}.json").write_text(json.dumps([*rows, {"text": "neither", "class": None}]))
    (folder / "another.json").write_text('[{"text": "x", "class": 1}]')
    return str(folder / "*.json")


def test_reviews_are_padded_and_held_out_by_their_text(pico: Callable[[str], Path], tmp_path: Path) -> None:
    test, rest = reviews.reviews(write_reviews(tmp_path), load_tokenizer(pico("bert")), 16)
    assert len(test) + len(rest) == 60
    assert 5 <= len(test) <= 20
    assert test.shape[1] == 16
    assert set(rest.labels_N.tolist()) == {0, 1}
    assert (test.mask_NT[:, 0] == 1).all()
    shorter = rest[:3]
    assert (shorter.ids_NT == rest.ids_NT[:3]).all()
    assert len(shorter) == 3


def test_it_compares_all_losses_and_goes_on_where_it_stopped(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"length": 16, "batch": 4, "epochs": 0.3, "tuning_epochs": 0.3, "num_tuning": 4, "rates": [1e-5, 1e-3]}
    monkeypatch.setattr(attention_losses, "QAT", {name: attention_losses.QAT[name] for name in QAT})
    monkeypatch.setattr(
        sys, "argv",
        ["attention_losses", str(pico("bert")), "--out", str(tmp_path / "out"), "--seeds", "2",
         "--sentences", write_reviews(tmp_path), "--settings", json.dumps(settings)],
    )  # fmt: skip
    attention_losses.main()
    whole = report = (tmp_path / "out" / "attention-losses.md").read_text()
    assert "at 1e-05, " in report
    assert all(f"| {figure} |" in report for figure in attention_losses.FIGURES)
    report, _ = report.split(attention_losses.FIGURES[1])
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in report.splitlines() if line[:1] == "|"}
    assert {"float32", *attention_losses.PTQ, *QAT} <= cells.keys()
    assert len(cells["+ both"][2].split()) == 2
    assert len(cells["rtn"][2].split()) == 1
    assert len(cells[attention_losses.REFERENCE]) == 3
    assert "±" in cells["+ both"][3]
    monkeypatch.setattr(attention_losses.Bench, "qat", lambda *_: pytest.fail("measured again"))
    attention_losses.main()
    assert (tmp_path / "out" / "attention-losses.md").read_text() == whole
    capsys.readouterr()


QAT = ("labels alone", attention_losses.REFERENCE, "+ both")
