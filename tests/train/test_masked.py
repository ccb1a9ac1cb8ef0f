"""Masked language models in training: what they read, what counts, and that it teaches them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "stages" / "convert"))

import converting
from teaching import context

from compress.data.masking import Masking
from compress.models.load import load_model, load_tokenizer
from compress.stage import Reporter
from compress.stages.distill.stage import Distill
from compress.stages.qat.stage import Qat
from compress.train.align import AlignTrainer
from compress.train.engine import recover
from compress.train.losses import IGNORED
from compress.train.objective import Objective, Said
from compress.train.options import LossWeights, TrainingOptions
from compress.train.trainer import Blocks, Masked, RecoveryTrainer, _batch
from pico import VOCAB_SIZE, make_pico

LENGTH, MASK = 16, 1
SHORT: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_size": 4, "tokens": 4 * 4 * LENGTH, "eval_tokens": 96, "eval_steps": 2,
    "precision": "fp32", "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("masked")
    return {
        role: make_pico("bert", folder / role, seed=seed, architecture="BertForMaskedLM", num_hidden_layers=2)
        for seed, role in enumerate(("teacher", "input"))
    }


def masked(models: dict[str, Path], ids_NT: np.ndarray[Any, Any]) -> Masked:
    return Masked(ids_NT, Masking.of(load_tokenizer(models["input"]), VOCAB_SIZE))


def texts(num: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, (num, LENGTH))


def test_what_is_hidden_follows_from_the_seed_and_the_place_in_the_order(models: dict[str, Path]) -> None:
    text = masked(models, texts(2))
    one, again, other = (Blocks(text, [0, 1, 0], seed) for seed in (5, 5, 6))
    for name in ("input_ids", "labels"):
        assert all(torch.equal(one[i][name], again[i][name]) for i in range(3))
    assert not torch.equal(one[0]["labels"], one[2]["labels"]), "the next pass hides other tokens"
    assert not torch.equal(one[0]["labels"], other[0]["labels"])
    asked_T = one[0]["labels"] != IGNORED
    assert asked_T.sum() == 2
    assert torch.equal(one[0]["labels"][asked_T], torch.from_numpy(text.ids_NT[0])[asked_T])


def test_logits_count_where_tokens_are_hidden_and_layers_everywhere(models: dict[str, Path]) -> None:
    rows = Blocks(masked(models, texts(3)), range(3))
    batch = _batch([rows[i] for i in range(3)])
    asked_BT = batch["labels"] != IGNORED
    student, teacher = (load_model(models[role]) for role in ("input", "teacher"))
    with torch.no_grad():
        ours, theirs = (model(batch["input_ids"], output_hidden_states=True) for model in (student, teacher))
    log_q, log_p = (each.logits[asked_BT].log_softmax(-1) for each in (ours, theirs))
    distances_BT = 1 - F.cosine_similarity(ours.hidden_states[1], theirs.hidden_states[1], dim=-1)
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(),
        "ce": F.cross_entropy(ours.logits[asked_BT], batch["labels"][asked_BT], reduction="sum"),
        "hidden": (distances_BT.mean(1) * asked_BT.sum(1)).sum(),
    }
    said = [Said(each.logits, True, each.hidden_states) for each in (ours, theirs)]
    for name, value in expected.items():
        weights = LossWeights.model_validate({"kl": 0, name: 1})
        total = Objective(weights, 1.0, "cosine", [(1, 1)]).total(*said, batch)
        assert total.item() == pytest.approx(value.item(), rel=1e-4), name


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The token ids of every batch from now on, by who is trained on it."""
    found: dict[str, list[torch.Tensor]] = {"recover": [], "align": []}
    outputs, step = RecoveryTrainer._outputs, AlignTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any) -> Any:
        found["recover"].append(inputs["input_ids"])
        assert ((inputs["labels"] != IGNORED).sum(1) == 2).all()
        return outputs(self, model, inputs)

    def aligned(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        found["align"].append(inputs["input_ids"])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(RecoveryTrainer, "_outputs", noted)
    monkeypatch.setattr(AlignTrainer, "training_step", aligned)
    return found


def share_hidden(batches: list[torch.Tensor]) -> float:
    return (torch.cat(batches) == MASK).float().mean().item()


@pytest.mark.parametrize("stage", [Distill, Qat])
def test_trained_towards_a_teacher_it_reads_hidden_tokens(
    stage: type[Distill] | type[Qat], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = seen(monkeypatch)
    metrics = stage.model_validate(SHORT).run(context(tmp_path, models))
    assert share_hidden(batches["recover"]) == pytest.approx(0.8 * 2 / LENGTH, rel=0.25)
    assert metrics["result"]["kl_to_teacher"] >= 0


@pytest.mark.parametrize("select", ["kl", "kl-proxy"])
def test_converted_it_reads_hidden_tokens_in_every_training(
    select: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = seen(monkeypatch)
    distill = converting.DISTILL if select == "kl-proxy" else None
    converting.convert(tmp_path, models["teacher"], convert=1, select=select, distill=distill)
    for name in ("recover", "align"):
        assert share_hidden(batches[name]) == pytest.approx(0.8 * 2 / LENGTH, rel=0.3), name


def words(num: int, seed: int) -> np.ndarray[Any, Any]:
    """Texts in which a hidden token follows from any other: each repeats one token."""
    return np.random.default_rng(seed).integers(2, 10, (num, 1)).repeat(LENGTH, 1)


def test_it_learns_what_stands_behind_hidden_tokens_also_after_a_kill(models: dict[str, Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    held_out = masked(models, words(12, seed=1))
    options = TrainingOptions.model_validate({
        **SHORT, "tokens": 60 * 4 * LENGTH, "eval_steps": 30, "learning_rate": 1e-2, "loss": {"kl": 0, "ce": 1},
    })  # fmt: skip

    def taught(work: Path) -> tuple[Any, Any]:
        student = load_model(models["input"])
        return student, recover(
            student, None, masked(models, words(20, seed=0)), held_out, options, (), work, 0, Reporter()
        )

    student, outcome = taught(tmp_path / "whole")
    rows = Blocks(held_out, range(12))
    batch = _batch([rows[i] for i in range(12)])
    asked_BT = batch["labels"] != IGNORED
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"]).logits[asked_BT]
    ce = F.cross_entropy(logits, batch["labels"][asked_BT]).item()
    assert outcome.best["eval_ce"] == pytest.approx(ce, rel=1e-3)
    assert ce < 0.5 * outcome.first["eval_ce"]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoint-60"))
    resumed, _ = taught(tmp_path / "killed")
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), resumed.parameters(), strict=True))
