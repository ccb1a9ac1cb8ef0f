"""The benchmark of what scoring costs, on a pico model."""

from __future__ import annotations

from compress.benchmarks import importance_cost
from compress.benchmarks.export_cost import Cost


def test_it_holds_each_importance_against_its_forward_passes(pico, monkeypatch, capsys):
    watched = []

    def cost_of(command, _):
        watched.append(command[-1])
        importance_cost.main(command[3:])  # what the watched process does
        return Cost(1.0, 100.0 if command[-1] == "load" else 125.0)

    monkeypatch.setattr(importance_cost, "cost_of", cost_of)
    importance_cost.main([str(pico("llama")), "--tokens", "512", "--rounds", "3", "--threads", "1"])
    printed = capsys.readouterr().out
    assert watched == ["load", "score"]
    assert "| activation | forward | " in printed
    assert "| taylor | forward and loss | " in printed
    assert "100 MB to load, 125 MB to load and score, 1.25×" in printed
