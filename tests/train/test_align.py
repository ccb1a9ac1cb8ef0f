"""Alignment on a pico model: its losses are those of each layer alone, all of them fall, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.mixers.spec import SPECS
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.stages.convert.init import new_mixers
from compress.train.align import Aligned, align
from compress.train.options import AlignOptions

LENGTH = 16
BLOCKS = np.random.default_rng(0).integers(1, 500, (4, LENGTH))
LAYERS = [0, 2, 3]


def aligned(source: Path, work: Path, **options: Any) -> tuple[nn.Module, dict[int, nn.Module], Aligned]:
    """Teacher, mixers and outcome of an alignment of six steps on the same four blocks."""
    torch.set_num_threads(1)
    teacher = load_model(source)
    mixers = new_mixers(teacher, LAYERS, SPECS["linear"])
    asked = {"tokens": 6 * 4 * LENGTH, "batch_size": 4, "sequence_length": LENGTH, "precision": "fp32"}
    return teacher, mixers, align(mixers, teacher, BLOCKS, AlignOptions(**{**asked, **options}), work, 0, Reporter())


def errors(teacher: nn.Module, mixers: dict[int, nn.Module]) -> dict[int, float]:
    """Each mixer's error, computed the long way: the model is run, then each mixer on what was noted down."""
    parts, noted = Parts(teacher), {}
    for index in mixers:
        attention = parts.attention(parts.layers[index])
        attention.register_forward_hook(
            lambda _, __, kwargs, output, index=index: noted.update({index: (kwargs, output[0])}), with_kwargs=True
        )
    with torch.no_grad():
        parts.backbone(torch.from_numpy(BLOCKS), use_cache=False)
        mixed = {index: mixers[index](**kwargs)[0] for index, (kwargs, _) in noted.items()}
    return {i: ((mixed[i] - y).norm() ** 2 / y.norm() ** 2).item() for i, (_, y) in noted.items()}


def test_every_layer_learns_what_its_attention_says(pico: Callable[[str], Path], tmp_path: Path) -> None:
    teacher, mixers, outcome = aligned(pico("llama"), tmp_path)
    before = errors(load_model(pico("llama")), new_mixers(load_model(pico("llama")), LAYERS, SPECS["linear"]))
    after = errors(teacher, mixers)
    for index in LAYERS:
        assert outcome.log[0][f"loss_{index}"] == pytest.approx(before[index], rel=1e-4)
        assert after[index] < 0.9 * before[index]
    assert outcome.num_tokens == 6 * 4 * LENGTH
    assert outcome.losses == {index: outcome.log[-1][f"loss_{index}"] for index in LAYERS}
    assert outcome.log[0]["loss"] == pytest.approx(np.mean(list(before.values())), rel=1e-4)
    for name, weight in load_model(pico("llama")).state_dict().items():
        assert torch.equal(teacher.state_dict()[name], weight), name


def test_layers_do_not_depend_on_each_other(pico: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = load_model(pico("llama"))
    alone = new_mixers(teacher, [2], SPECS["linear"])
    options = {"tokens": 6 * 4 * LENGTH, "batch_size": 4, "sequence_length": LENGTH, "precision": "fp32"}
    align(alone, teacher, BLOCKS, AlignOptions(**options), tmp_path / "alone", 0, Reporter())
    _, together, _ = aligned(pico("llama"), tmp_path / "together")
    for one, other in zip(alone[2].parameters(), together[2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_projections_have_a_tenth_of_the_learning_rate(pico: Callable[[str], Path], tmp_path: Path) -> None:
    start = new_mixers(load_model(pico("llama")), LAYERS, SPECS["linear"])
    _, mixers, _ = aligned(pico("llama"), tmp_path, tokens=1, warmup_ratio=0, lr_scheduler_type="constant_with_warmup")
    for index in LAYERS:
        now = mixers[index].state_dict()
        for name, weight in start[index].state_dict().items():
            step = (now[name] - weight).abs().max().item()  # AdamW's first step is the learning rate
            assert step == pytest.approx(3e-4 if "_proj" in name else 3e-3, rel=0.02), name


def test_in_bfloat16_it_learns_too(pico: Callable[[str], Path], tmp_path: Path) -> None:
    teacher, mixers, outcome = aligned(pico("llama"), tmp_path, precision="bf16")
    before = errors(load_model(pico("llama")), new_mixers(load_model(pico("llama")), LAYERS, SPECS["linear"]))
    after = errors(teacher, mixers)
    assert all(after[index] < 0.95 * before[index] for index in LAYERS)
    assert all(parameter.dtype == torch.float32 for mixer in mixers.values() for parameter in mixer.parameters())
    assert outcome.log[0]["loss"] != pytest.approx(np.mean(list(before.values())), rel=1e-7)
