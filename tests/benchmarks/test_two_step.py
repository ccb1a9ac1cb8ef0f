"""The two-step benchmark on a tiny model: the recipe and its controls, each once."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
import sys

import numpy as np
import pytest

from compress.benchmarks import two_step
from compress.benchmarks.two_step import Settings

TINY = {
    "layers": 2, "hidden": 32, "vocabulary": 400, "length": 32, "batch": 2, "pairs": 3, "recall_words": 12,
    "source_tokens": 128, "precision": "fp32", "judged_tokens": 128, "questions": 4,
}  # fmt: skip


def test_a_share_of_the_blocks_needs_recall():
    settings = Settings(length=32, pairs=3, recall_words=12, recall_share=0.5)
    text_NT = np.random.default_rng(0).integers(0, 2048, (16, 32))
    mixed_NT = settings.with_recall(text_NT, 1)
    changed = [row for row in range(16) if not np.array_equal(text_NT[row], mixed_NT[row])]
    repeated = [row for row in changed if np.array_equal(text_NT[row, :8], mixed_NT[row, :8])]
    assert len(changed) == 8
    assert len(repeated) == 4
    assert np.array_equal(mixed_NT, settings.with_recall(text_NT, 1))


def test_it_compares_the_recipe_with_its_controls(tmp_path, monkeypatch, capsys):
    texts = list(topics.topics.values())
    addresses = tmp_path / "addresses"
    addresses.mkdir()
    for number, year in enumerate((1900, 2008, 2011, 2014, 2021)):
        (addresses / f"{year}_somebody.txt").write_text(texts[number])
    arguments = ["x", "--out", str(tmp_path / "out"), "--tokens", "640", "--addresses", str(addresses)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--settings", json.dumps(TINY)])
    two_step.main()
    report = (tmp_path / "out" / "two-step.md").read_text()
    assert report.count("| two steps | ") == 3
    assert all(report.count(f"| {method} | ") == 3 for method in two_step.METHODS)
    assert not list((tmp_path / "out").glob("*.work"))
    monkeypatch.setattr(two_step.Bench, "measure", lambda *_: pytest.fail("measured again"))
    two_step.main()
    assert (tmp_path / "out" / "two-step.md").read_text() == report
    capsys.readouterr()
