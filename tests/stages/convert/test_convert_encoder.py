"""`convert-attention` on encoders: what it takes, what it measures where there are no logits, what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.artifact import Artifact, Metrics
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.stage import StageContext, Target
from compress.stages.convert.stage import ConvertAttention
from pico import VOCAB_SIZE, make_pico

LENGTH = 16
TRAINING: dict[str, Any] = {"tokens": 128, "sequence_length": LENGTH, "batch_size": 2, "precision": "fp32"}
OPTIONS: dict[str, Any] = {
    "to": "linear", "keep": 2, "select_tokens": 64, "align": {**TRAINING, "tokens": 512},
    "distill": {**TRAINING, "eval_tokens": 64},
}  # fmt: skip


class RandomTokens:
    """Stands for a pipeline's text."""

    def blocks(self, split: str, tokenizer: Any, sequence_length: int, max_tokens: int | None = None) -> Any:
        random = np.random.default_rng(len(split))
        return random.integers(1, VOCAB_SIZE, ((max_tokens or 1024) // sequence_length, sequence_length))


def convert(folder: Path, architecture: str = "BertModel", **options: Any) -> Metrics:
    """Convert a pico of three layers; source and result are in `folder`."""
    torch.set_num_threads(1)
    source = make_pico("bert", folder / "source", num_hidden_layers=3, architecture=architecture)
    for name in ("out", "work"):
        (folder / name).mkdir()
    inputs = dict.fromkeys(("input", "teacher"), Artifact(source, "torch", "source", "key"))
    data: Any = RandomTokens()
    stage = ConvertAttention.model_validate({**OPTIONS, **options})
    return stage.run(StageContext(folder / "out", folder / "work", inputs, data, 0, Target(threads=1)))


@pytest.mark.parametrize(
    ("architecture", "measure"), [("BertModel", "1 − cos"), ("BertForMaskedLM", "KL to the teacher")]
)
def test_the_layer_that_moves_the_output_least_is_converted(tmp_path: Path, architecture: str, measure: str) -> None:
    figures = convert(tmp_path, architecture)["result"]
    chosen = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores = {int(layer): score for layer, score in chosen["scores"].items()}
    assert chosen["measure"].startswith(measure)
    assert chosen["converted"] == [min(scores, key=scores.__getitem__)]
    model: Any = load_model(tmp_path / "out")
    assert type(model).__name__ == f"Hybrid{architecture}"
    assert [spec is not None for spec in model.config.mixers] == [layer in chosen["converted"] for layer in range(3)]
    assert figures["num_softmax_layers"] == 2
    assert figures["state_mb"] == figures["kv_cache_mb@4096"] == 0
    assert ("kl_to_teacher" in figures) == (architecture == "BertForMaskedLM")


def test_alignment_brings_the_embeddings_nearer(tmp_path: Path) -> None:
    ids_BT = torch.arange(4 * 12).reshape(4, 12) + 100
    cosines = []
    for name, align in (("none", None), ("aligned", {**TRAINING, "tokens": 4096, "learning_rate": 1e-2})):
        (tmp_path / name).mkdir()
        convert(tmp_path / name, keep=0, select_tokens=512, align=align, distill=None)
        states = [
            load_model(tmp_path / name / folder)(ids_BT).last_hidden_state.detach() for folder in ("source", "out")
        ]
        cosines.append(torch.nn.functional.cosine_similarity(*states, dim=-1).mean().item())
    assert cosines[1] > cosines[0] + 0.02


@pytest.mark.parametrize("features", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}])
def test_attention_that_cannot_be_carried_over_is_refused_by_name(features: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 8}
    stage = ConvertAttention.model_validate({"to": "linear"})
    problems = list(stage.check(shape_of({"model_type": "bert", **sizes, **features})))
    assert next(iter(features)) in problems[0].what


@pytest.mark.parametrize("to", ["gated-linear", "mamba2", "gated-delta", "sliding"])
def test_what_reads_in_one_direction_is_refused_by_name(tmp_path: Path, to: str) -> None:
    source = make_pico("bert", tmp_path, num_hidden_layers=3)
    stage = ConvertAttention.model_validate({"to": to, "keep": 1})
    problems = list(stage.check(shape_of(json.loads((source / "config.json").read_text()))))
    assert [problem.where for problem in problems] == ["to"]
    assert "bert" in problems[0].what
    assert to in problems[0].what
    assert "linear" in problems[0].fix
