"""bfloat16: where it is used, that both models compute in it, and that a killed training still ends the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from pico_training import BASE, blocks, train

from compress import hardware
from compress.hardware import Machine
from compress.models.load import load_model
from compress.stage import Reporter
from compress.train import trainer
from compress.train.engine import recover
from compress.train.options import TrainingOptions
from compress.train.precision import uses_bf16
from pico import make_pico


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher."""
    folder = tmp_path_factory.mktemp("models")
    return make_pico("llama", folder / "student", seed=1), make_pico("llama", folder / "teacher")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides")
@pytest.mark.parametrize(("flag", "has"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)])
def test_auto_is_what_the_processor_multiplies_in(flag: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "this_machine", lambda: Machine("cpu", (flag, "fma"), 2, 8.0, "Linux"))
    assert uses_bf16("auto") is has
    assert uses_bf16("bf16") is True
    assert uses_bf16("fp32") is False


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_student_and_teacher_compute_in_it(
    precision: str, dtype: torch.dtype, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    linear = torch.nn.Linear.forward

    def spy(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = linear(self, x)
        seen.append((self.weight.requires_grad, y.dtype))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    weights, outcome = train(*models, tmp_path, precision=precision)
    assert set(seen) == {(True, dtype), (False, dtype)}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert outcome.best["eval_kl"] < outcome.first["eval_kl"]


def test_stopped_in_bfloat16_it_ends_with_the_same_weights(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(*models, tmp_path / "whole", precision="bf16")
    total, calls = trainer.Objective.total, []

    def interrupted(*args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
        return total(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Objective, "total", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(*models, tmp_path / "cut", precision="bf16")
    resumed, _ = train(*models, tmp_path / "cut", precision="bf16")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_model_that_was_trained_before_is_trained_as_any_other(
    precision: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    options = TrainingOptions.model_validate({**BASE, "precision": precision})
    torch.set_num_threads(1)
    again, teacher = load_model(models[0]), load_model(models[1])

    def trained(model: Any, work: str) -> list[float]:
        data = blocks(20), blocks(6, seed=1)
        outcome = recover(model, teacher, *data, options, [(1, 1), (4, 4)], tmp_path / work, 0, Reporter())
        return [entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry]

    trained(again, "first")
    fresh = load_model(models[0])
    fresh.load_state_dict(again.state_dict())
    assert trained(again, "again") == trained(fresh, "fresh")
    assert all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in again.state_dict().items())
