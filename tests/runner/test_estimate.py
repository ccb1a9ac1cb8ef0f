"""Estimates of time against what SmolLM2-135M took on 2 CPUs of an AMD EPYC, within a factor of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.hardware import Machine
from compress.models.anatomy import shape_of
from compress.pipeline.file import load_pipeline
from compress.pipeline.graph import resolve
from compress.runner.estimate import cost

SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "measured_seconds"),
    [
        ("prune-layers: {drop: 2}", 35), ("quantize: {}", 70), ("export-onnx: {format: fp32}", 9),
        ("evaluate: {tokens: 8192}", 45), ("distill: {tokens: 1024}", 11), ("export-onnx, latency: {}", 121),
    ],
)  # fmt: skip
def test_within_a_factor_of_two(
    stage: str, measured_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.runner.estimate.this_machine", lambda: Machine("EPYC", (), 2, 8.0, "Linux"))
    file = tmp_path / "p.yaml"
    file.write_text(f"name: p\nmodel: org/name\nstages: [{stage}]\n")
    shape = shape_of(SMOLLM2)
    *_, node = resolve(load_pipeline(file), shape).nodes
    read = [4.0 * shape.num_parameters] * len(set(node.inputs.values()))
    assert measured_seconds / 2 < cost(node, shape, 0.0, read).seconds < measured_seconds * 2


@pytest.mark.parametrize("stage", ["distill: {tokens: 4096%s}", "qat: {tokens: 4096%s}"])
def test_text_that_the_teacher_writes_takes_its_time(stage: str, tmp_path: Path) -> None:
    shape, seconds = shape_of(SMOLLM2), []
    for data in ("", ", data: generated"):
        (tmp_path / "p.yaml").write_text(f"name: p\nmodel: org/name\nstages: [{stage % data}]\n")
        *_, node = resolve(load_pipeline(tmp_path / "p.yaml"), shape).nodes
        seconds.append(cost(node, shape, 0.0, [4.0 * shape.num_parameters] * 2).seconds)
    assert 1.2 * seconds[0] < seconds[1] < 2 * seconds[0]


def test_quantising_holds_no_whole_model(tmp_path: Path) -> None:
    """Of Llama 3.2's shape with 1.2B parameters, 4.9 GB in float32: 4.9 GB, half of which is for the token table."""
    llama = {
        **SMOLLM2, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text("name: p\nmodel: org/name\nstages: [quantize: {method: rtn}]\n")
    shape = shape_of(llama)
    *_, node = resolve(load_pipeline(tmp_path / "p.yaml"), shape).nodes
    estimated_gb = cost(node, shape, 0.0, [4.0 * shape.num_parameters]).ram_mb / 1e3
    assert 0.8 < estimated_gb / 4.88 < 1.25
