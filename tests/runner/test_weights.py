"""What a model weighs is what is read of its folder: the files that it names, and in them its own parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.models.load import load_model
from compress.runner.weights import own_figures

Pico = Callable[[str], Path]
POSITIONS = 256


def gpt2_buffers(index: int) -> dict[str, Tensor]:
    """As older versions of transformers stored them."""
    mask = torch.ones(POSITIONS, POSITIONS).tril()[None, None]
    return {f"h.{index}.attn.bias": mask, f"h.{index}.attn.masked_bias": torch.tensor(-1e4)}


def neox_buffers(index: int) -> dict[str, Tensor]:
    """As in Pythia's files."""
    path = f"gpt_neox.layers.{index}.attention"
    mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()[None, None]
    rates = {f"{path}.rotary_emb.inv_freq": torch.ones(2)}
    return {f"{path}.bias": mask, f"{path}.masked_bias": torch.tensor(-1e9), **rates}


def llama_buffers(index: int) -> dict[str, Tensor]:
    return {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(8)}


def bert_buffers(index: int) -> dict[str, Tensor]:
    return {"embeddings.position_ids": torch.arange(POSITIONS)[None]}


BUFFERS = {"gpt2": gpt2_buffers, "gpt_neox": neox_buffers, "llama": llama_buffers, "bert": bert_buffers}


def rewritten(folder: Path, more: dict[str, Tensor], prefix: str = "") -> Path:
    """The weights of `folder` with more tensors; prefix: what all other names lose (GPT-2's files have no backbone)."""
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(renamed | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def parameters_of(folder: Path) -> int:
    return sum(parameter.numel() for parameter in load_model(folder).parameters())


@pytest.mark.parametrize("model_type", BUFFERS)
def test_buffers_in_the_file_weigh_nothing(model_type: str, pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico(model_type), tmp_path / "model"))
    buffers = {name: value for index in range(4) for name, value in BUFFERS[model_type](index).items()}
    rewritten(folder, buffers, "transformer." if model_type == "gpt2" else "")
    found, plain = (own_figures(place, "torch", None) for place in (folder, pico(model_type)))
    assert found["parameters"] == parameters_of(folder) == parameters_of(pico(model_type)) == plain["parameters"]
    assert found["size_mb"] == pytest.approx(plain["size_mb"], abs=0.005)  # the header is longer
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(load_model(folder)(ids)[0], load_model(pico(model_type))(ids)[0])


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_stored_copy_of_a_tied_head_weighs_nothing(is_tied: bool, pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("gpt2"), tmp_path / "model"))
    head = load_file(folder / "model.safetensors")["transformer.wte.weight"].clone()
    rewritten(folder, {"lm_head.weight": head if is_tied else head + 1})
    plain = own_figures(pico("gpt2"), "torch", None)
    found = own_figures(folder, "torch", None)
    assert found["parameters"] == parameters_of(folder) == plain["parameters"] + (0 if is_tied else head.numel())
    more = 0 if is_tied else head.nbytes / 1e6
    assert found["size_mb"] == pytest.approx(plain["size_mb"] + more, abs=0.005)


def test_only_the_files_that_the_index_names_weigh(pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    load_model(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    save_file({"copy": torch.zeros(9999)}, folder / "consolidated.safetensors")
    save_file({"copy": torch.zeros(9999)}, folder / "model.fp16.safetensors")
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / "onnx" / name).write_bytes(bytes(99_999))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {folder / name for name in index["weight_map"].values()}
    assert len(shards) > 2
    assert own_figures(folder, "torch", None) == {
        "parameters": parameters_of(folder), "size_mb": sum(file.stat().st_size for file in shards) / 1e6
    }  # fmt: skip
    whole = own_figures(pico("llama"), "torch", None)
    assert whole["parameters"] == parameters_of(folder)
    assert whole["size_mb"] == (pico("llama") / "model.safetensors").stat().st_size / 1e6


def test_what_modules_json_names_weighs_too(pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("bert"), tmp_path / "model"))
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.zeros(32, 64)}, folder / "2_Dense/model.safetensors")
    before = own_figures(folder, "torch", None)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    after = own_figures(folder, "torch", None)
    assert after["size_mb"] - before["size_mb"] == pytest.approx(0.0082, abs=2e-4)
    assert after["parameters"] == before["parameters"]


def test_a_tensor_is_read_where_the_header_says(pico: Pico) -> None:
    from compress.models.stored import stored_tensors

    file = pico("llama") / "model.safetensors"
    for tensor in stored_tensors(file):
        assert tensor.read() == load_file(file)[tensor.name].numpy().tobytes()
