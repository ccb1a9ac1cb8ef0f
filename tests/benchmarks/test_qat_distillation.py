"""The benchmark of distillation in QAT on a tiny model: every method once."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
import sys

import numpy as np
import pytest

from compress.benchmarks import qat_distillation
from compress.benchmarks.qat_distillation import PTQ, QAT, Settings, report

TINY = {
    "layers": 1, "hidden": 64, "vocabulary": 400, "length": 32, "batch": 2, "source_tokens": 128, "qat_tokens": 128,
    "judged_tokens": 128, "tuned_tokens": 64,
}  # fmt: skip


def test_it_compares_all_methods(tmp_path, monkeypatch, capsys):
    texts = list(topics.topics.values())
    addresses = tmp_path / "addresses"
    addresses.mkdir()
    for number, year in enumerate((1900, 2008, 2011, 2014, 2021)):
        (addresses / f"{year}_somebody.txt").write_text(texts[number])
    arguments = ["x", "--out", str(tmp_path / "out"), "--schemes", "w2-block32", "--seeds", "1"]
    settings = ["--addresses", str(addresses), "--settings", json.dumps(TINY)]
    monkeypatch.setattr(sys, "argv", arguments + settings)
    qat_distillation.main()
    text = (tmp_path / "out" / "qat-distillation.md").read_text()
    assert all(text.count(f"\n| {method} | 1 |") == 2 for method in (*PTQ, *QAT))
    assert not list((tmp_path / "out").rglob("*.work"))
    monkeypatch.setattr(qat_distillation.Bench, "quantised", lambda *_: pytest.fail("made again"))
    qat_distillation.main()
    assert (tmp_path / "out" / "qat-distillation.md").read_text() == text
    capsys.readouterr()


def test_differences_are_those_of_the_same_seed_and_block():
    def row(method: str, seed: int, ce: list[float], scheme: str = "w2-block32") -> dict[str, object]:
        figures = {"text": {"ce": ce, "kl": [0.5, 0.7], "top1_agreement": [1.0, 1.0]}}
        return {"scheme": scheme, "method": method, "seed": seed, "figures": figures}

    rows = [
        row("source", 0, [1.0, 3.0], "float32"), row("rtn", 0, [2.0, 4.5]), row("QAT, cross-entropy", 0, [1.5, 3.5]),
        row("QAT, cross-entropy", 1, [1.7, 3.7]), row("QAT, KD", 0, [1.2, 3.1]), row("QAT, KD", 1, [1.2, 3.3]),
    ]  # fmt: skip
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in report(rows, Settings()).splitlines()[6:]}
    assert lines["QAT, cross-entropy"][2:] == [
        f"{np.exp(2.6):.3f}", "0.6000 ± 0.0000", "0.6000 ± 0.1000", "0.4000 ± 0.0000", "0.3500 0.4500 |",
    ]  # fmt: skip
    assert lines["rtn"][3] == "1.2500 ± 0.2500"
    assert lines["QAT, KD"][5:] == ["", " |"]
