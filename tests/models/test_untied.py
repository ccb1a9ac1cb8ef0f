"""A head with weights of its own in a model whose config.json says that it is tied: the weights are believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact import Artifact
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.models.anatomy import shape_of
from compress.models.by_layers import load_by_layers
from compress.models.folder import config_of
from compress.models.load import load_model
from compress.quant.load import load_any
from compress.registry import stage_class
from compress.runner.weights import own_figures
from compress.runtime.session import OnnxModel
from compress.stage import INPUT, StageContext, Target
from pico import make_pico

HEADS = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "gpt_neox": "embed_out.weight",
         "bert": "cls.predictions.decoder.weight"}  # fmt: skip
TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
IDS = torch.arange(5, 37).reshape(2, 16)
QAT = {"tokens": 128, "sequence_length": 16, "batch_size": 2, "eval_tokens": 32, "scheme": "w8-block32"}
FITTED = {"tokens": 64, "sequence_length": 16}


def untied(model_type: str, folder: Path) -> Path:
    """A pico model that says it is tied, with a head that is not its embeddings."""
    own = {"architecture": "BertForMaskedLM"} if model_type == "bert" else {}
    make_pico(model_type, folder, tie_word_embeddings=True, **own)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name.endswith(TABLES))
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, HEADS[model_type]: 0.15 * noise}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = untied(model_type, tmp_path_factory.mktemp("untied") / model_type)
        return made[model_type]

    return of


def run(stage: str, options: Mapping[str, Any], source: Path, to: Path, teacher: Path | None = None) -> Path:
    for name in ("out", "work"):
        (to / name).mkdir(parents=True)
    format_ = "quantized" if "quantization_config" in json.loads((source / "config.json").read_text()) else "torch"
    inputs = {INPUT: Artifact(source, format_, "source", "input")}
    inputs |= {"teacher": Artifact(teacher, "torch", "source", "teacher")} if teacher else {}
    context = StageContext(to / "out", to / "work", inputs, TextData(DataConfig()), 0, Target(threads=1))
    stage_class(stage).model_validate(dict(options)).run(context)
    return to / "out"


def says(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_any(folder)(IDS).logits
    return logits


def spread_of_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().square().mean().sqrt() / expected.detach().std())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_the_config_is_corrected_wherever_it_is_read(model_type: str, folder: Callable[[str], Path]) -> None:
    source = folder(model_type)
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    config = config_of(source) or {}
    assert config["tie_word_embeddings"] is False
    assert Artifact(source, "torch", "source", "x").config == config
    model, by_layers = load_model(source), load_by_layers(source)[0]
    assert model.config.tie_word_embeddings is by_layers.config.tie_word_embeddings is False
    head = load_file(source / "model.safetensors")[HEADS[model_type]]
    assert all(torch.equal(each.get_output_embeddings().weight, head) for each in (model, by_layers))
    parameters = sum(weight.numel() for weight in model.parameters())
    assert own_figures(source, "torch", None)["parameters"] == parameters
    assert shape_of(config).num_parameters == pytest.approx(parameters, rel=0.05)


def test_a_copy_of_the_table_stays_tied(tmp_path: Path) -> None:
    source = make_pico("llama", tmp_path / "m")
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert (config_of(source) or {})["tie_word_embeddings"] is True
    model = load_model(source)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("stage", "options", "most"),
    [
        ("prune-layers", {"drop": [1]}, None), ("prune-groups", {"keep": {"intermediate": 1.0}, **FITTED}, 1e-5),
        ("quantize", {"scheme": "w8-block32", "method": "rtn"}, 0.05), ("qat", QAT, 0.1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("model_type", HEADS)
def test_stages_keep_the_head(
    model_type: str, stage: str, options: Mapping[str, Any], most: float | None, folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    source = folder(model_type)
    if stage == "qat" and model_type == "bert":
        options = {**options, "loss": {"kl": 0, "hidden": 1}}
    out = run(stage, options, source, tmp_path, source if stage == "qat" else None)
    if model_type != "bert":
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_any(out).get_output_embeddings().weight
    head = load_model(source).get_output_embeddings().weight
    assert spread_of_error(written, head) < 0.05
    if most is not None:
        assert spread_of_error(says(out), says(source)) < most


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("stages", [(), ("quantize",)], ids=["fp32", "8 bits"])
def test_the_export_says_what_the_model_says(
    stages: tuple[str, ...], model_type: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder(model_type)
    for stage in stages:
        model = run(stage, {"scheme": "w8-block32", "method": "rtn"}, model, tmp_path / stage)
    out = run("export-onnx", {}, model, tmp_path / "export")
    logits, _ = OnnxModel(out, threads=1).forward(np.asarray(IDS))
    assert spread_of_error(torch.from_numpy(np.asarray(logits, np.float32)), says(folder(model_type))) < 0.1
