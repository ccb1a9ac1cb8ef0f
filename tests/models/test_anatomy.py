from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, InvalidInput
from compress.models.anatomy import FAMILIES, family_of, shape_of
from compress.models.load import carry, load_model, load_tokenizer, save_model
from compress.models.parts import Parts
from pico import MODEL_TYPES, make_pico

Pico = Callable[[str], Path]


@pytest.fixture
def parts(model_type: str, pico: Pico) -> Parts:
    return Parts(load_model(pico(model_type)))


def test_the_pico_models_cover_every_family() -> None:
    assert {family_of(model_type).name for model_type in MODEL_TYPES} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_module_that_the_anatomy_names_is_there(parts: Parts) -> None:
    family = parts.family
    for path in (family.token_embedding, family.position_embedding, family.type_embedding, family.embedding_norm,
                 family.final_norm):  # fmt: skip
        assert (parts.backbone_module(path) is None) == (path == "")
    assert (parts.lm_head is not None) == (family.kind == "decoder")
    assert len(parts.layers) == parts.shape.num_hidden_layers == 4
    for index, layer in enumerate(parts.layers):
        assert parts.model.get_submodule(parts.layer_path(index)) is layer
        assert parts.attention(layer) is layer.get_submodule(family.attention.path)
        for norm in (family.attention_norm, family.mlp_norm):
            assert layer.get_submodule(norm).weight.shape == (parts.shape.hidden_size,)
    has_qk_norm = hasattr(parts.attention(parts.layers[0]), "q_norm")
    assert has_qk_norm == (parts.shape.model_type == "qwen3")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_projections_are_all_matrices_of_a_layer(parts: Parts) -> None:
    for layer in parts.layers:
        matrices = {name.removesuffix(".weight") for name, weight in layer.named_parameters() if weight.dim() == 2}
        named = [path for path, _ in parts.projections(layer)]
        assert sorted(named) == sorted(matrices)
        assert all(layer.get_submodule(path) is module for path, module in parts.projections(layer))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_fused_rows_and_conv1d_are_as_declared(parts: Parts) -> None:
    attention, hidden = parts.family.attention, parts.shape.hidden_size
    for path, module in parts.projections(parts.layers[0]):
        if path.endswith(attention.qkv) and attention.qkv:
            assert sorted(module.weight.shape) == [hidden, 3 * hidden]
        assert (type(module).__name__ == "Conv1D") == parts.family.conv1d


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_estimated_parameters_are_within_five_percent(parts: Parts, pico: Pico, model_type: str) -> None:
    counted = sum(weight.numel() for weight in parts.model.parameters())  # shared ones once
    config = json.loads((pico(model_type) / "config.json").read_text())
    assert shape_of(config).num_parameters == pytest.approx(counted, rel=0.05)


def test_layers_can_be_replaced_in_place(pico: Pico) -> None:
    parts = Parts(load_model(pico("gpt2")))
    kept = [parts.layers[0], parts.layers[3]]
    parts.replace_layers(kept)
    assert list(parts.layers) == kept
    assert len(parts.model.transformer.h) == 2


def test_a_parallel_residual_that_is_switched_off_is_pre(pico: Pico) -> None:
    config = json.loads((pico("gpt_neox") / "config.json").read_text())
    assert shape_of(config).residual == "parallel"
    assert shape_of({**config, "use_parallel_residual": False}).residual == "pre"


def test_an_unknown_or_incomplete_config_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'mamba' is not supported; supported: llama"):
        shape_of({"model_type": "mamba"})
    with pytest.raises(InvalidInput, match="no model_type"):
        shape_of({})
    with pytest.raises(InvalidInput, match="no whole number 'hidden_size'"):
        shape_of({"model_type": "llama"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saving_and_loading_gives_the_same_output_and_what_must_travel(
    parts: Parts, pico: Pico, model_type: str, tmp_path: Path
) -> None:
    save_model(parts.model, pico(model_type), tmp_path)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before, after = parts.model(ids)[0], load_model(tmp_path)(ids)[0]
    assert torch.equal(before, after)
    assert load_tokenizer(tmp_path).encode("a statement") == load_tokenizer(pico(model_type)).encode("a statement")
    assert (tmp_path / "LICENSE").read_text() == "Apache-2.0\n"
    assert (tmp_path / "README.md").read_text() == "# a pico model\n"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("rope_theta") == (config.get("rope_parameters") or {}).get("rope_theta")


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)


def _reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 96)


@pytest.mark.parametrize("harm", [_drop, _add, _reshape])
def test_weights_that_do_not_fit_the_config_are_refused(
    harm: Callable[[dict[str, torch.Tensor]], None], pico: Pico, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    harm(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"do not fit config.json|can't be loaded"):
        load_model(folder)


def test_truncated_weights_are_refused(pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CompressError, match="can't be loaded"):
        load_model(folder)


def test_a_classification_head_is_loaded_too(tmp_path: Path) -> None:
    folder = make_pico("bert", tmp_path, architecture="BertForSequenceClassification", num_labels=3)
    parts = Parts(load_model(folder))
    assert parts.prefix == "bert."
    assert parts.model(torch.arange(8)[None]).logits.shape == (1, 3)


def test_carry_brings_licence_card_and_pooling_but_overwrites_nothing(pico: Pico, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(pico("bert"), tmp_path / "origin"))
    (origin / "NOTICE.txt").write_text("notice")
    (origin / "1_Pooling").mkdir()
    (origin / "1_Pooling" / "config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("our own")
    carry(origin, out)
    assert {"LICENSE", "NOTICE.txt", "README.md", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    assert (out / "1_Pooling" / "config.json").read_text() == "{}"
    assert (out / "README.md").read_text() == "our own"
    assert not (out / "model.safetensors").exists()
    with pytest.raises(CompressError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
