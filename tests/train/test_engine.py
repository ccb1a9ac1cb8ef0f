"""The recovery engine on pico models: it learns, is exact under accumulation, survives kills, stops when it must."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from pico_training import LENGTH, STEPS, blocks, train

from compress.errors import StageFailed, is_full_disk
from compress.models.load import load_model
from compress.train.callbacks import LossWatch
from compress.train.checkpoints import is_complete, newest_complete
from compress.train.engine import training_order
from compress.train.resumable import ResumableTrainer
from pico import make_pico


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher."""
    folder = tmp_path_factory.mktemp("models")
    return make_pico("llama", folder / "student", seed=1), make_pico("llama", folder / "teacher")


@pytest.fixture(scope="module")
def reference(models, tmp_path_factory):
    """(weights, outcome, work) of a training that nothing disturbed."""
    work = tmp_path_factory.mktemp("reference")
    return (*train(*models, work), work)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_it_lowers_the_loss_and_keeps_the_best(reference):
    _, outcome, work = reference
    assert outcome.num_tokens == STEPS * 4 * LENGTH
    assert outcome.best["eval_kl"] < outcome.first["eval_kl"]
    assert outcome.best["eval_loss"] == min(entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry)
    assert outcome.best["eval_kl"] == pytest.approx(outcome.best["eval_loss"])
    assert len(list(work.glob("checkpoint-*"))) == 2
    assert next(entry["learning_rate"] for entry in outcome.log if "loss" in entry) > 0


def test_what_is_returned_is_the_best_not_the_last(models, tmp_path):
    jumpy = {"learning_rate": 0.2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant_with_warmup"}
    weights, outcome = train(*models, tmp_path, **jumpy)
    losses = {entry["step"]: entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry}
    assert outcome.best_step == min(losses, key=losses.__getitem__)
    assert 0 < outcome.best_step < STEPS
    from safetensors.torch import load_file

    saved = load_file(tmp_path / f"checkpoint-{outcome.best_step}" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def test_a_training_that_made_it_worse_leaves_the_input_as_it_was(models, tmp_path, caplog):
    for _ in range(2):  # the second time nothing is trained: the last checkpoint is the end
        weights, outcome = train(*models, tmp_path, learning_rate=0.9, warmup_ratio=0.0)
        assert outcome.best_step == 0
        assert outcome.best == outcome.first
        assert distance(weights, dict(load_model(models[0]).state_dict())) == 0.0
    assert [record.levelname for record in caplog.records if "did not help" in record.message] == ["WARNING"] * 2


def test_accumulation_changes_nothing(models, reference, tmp_path):
    weights, outcome = train(*models, tmp_path, gradient_accumulation_steps=4)
    assert distance(weights, reference[0]) < 1e-5
    assert outcome.best["eval_loss"] == pytest.approx(reference[1].best["eval_loss"], abs=1e-5)


def test_killed_twice_it_ends_with_the_same_weights(models, reference, tmp_path):
    for mode, left in (("between", {"checkpoint-4"}), ("within", {"checkpoint-4"})):
        script = Path(__file__).with_name("pico_training.py")
        command = [sys.executable, str(script), mode, *map(str, models), str(tmp_path)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        complete = {folder.name for folder in tmp_path.glob("checkpoint-*") if is_complete(folder)}
        assert left <= complete <= {"checkpoint-2", "checkpoint-4"}
        assert (tmp_path / "checkpoint-6").exists()
    weights, outcome = train(*models, tmp_path)
    assert distance(weights, reference[0]) == 0.0
    for name in ("eval_loss", "eval_kl_se", "eval_ce", "eval_top1_agreement", "step"):
        assert outcome.best[name] == reference[1].best[name]


def test_killed_after_the_last_checkpoint_it_does_not_train_again(models, reference, tmp_path):
    shutil.copytree(reference[2], tmp_path / "moved")
    weights, outcome = train(*models, tmp_path / "moved", learning_rate=1.0)
    assert distance(weights, reference[0]) == 0.0
    assert outcome.log == reference[1].log[: len(outcome.log)]


def cut_off(reference_work: Path, work: Path) -> Path:
    """A copy of a training that was killed before its last checkpoint; the checkpoint that is left."""
    shutil.copytree(reference_work, work)
    left, last = sorted(work.glob("checkpoint-*"))
    shutil.rmtree(last)
    return left


def written_by_two(checkpoint: Path) -> None:
    """Make it a checkpoint of a launch of two processes."""
    state = (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copyfile(state, checkpoint / "rng_state_1.pth")


def test_what_lacks_a_whole_state_is_removed(models, reference, tmp_path):
    left = cut_off(reference[2], tmp_path / "work")
    for step, size in ((90, 0), (91, 100)):
        shutil.copytree(left, left.with_name(f"checkpoint-{step}"))
        os.truncate(left.with_name(f"checkpoint-{step}") / "trainer_state.json", size)
    weights, _ = train(*models, tmp_path / "work")
    assert distance(weights, reference[0]) == 0.0
    assert {path.name for path in (tmp_path / "work").glob("*checkpoint*")} == {left.name, f"checkpoint-{STEPS}"}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_and_kept(models, reference, tmp_path, caplog, name):
    work = tmp_path / "work"
    shutil.copytree(reference[2], work)
    last = work / f"checkpoint-{STEPS}"
    whole = (last / name).read_bytes()
    (last / name).write_bytes(whole[:-20])
    assert not is_complete(last)
    weights, outcome = train(*models, work)
    assert distance(weights, reference[0]) == 0.0
    assert outcome.best_step == reference[1].best_step
    assert (work / f"damaged-1-{last.name}" / name).read_bytes() == whole[:-20]
    assert is_complete(last)
    assert "is damaged: passed over, and kept as" in caplog.text


def test_a_flipped_bit_is_damage(reference, tmp_path):
    left = cut_off(reference[2], tmp_path / "work")
    whole = bytearray((left / "optimizer.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (left / "optimizer.pt").write_bytes(whole)
    assert newest_complete(tmp_path / "work") is None


def test_checkpoints_of_another_number_of_processes_are_gone_on_from(models, reference, tmp_path, caplog):
    left = cut_off(reference[2], tmp_path / "work")
    written_by_two(left)
    before = (left / "optimizer.pt").stat()
    weights, _ = train(*models, tmp_path / "work")
    after = (left / "optimizer.pt").stat()
    assert distance(weights, reference[0]) == 0.0, "no dropout, so that the random state does not count"
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "trained again"
    assert f"{left.name} has no random state for 1 process (another number of them wrote it" in caplog.text


def test_a_training_that_another_number_of_processes_finished_is_finished(models, reference, tmp_path):
    shutil.copytree(reference[2], tmp_path / "work")
    for checkpoint in (tmp_path / "work").glob("checkpoint-*"):
        written_by_two(checkpoint)
    weights, outcome = train(*models, tmp_path / "work", learning_rate=1.0)
    assert distance(weights, reference[0]) == 0.0
    assert outcome.log == reference[1].log[: len(outcome.log)]


def test_random_states_that_are_damaged_are_done_without(models, reference, tmp_path, caplog):
    left = cut_off(reference[2], tmp_path / "work")
    os.truncate(left / "rng_state.pth", 100)
    weights, _ = train(*models, tmp_path / "work")
    assert distance(weights, reference[0]) == 0.0
    assert "no random state" in caplog.text


def test_the_best_survives_a_resume_from_elsewhere_and_clocks_that_disagree(models, tmp_path, monkeypatch):
    jumpy = {"learning_rate": 0.2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant_with_warmup", "eval_steps": 1}
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    weights, outcome = train(*models, Path("work"), **jumpy)
    best, last = f"checkpoint-{outcome.best_step}", f"checkpoint-{STEPS}"
    assert 0 < outcome.best_step < STEPS
    assert {path.name for path in Path("work").glob("checkpoint-*")} == {best, last}
    monkeypatch.chdir(tmp_path / "there")
    shutil.copytree("../here/work", "work", ignore=shutil.ignore_patterns(last))
    shutil.rmtree(tmp_path / "here")
    other = Path("work") / "checkpoint-0"
    shutil.copytree(Path("work") / best, other)
    os.utime(other, (2**32, 2**32))  # written by a machine whose clock is ahead
    again, told = train(*models, Path("../there/work"), **jumpy)
    assert told.best_step == outcome.best_step
    assert distance(again, weights) == 0.0
    assert {path.name for path in Path("work").glob("checkpoint-*")} == {best, last}


def test_a_full_disk_is_known_and_nothing_is_lost(models, reference, tmp_path, monkeypatch):
    save = ResumableTrainer._save

    def save_on_a_full_disk(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        if output_dir.endswith("checkpoint-4"):
            os.symlink("/dev/full", Path(output_dir, "optimizer.pt"))

    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "_save", save_on_a_full_disk)
        with pytest.raises(RuntimeError) as failure:
            train(*models, tmp_path)
    assert is_full_disk(failure.value)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"
    weights, _ = train(*models, tmp_path)
    assert distance(weights, reference[0]) == 0.0


def test_a_disk_too_full_for_events_is_said_once(models, tmp_path, monkeypatch, capfd):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", write)
    hooked = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: hooked.append(failure.exc_value))
    with pytest.raises(OSError, match="No space left") as failure:
        train(*models, tmp_path)
    assert is_full_disk(failure.value)
    assert hooked == []


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_checkpoint(models, tmp_path, monkeypatch):
    from compress.train import trainer

    original, calls = trainer.Objective.total, []

    def poisoned(self, student, teacher, labels_BT):
        if torch.is_grad_enabled():
            calls.append(1)
        total = original(self, student, teacher, labels_BT)
        return total * float("nan") if len(calls) == 4 else total

    monkeypatch.setattr(trainer.Objective, "total", poisoned)
    with pytest.raises(StageFailed, match=r"step 4 of 8: training diverged: loss is nan.*checkpoint-2"):
        train(*models, tmp_path)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_the_watch_knows_divergence_from_noise():
    noise = [0.9 + 0.5 * (i % 3) for i in range(60)]
    assert not any(map(LossWatch().diverges, noise))
    assert not any(map(LossWatch().diverges, [1e-6] * 20 + [1e-3] * 20))
    watch = LossWatch(noise)
    assert not watch.diverges(50.0)
    assert any(watch.diverges(50.0) for _ in range(8))
    assert LossWatch().diverges(float("inf"))


def test_early_stopping(models, tmp_path):
    _, outcome = train(*models, tmp_path, learning_rate=0.3, warmup_ratio=0, early_stopping_patience=1, eval_steps=1)
    evaluated = [entry["eval_loss"] for entry in outcome.log if "eval_loss" in entry]
    assert len(evaluated) < STEPS + 1
    assert evaluated[-1] > min(evaluated[:-1])


@pytest.mark.parametrize(
    "loss",
    [{"kl": 0, "ce": 1}, {"kl": 0, "skew_kl": 1}, {"kl": 0, "hidden": 1}, {"kl": 1, "ce": 0.5, "hidden": 0.5}],
    ids=str,
)
def test_every_loss_goes_down(models, tmp_path, loss):
    student, teacher = models
    _, outcome = train(student, teacher if loss != {"kl": 0, "ce": 1} else None, tmp_path, loss=loss, eval_steps=8)
    assert outcome.best["eval_loss"] < outcome.first["eval_loss"]


def test_eight_bit_adamw_and_gradient_checkpointing(models, reference, tmp_path):
    _, outcome = train(*models, tmp_path, optim="adamw_8bit", gradient_checkpointing=True)
    assert outcome.best["eval_kl"] == pytest.approx(reference[1].best["eval_kl"], rel=0.02)


def test_the_order_is_shuffled_passes():
    order = training_order(5, 12, seed=0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order == training_order(5, 12, seed=0)
    assert len(blocks(3)) == 3
