"""The recovery benchmark on a pico model: every method has its row, and a second call measures nothing again."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
import sys

import pytest

from compress.benchmarks import recovery


def test_it_compares_all_methods_and_goes_on_where_it_stopped(pico, tmp_path, monkeypatch, capsys):
    texts = list(topics.topics.values())
    (tmp_path / "train.txt").write_text("\n".join(texts[:12]))
    (tmp_path / "other.txt").write_text("\n".join(texts[40:44]))
    options = {"tokens": 128, "sequence_length": 16, "batch_size": 4, "learning_rate": 1e-3}
    arguments = [
        "recovery", str(pico("llama")), "--train", str(tmp_path / "train.txt"), "--out", str(tmp_path / "out"),
        "--judge", f"other={tmp_path / 'other.txt'}", "--drop", "1", "--seeds", "2", "--by", "block-influence",
        "--eval-tokens", "64", "--options", json.dumps(options),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    recovery.main()
    report = (tmp_path / "out" / "recovery.md").read_text()
    cells = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in report.splitlines() if line.startswith("|")
    }
    assert set(recovery.METHODS) <= cells.keys()
    assert [cells[method][2] for method in recovery.METHODS] == ["1", "2", "2", "2"]
    assert cells["kl"][6] == ""
    assert "±" in cells["cross-entropy"][6]
    assert not list((tmp_path / "out").glob("*.work"))
    monkeypatch.setattr(recovery.Bench, "measure", lambda *_: pytest.fail("measured again"))
    recovery.main()
    assert (tmp_path / "out" / "recovery.md").read_text() == report
    capsys.readouterr()
