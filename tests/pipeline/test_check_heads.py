"""What `check` and `init` know of a model's head: stages and figures that it has none of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.models.anatomy import shape_of
from compress.pipeline.check import check_file
from compress.pipeline.matrix import sample_shape
from compress.pipeline.starter import starter
from compress.report.tables import _label, _order
from pico import make_pico

ONE = {"architecture": "BertForSequenceClassification", "num_labels": 1}
MULTI = {**ONE, "num_labels": 5, "problem_type": "multi_label_classification"}


def problems(model: Path, stages: str, require: str = "{}") -> str:
    file = model.parent / "pipeline.yaml"
    file.write_text(f"name: x\nmodel: {model}\nstages: {stages}\nrequire: {require}\n", "utf-8")
    return " | ".join(map(str, check_file(file).problems))


@pytest.mark.parametrize(("head", "words"), [(ONE, "a head of one number"), (MULTI, "a multi-label head")])
def test_what_no_softmax_judges_is_only_exported_and_timed(
    head: dict[str, object], words: str, tmp_path: Path
) -> None:
    model = make_pico("bert", tmp_path / "model", **head)
    for stage in ("evaluate", "distill", "qat", "choose-format", "prune-layers: {keep: 3, by: leave-one-out}",
                  "convert-attention: {to: linear, convert: 2, distill: null}"):  # fmt: skip
        assert words in problems(model, f"[{stage}]"), stage
    hidden = "loss: {kl: 0, hidden: 1}, sequence_length: 64"
    for stage in ("export-onnx: {format: int8}", f"distill: {{{hidden}}}", "prune-layers: {keep: 3}"):
        assert problems(model, f"[{stage}]") == "", stage


@pytest.mark.parametrize(
    ("model_type", "options", "figure"),
    [
        ("bert", {}, "perplexity"),
        ("bert", {}, "kl"),
        ("bert", {}, "tpot_ms@64"),
        ("bert", {"architecture": "BertForMaskedLM"}, "bits_per_byte"),
        ("bert", {"architecture": "BertForSequenceClassification"}, "perplexity"),
        ("bert", {"architecture": "BertForTokenClassification"}, "cosine"),
        ("llama", {}, "cosine"),
        ("llama", {}, "latency_ms@64"),
    ],
)
def test_a_requirement_on_a_figure_that_its_kind_lacks_is_no_valid_one(
    model_type: str, options: dict[str, str], figure: str, tmp_path: Path
) -> None:
    model = make_pico(model_type, tmp_path / "model", num_hidden_layers=1, **options)
    stages = "[export-onnx, evaluate, {latency: {prompts: [64], new_tokens: 8}}]"
    found = problems(model, stages, f'{{{figure}: "<= 1"}}')
    assert f"has no {figure}; it has " in found
    named = "cosine" if "cosine" in found.partition("it has ")[2] else "kl"
    assert problems(model, stages, f'{{{named}: "<= 1"}}') == ""


@pytest.mark.parametrize(
    "architecture",
    ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"],
)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_starter_fits_every_head(architecture: str, num_labels: int, tmp_path: Path) -> None:
    model = make_pico("bert", tmp_path / "model", architecture=architecture, num_labels=num_labels)
    import json

    shape = shape_of(json.loads((model / "config.json").read_text()))
    file = tmp_path / "pipeline.yaml"
    file.write_text(starter(str(model), "pipeline.yaml", shape), "utf-8")
    assert [str(problem) for problem in check_file(file).problems] == []


def test_figures_of_encoders_are_shown(pico: Callable[[str], Path]) -> None:
    assert _label("cosine") == "cosine to the source"
    assert _label("latency_ms@64") == "whole forward pass, of 64 (ms)"
    assert None not in (_order("cosine"), _order("latency_ms@64,batch=4"))
    assert sample_shape("bert").unjudged == ""


def test_a_masked_language_model_without_a_mask_token_is_not_trained(tmp_path: Path) -> None:
    model = make_pico("bert", tmp_path / "model", architecture="BertForMaskedLM")
    trainings = (
        "distill: {loss: {ce: 1}, sequence_length: 64}", "qat: {sequence_length: 64}",
        "convert-attention: {to: linear, align: {sequence_length: 64}, distill: {sequence_length: 64}}",
    )  # fmt: skip
    for stage in trainings:
        assert problems(model, f"[{stage}]") == "", stage
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask_token": None}))
    for stage in trainings:
        found = problems(model, f"[{stage}]")
        assert "the model's tokenizer has no mask token" in found, stage
        assert "name it as mask_token in tokenizer_config.json" in found
    assert problems(model, "[quantize, export-onnx]") == ""
