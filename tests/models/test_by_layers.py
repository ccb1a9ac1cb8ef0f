"""Models whose layers are read one at a time: the same codes as of a model that is in memory whole, in less of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.models.by_layers import load_by_layers
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.options import QuantizeOptions
from compress.quant.quantized import Quantized
from pico import MODEL_TYPES, make_pico

IDS_BT = torch.randint(5, 60, (6, 16), generator=torch.Generator().manual_seed(0))
PLAIN = {"scheme": "w4-block32"}
FOLDED = {"scheme": "w8a8-dynamic", "scaling": "smoothquant"}


def quantised(folder: Path, options: dict[str, str]) -> tuple[Parts, Quantized]:
    """The codes by layers, having looked that no two layers' matrices were in memory at once."""
    model, shelf = load_by_layers(folder)
    parts = Parts(model)

    def here() -> list[int]:
        return [
            index for index, layer in enumerate(parts.layers)
            if any(not module.weight.is_meta for _, module in parts.projections(layer))
        ]  # fmt: skip

    assert here() == [], "nothing is read before it is needed"
    seen: list[list[int]] = []
    for layer in parts.layers:
        layer.register_forward_hook(lambda *_: seen.append(here()), prepend=True)
    found = quantize_model(parts, QuantizeOptions.model_validate(options), IDS_BT, shelf=shelf)
    assert seen
    assert all(len(layers) == 1 for layers in seen)
    assert here() == []
    return parts, found


@pytest.mark.parametrize("options", [PLAIN, FOLDED], ids=lambda options: options["scheme"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_codes_are_those_of_the_whole_model(
    model_type: str, options: dict[str, str], pico: Callable[[str], Path]
) -> None:
    parts, found = quantised(pico(model_type), options)
    whole = Parts(load_model(pico(model_type)))
    expected = quantize_model(whole, QuantizeOptions.model_validate(options), IDS_BT)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].codes, tensor.codes), name
        assert torch.equal(found.tensors[name].scale, tensor.scale), name
    assert found.errors == expected.errors
    kept = dict(parts.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        if name not in expected.tensors:
            assert torch.equal(kept[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_other_types_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    parts, found = quantised(folder, PLAIN)
    expected = quantize_model(Parts(load_model(folder)), QuantizeOptions.model_validate(PLAIN), IDS_BT)
    assert {weight.dtype for weight in parts.model.parameters()} == {torch.float32}
    assert all(torch.equal(found.tensors[name].codes, tensor.codes) for name, tensor in expected.tensors.items())


def test_a_backbone_without_its_prefix(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """What `AutoModel` saves of a decoder with a tied head: transformers reads it into a model with a head."""
    folder = make_pico("llama", tmp_path / "model", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    save_file(bare, file, {"format": "pt"})
    parts, _ = quantised(folder, PLAIN)
    assert parts.lm_head is not None
    assert parts.lm_head.weight is parts.backbone.get_submodule("embed_tokens").weight


def test_weights_that_do_not_fit_are_told_as_ever(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CompressError, match=r"do not fit config\.json: missing_keys"):
        load_by_layers(folder)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    model, shelf = load_by_layers(folder)
    with pytest.raises(CompressError, match=r"model\.layers\.3\.mlp\.up_proj\.weight holds 1 NaN"):
        quantize_model(Parts(model), QuantizeOptions.model_validate(PLAIN), IDS_BT, shelf=shelf)


def test_quantised_folders_are_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CompressError, match="quantised already"):
        load_by_layers(folder)
