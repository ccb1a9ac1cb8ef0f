"""`reduce-vocab` in a pipeline: what `check` says of requirements and of the format chosen after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Artifact
from compress.errors import StageFailed
from compress.pipeline.check import check_file
from compress.stages.choose.stage import QUALITY, ChooseFormat

Pico = Callable[[str], Path]
PIPELINE = """
name: vocabulary
model: {model}
stages:
  - reduce-vocab: {{{options}}}
  - evaluate: {{id: beside-source, sequence_length: 64}}
  - export-onnx: {{format: fp32}}
  - evaluate: {{sequence_length: 64, against: {against}}}
require:
  {need}
"""


def problems(tmp_path: Path, model: Path, need: str, against: str = "source", options: str = "keep: 400") -> list[str]:
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(model=model, need=need, against=against, options=options))
    return [str(problem) for problem in check_file(file).problems]


@pytest.mark.parametrize("options", ["keep: 400", "coverage: 0.9"])
@pytest.mark.parametrize(
    "need", ['perplexity: "<= 2x source"', 'perplexity_ratio: "<= 2"', 'kl: "<= 1"', 'top1_agreement: ">= 0.5"']
)
def test_requirements_of_figures_of_tokens_are_refused(need: str, options: str, tmp_path: Path, pico: Pico) -> None:
    [problem] = problems(tmp_path, pico("llama"), need, options=options)
    assert f"require.{need.partition(':')[0]}: " in problem
    assert "different vocabularies; give bits_per_byte" in problem


@pytest.mark.parametrize("need", ['bits_per_byte: "<= 2x source"', 'bits_per_byte_ratio: "<= 1.1"'])
def test_bits_per_byte_can_be_required(need: str, tmp_path: Path, pico: Pico) -> None:
    assert problems(tmp_path, pico("llama"), need) == []


def test_figures_of_tokens_are_compared_between_models_of_one_vocabulary(tmp_path: Path, pico: Pico) -> None:
    assert problems(tmp_path, pico("llama"), 'perplexity: "<= 2x reduce-vocab"', "reduce-vocab") == []
    assert problems(tmp_path, pico("llama"), 'kl: "<= 1"', "reduce-vocab") == []


def test_as_many_tokens_as_there_are_is_refused_at_once(tmp_path: Path, pico: Pico) -> None:
    [problem] = problems(tmp_path, pico("llama"), 'size_mb: "<= 1"', options="keep: 512")
    assert "keep: 512 of 512 tokens leaves none out" in problem


def test_a_format_is_not_chosen_by_figures_that_there_are_not() -> None:
    stage = ChooseFormat.model_validate({"schemes": ["fp32"]})
    figures = {"result": {"bits_per_byte": 1.0, "bits_per_byte_ratio": 1.1}, "source": {"bits_per_byte": 0.9}}
    artifacts = {name: Artifact(Path(), "measurement", "", "", metrics=figures) for name in ("fp32", f"fp32{QUALITY}")}
    context: Any = type("Context", (), {"inputs": artifacts})
    with pytest.raises(StageFailed, match=r"choose-format\.against: 'source' has another vocabulary"):
        stage._verdicts(context)
