"""The benchmark of channels of Mamba-2 layers on a tiny model: each arm once, and what plain ranking moves."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
import sys

import pytest
import torch

from compress.benchmarks import ssm_channels
from compress.benchmarks.ssm_channels import _moved

TINY = {
    "layers": 2, "hidden": 32, "vocabulary": 400, "length": 32, "batch": 2, "pairs": 3, "recall_words": 12,
    "source_tokens": 128, "precision": "fp32", "judged_tokens": 128, "questions": 4,
}  # fmt: skip


def test_what_moves_with_the_channels_of_a_key_value_head():
    sizes = {"groups": 2, "heads": 4, "value_lanes": 3, "hidden": 5}
    order_GV = torch.tensor([[0, 4, 5], [1, 2, 3]])  # group 0 reads its lane 0 and lanes 1 and 2 of group 1
    assert _moved((("groups", "value_lanes"),), order_GV, sizes).tolist() == [0, 4, 5, 1, 2, 3]
    heads = [0, 7, 8, 3, 10, 11, 1, 2, 6, 4, 5, 9]  # the second query head of a group reads the second of the other
    assert _moved((("heads", "value_lanes"),), order_GV, sizes).tolist() == heads
    behind = _moved((("hidden",), ("groups", "value_lanes")), order_GV, sizes)
    assert behind.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 6, 7, 8]


def test_it_compares_three_rankings(tmp_path, monkeypatch, capsys):
    texts = list(topics.topics.values())
    addresses = tmp_path / "addresses"
    addresses.mkdir()
    for number, year in enumerate((1900, 2008, 2011, 2014, 2021)):
        (addresses / f"{year}_somebody.txt").write_text(texts[number])
    how = {"keep": 0.5, "score_tokens": 128, "conversion_tokens": 640, "tokens": 128}
    arguments = ["x", "--out", str(tmp_path / "out"), "--seeds", "1", "--addresses", str(addresses)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--settings", json.dumps(TINY), "--cut", json.dumps(how)])
    ssm_channels.main()
    report = (tmp_path / "out" / "ssm-channels.md").read_text()
    assert all(report.count(f"| {arm} | ") == 4 for arm in ssm_channels.ARMS)
    rows = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*-0-*.json")]
    assert len({row["parameters"] for row in rows}) == 1
    kl = {row["arm"]: row["figures"]["python-docs"]["kl"] for row in rows if not row["trained"]}
    assert kl["plain"] != kl["group-aware"] != kl["random"]
    monkeypatch.setattr(ssm_channels, "_measure", lambda *_: pytest.fail("measured again"))
    ssm_channels.main()
    assert (tmp_path / "out" / "ssm-channels.md").read_text() == report
    capsys.readouterr()
