"""Which layers are converted: scores against the long way, their controls, and what is remembered of a killed run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from converting import BASE, context, convert

from compress.mixers.spec import SPECS
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.convert import conversion
from compress.stages.convert.choose import best_restored, least_moved, proxy_scores
from compress.stages.convert.init import new_mixers, with_mixers
from compress.stages.convert.layers import at_random, evenly
from compress.stages.convert.stage import ConvertAttention
from compress.train.losses import forward_kl
from compress.units import Unit, Units
from pico import make_pico

Pico = Callable[[str], Path]
BATCHES = torch.from_numpy(np.random.default_rng(3).integers(1, 500, (4, 12))).split(2)


def scores_of(out: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return scores


def test_the_proxy_is_the_kl_of_the_model_with_that_layer_alone_converted(pico: Pico) -> None:
    teacher = load_model(pico("llama"))
    mixers = new_mixers(teacher, [0, 1, 3], SPECS["mamba2"])
    steps: list[int] = []
    found = proxy_scores(Parts(teacher), mixers, BATCHES, lambda steps_=1, note="": steps.append(steps_))
    assert len(steps) == 2 * 3
    for index, score in found.items():
        student, kl = with_mixers(teacher, mixers, [index], SPECS["mamba2"]), []
        for ids_BT in BATCHES:
            with torch.no_grad():
                outputs = [model(ids_BT).logits.flatten(0, 1) for model in (student, teacher)]
            kl.append(forward_kl(*outputs))
        assert score == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    for name, weight in load_model(pico("llama")).state_dict().items():
        assert torch.equal(teacher.state_dict()[name], weight)


def test_the_least_moved_go_and_the_best_restored_stay() -> None:
    scores = {0: 0.5, 2: 0.1, 5: 0.3, 6: 0.2}
    assert least_moved(scores, 2, 10, has_logits=True).converted == [2, 6]
    assert best_restored(scores, 3, 10).converted == [0, 5, 6]


@pytest.mark.parametrize("select", ["kl-proxy", "kl"])
def test_scores_are_written_and_decide(select: str, pico: Pico, tmp_path: Path) -> None:
    options = {**BASE, "to": "gated-linear", "convert": 2, "select": select}
    convert(tmp_path, pico("llama"), **options)
    record = scores_of(tmp_path / "out")
    scores = {int(index): score for index, score in record["scores"].items()}
    assert set(scores) == {0, 1, 2, 3}
    assert record["num_tokens"] == 64
    ranked = sorted(scores, key=scores.__getitem__, reverse=select == "kl")
    assert record["converted"] == sorted(ranked[:2])
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [index for index, mixer in enumerate(config["mixers"]) if mixer] == record["converted"]


def test_a_layer_that_matters_keeps_its_softmax(tmp_path: Path) -> None:
    """A model all of whose attention but that of layer 2 says next to nothing."""
    source = load_model(make_pico("llama", tmp_path / "source", num_hidden_layers=3))
    parts = Parts(source)
    with torch.no_grad():
        for index, layer in enumerate(parts.layers):
            attention: Any = parts.attention(layer)
            attention.o_proj.weight.mul_(3.0 if index == 2 else 1e-3)
            attention.q_proj.weight.mul_(3.0)
    source.save_pretrained(tmp_path / "source")
    for select in ("kl-proxy", "kl"):
        convert(tmp_path / select, tmp_path / "source", keep=1, select=select)
        assert scores_of(tmp_path / select / "out")["converted"] == [0, 1]


def test_scores_of_a_killed_run_are_not_measured_again(pico: Pico, tmp_path: Path, monkeypatch: Any) -> None:
    options = {**BASE, "keep": 1, "select": "kl", "align": None, "select_tokens": 512, "kl_tokens": 512}
    job = conversion.prepare(ConvertAttention.model_validate(options), context(tmp_path, pico("llama")))
    kept = Units("convert-attention", tmp_path / "work" / "scores")
    for index, loss in {0: 0.1, 1: 0.4, 3: 0.5}.items():
        kept.keep(f"layer {index}", Unit(loss))
    trained = []

    class Trained:
        log = ({"eval_loss": 0.9, "step": 0}, {"eval_loss": 0.2, "step": 2})

    def train(student: Any, teacher: Any, ids: Any, training: Any, work: Path, *_: Any) -> Any:
        trained.append(work.name)
        assert [spec is None for spec in Parts(student).shape.mixers] == [False, False, True, False]
        assert training.eval_steps == training.num_steps
        assert ids[0] is job.align_NT
        assert ids[1] is job.held_NT
        return Trained

    monkeypatch.setattr(conversion, "_train", train)
    made = conversion.convert(job, Reporter())
    assert trained == ["restore-2"]
    assert made.choice.converted == [1, 2, 3]
    assert kept.find("layer 2") == Unit(0.2)


def test_controls_measure_nothing_and_follow_the_seed(pico: Pico, tmp_path: Path) -> None:
    def converted(select: str, seed: int) -> list[int]:
        out = tmp_path / f"{select}-{seed}"
        convert(out, pico("llama"), seed=seed, select=select, convert=2, align=None)
        assert not (out / "out" / "scores.png").exists()
        found: list[int] = scores_of(out / "out")["converted"]
        return found

    assert converted("uniform", 0) == converted("uniform", 1) == [0, 2]
    assert converted("random", 0) == at_random([0, 1, 2, 3], 2, 0)
    assert len({tuple(at_random(range(9), 4, seed)) for seed in range(6)}) > 1


def test_softmax_layers_are_spread_evenly() -> None:
    assert [i for i in range(30) if i not in evenly(range(30), 6)] == [2, 7, 12, 17, 22, 27]
    assert evenly([1, 2, 5], 0) == [1, 2, 5]
    assert evenly([1, 2, 5], 1) == [1, 5]
    for num_kept in range(13):
        assert len(evenly(range(12), num_kept)) == 12 - num_kept
