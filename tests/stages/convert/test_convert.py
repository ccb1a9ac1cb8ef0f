"""`convert-attention` on pico models: what it makes, that it reloads, goes on where it was killed, and learns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from converting import BASE, DISTILL, LENGTH, RandomTokens, context, convert
from safetensors.torch import load_file

from compress.errors import StageFailed
from compress.models.load import load_model
from compress.stage import Reporter
from compress.stages.convert import conversion
from compress.stages.convert.stage import ConvertAttention
from pico import make_pico

Pico = Callable[[str], Path]
IDS = torch.arange(1, 61).reshape(2, 30)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


def config_of(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("to", "window"),
    [("linear", 0), ("linear", 4), ("gated-linear", 0), ("gated-linear", 4), ("mamba2", None),
     ("gated-delta", None), ("sliding", 4)],
)  # fmt: skip
def test_what_is_written_reloads_as_what_was_made(
    to: str, window: int | None, model_type: str, pico: Pico, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**BASE, "to": to, "convert": [1, 3], "window": window}
    figures = convert(tmp_path, pico(model_type), **options)["result"]
    stage = ConvertAttention.model_validate(options)
    again = conversion.convert(conversion.prepare(stage, context(tmp_path, pico(model_type))), Reporter())
    reloaded = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(again.model), rtol=0, atol=0)
    assert (logits(reloaded) - logits(load_model(pico(model_type)))).abs().max() > 1e-2
    config = config_of(tmp_path / "out")
    assert [mixer and mixer["type"] for mixer in config["mixers"]] == [None, to if to != "sliding" else None] * 2
    assert all(mixer["window"] == (window or 0) for mixer in config["mixers"] if mixer)
    assert config["layer_types"][::2] == ["full_attention"] * 2
    assert set(config["layer_types"][1::2]) == {"sliding_attention" if to == "sliding" else "linear_attention"}
    assert figures["num_softmax_layers"] == 2
    assert (figures["state_mb"] > 0) == (to != "sliding")
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_memory_is_stated(pico: Pico, tmp_path: Path) -> None:
    metrics = convert(tmp_path, pico("llama"), to="mamba2", keep=1, align=None, select="uniform")
    groups, size, heads = 2, 16, 4
    state = groups * 2 * size * (size + 1) + (heads + 2 * groups) * size * 3
    assert metrics["result"]["state_mb"] == pytest.approx(3 * 4 * state / 1e6)
    assert metrics["input"]["kv_cache_mb@4096"] == pytest.approx(4 * 2 * groups * size * 4 * 4096 / 1e6)
    assert metrics["result"]["kv_cache_mb@4096"] == pytest.approx(metrics["input"]["kv_cache_mb@4096"] / 4)
    assert metrics["result"]["train_tokens"] == 0


def test_a_window_takes_memory_and_loses_less(pico: Pico, tmp_path: Path) -> None:
    options = {"to": "gated-linear", "convert": [1, 3]}
    plain = convert(tmp_path / "plain", pico("llama"), window=0, **options)["result"]
    windowed = convert(tmp_path / "window", pico("llama"), window=8, **options)["result"]
    assert windowed["state_mb"] - plain["state_mb"] == pytest.approx(2 * 4 * 8 * 2 * (16 + 17) / 1e6)
    assert windowed["aligned_loss"] < 0.7 * plain["aligned_loss"]


def test_the_second_step_starts_where_the_first_one_ended(tmp_path: Path, pico: Pico) -> None:
    convert(tmp_path / "one", pico("llama"), keep=1, window=0, distill=DISTILL)
    first = tmp_path / "one" / "out"
    convert(tmp_path / "two", first, pico("llama"), to="mamba2", align=None)
    second = tmp_path / "two" / "out"
    torch.testing.assert_close(logits(load_model(second)), logits(load_model(first)), rtol=0, atol=1e-4)
    before, after = config_of(first), config_of(second)
    assert before["layer_types"] == after["layer_types"]
    assert [mixer and mixer["type"] for mixer in after["mixers"]].count("mamba2") == 3
    figures = convert(tmp_path / "three", first, pico("llama"), to="mamba2", keep=1, distill=DISTILL)["result"]
    assert figures["num_softmax_layers"] == 1
    assert 0 < figures["aligned_loss"] < 1


def test_end_to_end_training_brings_it_nearer_to_its_teacher(pico: Pico, tmp_path: Path) -> None:
    figures = convert(tmp_path, pico("llama"), convert=3, distill=DISTILL)["result"]
    assert figures["kl_to_teacher"] < figures["aligned_kl_to_teacher"]
    assert figures["train_tokens"] == 2 * 8 * 2 * LENGTH
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"scores.json", "scores.png", "alignment.json", "alignment.png", "history.json", "loss.png"} <= names
    assert all(parameter.requires_grad for parameter in load_model(tmp_path / "out").parameters())


def test_alignment_and_weights_from_the_attention_help(pico: Pico, tmp_path: Path) -> None:
    def kl(name: str, **options: Any) -> float:
        distill = {**DISTILL, "tokens": 1}
        return convert(tmp_path / name, pico("llama"), distill=distill, **options)["result"]["aligned_kl_to_teacher"]

    aligned, alone, random = kl("aligned"), kl("alone", align=None), kl("random", init="random", align=None)
    assert aligned < alone < random


@pytest.mark.parametrize("mode", ["align", "distill"])
def test_killed_it_ends_with_the_same_weights(mode: str, pico: Pico, tmp_path: Path) -> None:
    options = {**BASE, "keep": 2, "distill": DISTILL}
    convert(tmp_path / "whole", pico("llama"), **options)
    script = Path(__file__).with_name("converting.py")
    command = [sys.executable, str(script), mode, str(tmp_path / "cut"), str(pico("llama")), json.dumps(options)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "cut" / "work" / mode / "checkpoint-4" / "trainer_state.json").exists()
    convert(tmp_path / "cut", pico("llama"), **options)
    whole, cut = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_two_processes_make_what_one_makes(pico: Pico, tmp_path: Path) -> None:
    options = {**BASE, "keep": 2, "distill": DISTILL}
    convert(tmp_path / "one", pico("llama"), **options)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(Path(__file__).with_name("converting.py")), "", str(tmp_path / "two"), str(pico("llama")),
        json.dumps(options),
    ]  # fmt: skip
    launched = subprocess.run(command, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr
    one, two = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3


def test_what_is_aligned_on_is_not_judged_on(pico: Pico, tmp_path: Path) -> None:
    stage = ConvertAttention.model_validate({**BASE, "keep": 2})
    job = conversion.prepare(stage, context(tmp_path, pico("llama")))
    assert (job.align_NT.shape, job.held_NT.shape) == ((16, LENGTH), (4, LENGTH))
    assert not {tuple(row) for row in job.align_NT} & {tuple(row) for row in job.held_NT}


def test_a_teacher_of_other_layers_can_not_align_what_has_no_softmax(pico: Pico, tmp_path: Path) -> None:
    convert(tmp_path / "one", pico("llama"), keep=1, window=0, align=None, select="uniform")
    other = make_pico("llama", tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(StageFailed, match=r"teacher: its layers are not those of the model.*align: null"):
        convert(tmp_path / "two", tmp_path / "one" / "out", other, to="mamba2")


def test_what_check_could_not_know_is_refused_when_it_runs(pico: Pico, tmp_path: Path) -> None:
    convert(tmp_path / "one", pico("llama"), convert=[1], align=None)
    with pytest.raises(StageFailed, match=r"convert: layer 1 has linear, and linear is made from full_attention"):
        convert(tmp_path / "two", tmp_path / "one" / "out", pico("llama"), convert=[1])


def test_one_block_of_text_is_too_little(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = RandomTokens.blocks
    monkeypatch.setattr(RandomTokens, "blocks", lambda self, *args: blocks(self, *args)[:1])
    with pytest.raises(StageFailed, match=r"data.train: .*another is needed to judge on; add text"):
        convert(tmp_path, pico("llama"), keep=2)


def test_the_input_is_left_as_it_was(pico: Pico, tmp_path: Path) -> None:
    source = load_model(pico("llama"))
    before = logits(source)
    from compress.stages.convert.init import new_mixers, windowed, with_mixers

    mixers = new_mixers(source, [0, 2], None, 4)
    with windowed(mixers, 4):
        with_mixers(source, mixers, [0], None, 4)
    torch.testing.assert_close(logits(source), before, rtol=0, atol=0)
