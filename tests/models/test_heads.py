"""One table of heads: what it reads, and what it refuses by name before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from compress.models.anatomy import shape_of
from compress.models.folder import tensor_names
from compress.models.heads import BACKBONE, HEADS, named_head
from compress.models.load import load_model, load_tokenizer, save_model
from compress.pipeline.check import check_file
from compress.runner.twin import twin_config
from compress.runner.weights import own_figures
from pico import make_pico


def problems(model: Path, stages: str = "[export-onnx]") -> str:
    """What `check` says of a pipeline with that model."""
    file = model.parent / f"{model.name}.yaml"
    file.write_text(f"name: x\nmodel: {model}\nstages: {stages}\n", "utf-8")
    return " | ".join(map(str, check_file(file).problems))


def changed(folder: Path, out: Path, drop: str = "", **changes: Any) -> Path:
    """A copy whose config.json says something else, without the key `drop`."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | changes
    config.pop(drop, None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def with_weights(folder: Path, **more: Any) -> Path:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.suffix)
def test_optimum_and_transformers_mean_the_same_by_each_row(head: Any) -> None:
    import transformers
    from optimum.exporters.tasks import TasksManager

    stem = "Bert" if head.kind == "encoder" else "GPT2" if head.suffix == "LMHeadModel" else "Llama"
    cls = getattr(transformers, stem + head.suffix)
    assert TasksManager.infer_task_from_model(cls) == head.export.removesuffix("-with-past")
    assert type(getattr(transformers, head.auto).from_config(cls.config_class(num_hidden_layers=0))) is cls
    assert named_head(f"Hybrid{stem}{head.suffix}") is head


@pytest.mark.parametrize(
    ("model_type", "architecture", "said"),
    [
        ("bert", "BertForQuestionAnswering", "a head that is not supported: BertForQuestionAnswering"),
        ("bert", "BertForMultipleChoice", "a head that is not supported: BertForMultipleChoice"),
        ("bert", "BertForNextSentencePrediction", "a head that is not supported: BertForNextSentencePrediction"),
        ("bert", "BertLMHeadModel", "a head that is not supported: BertLMHeadModel"),
        ("bert", "BertForPreTraining", 'write "architectures": ["BertForMaskedLM"]'),
        ("gpt2", "GPT2DoubleHeadsModel", "supported: GPT2LMHeadModel"),
        ("llama", "LlamaModel", "a decoder without a language head, which is not supported: LlamaModel"),
        ("qwen3", "Qwen3ForSequenceClassification", "not supported: Qwen3ForSequenceClassification; "
         "supported: Qwen3ForCausalLM"),
        ("llama", "AutoModelForCausalLMWithValueHead", "not supported: AutoModelForCausalLMWithValueHead"),
    ],
)  # fmt: skip
def test_a_head_that_is_in_no_row_is_refused_by_name(
    model_type: str, architecture: str, said: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    found = problems(changed(pico(model_type), tmp_path / "model", architectures=[architecture]))
    assert said in found
    assert "complete?" not in found


def test_a_value_head_beside_a_language_head_is_named(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(pico("gpt2"), tmp_path / "model")
    with_weights(folder, **{"v_head.summary.weight": load_file(folder / "model.safetensors")["transformer.wpe.weight"]})
    assert "has a value head beside GPT2LMHeadModel, which is not supported" in problems(folder)


@pytest.mark.parametrize("architectures", [None, [], "BertModel", [3]])
def test_a_config_without_architectures_is_told_what_to_write(architectures: Any, tmp_path: Path) -> None:
    written = {}
    for name in ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"):
        folder = make_pico("bert", tmp_path / name / "source", num_hidden_layers=1, architecture=name)
        written[name] = problems(changed(folder, tmp_path / name / "model", architectures=architectures))
    assert all(f'add "architectures": ["{name}"] to it' in said for name, said in written.items())


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("gpt_neox", "GPTNeoXForCausalLM")],
)
def test_a_decoder_without_architectures_too(
    model_type: str, name: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    assert f'add "architectures": ["{name}"] to it' in problems(
        changed(pico(model_type), tmp_path / "model", drop="architectures")
    )


def test_a_masked_lm_as_it_is_published_is_read_without_what_is_no_part_of_it(tmp_path: Path) -> None:
    import torch

    pretrained = make_pico("bert", tmp_path / "source", num_hidden_layers=1, architecture="BertForPreTraining")
    folder = changed(pretrained, tmp_path / "model", architectures=["BertForMaskedLM"])
    assert problems(folder) == ""
    model = load_model(folder)
    assert type(model).__name__ == "BertForMaskedLM"
    weights = load_file(folder / "model.safetensors")
    key = "cls.predictions.transform.dense.weight"
    assert torch.equal(model.state_dict()[key], torch.from_numpy(weights[key]))
    figures = own_figures(folder, "torch", None)
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_no_name_of_a_backbone_hides_a_head() -> None:
    assert named_head("BertModel") is named_head("HybridBertModel") is BACKBONE
    assert named_head("BertForMyModel") is None


def test_a_bert_without_a_pooler_lacks_its_pooled_output_alone(tmp_path: Path) -> None:
    import torch
    from exporting import export

    from compress.runner.twin import write_twin
    from compress.runtime.session import OnnxModel

    folder = make_pico("bert", tmp_path / "model", num_hidden_layers=2)
    kept = {name: each for name, each in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    model, ids = load_model(folder), torch.arange(20)[None]
    assert model.pooler is None
    save_model(model, folder, tmp_path / "saved")
    assert tensor_names(tmp_path / "saved") == kept.keys()
    assert not any("pooler" in name for name in tensor_names(write_twin(folder, tmp_path / "twin")))
    export(tmp_path / "saved", tmp_path / "onnx")
    encoder = OnnxModel(tmp_path / "onnx", threads=1)
    assert encoder.outputs == ("last_hidden_state",)
    with torch.no_grad():
        expected = load_model(tmp_path / "saved")(ids).last_hidden_state.numpy()
    assert abs(encoder.encode(ids.numpy())["last_hidden_state"] - expected).max() < 1e-4


def test_a_bert_without_a_pooler_is_quantised_and_converted(tmp_path: Path) -> None:
    from compress.models.convert import to_hybrid
    from compress.models.parts import Parts
    from compress.quant.apply import quantize_model
    from compress.quant.load import load_any
    from compress.quant.options import QuantizeOptions
    from compress.quant.store import save_quantized
    from pico import mixer_spec

    folder = make_pico("bert", tmp_path / "model", num_hidden_layers=2)
    kept = {name: each for name, each in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert to_hybrid(load_model(folder), [mixer_spec("linear"), None]).pooler is None
    (tmp_path / "int8").mkdir()
    model, options = load_model(folder), QuantizeOptions.model_validate({"scheme": "w8-block32", "method": "rtn"})
    save_quantized(model, quantize_model(Parts(model), options, None).tensors, options.base, folder, tmp_path / "int8")
    assert load_any(tmp_path / "int8").pooler is None


def test_a_vocabulary_alone_ends_text_as_its_model_does(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(pico("gpt2"), tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|end|>": 0}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    alone, whole = load_tokenizer(folder), load_tokenizer(pico("gpt2"))
    assert alone.eos_token_id == whole.eos_token_id == 0
    assert len(alone) == len(whole)
    assert alone("def f(x):\n")["input_ids"] == whole("def f(x):\n")["input_ids"]


def test_windows_of_some_layers_follow_from_qwens_keys(pico: Callable[[str], Path], tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    folder = make_pico("qwen2", tmp_path / "source", num_hidden_layers=6, **windows)
    meant = json.loads((folder / "config.json").read_text())["layer_types"]
    config = json.loads((changed(folder, tmp_path / "model", drop="layer_types") / "config.json").read_text())
    assert list(shape_of(config).layer_types) == meant
    assert shape_of(config).attention_features == ()
    assert set(twin_config(config)["layer_types"]) == set(meant)
    assert problems(tmp_path / "model", "[convert-attention: {to: sliding, convert: 2}]") == ""
