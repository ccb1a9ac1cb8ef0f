"""What is written is what is read, whatever the mixture of schemes; what can't be right is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.models.folder import folder_problem
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.choice import MixedSchemes, SchemeChoice
from compress.quant.modules import QuantEmbedding, QuantLinear, weight_of
from compress.quant.qtensor import QTensor
from compress.quant.rounding import activation_range, quantize
from compress.quant.schemes import SCHEMES, TERNARY, W4_BLOCK32, W8_BLOCK32, W8A8_DYNAMIC, W8A8_STATIC, Scheme
from compress.quant.store import load_quantized_model, read_quantized, save_quantized
from compress.quant.targets import all_targets
from pico import VOCAB_SIZE, make_pico

Pico = Callable[[str], Path]
UP, DOWN = ".layers.0.mlp.up_proj.weight", ".layers.0.mlp.down_proj.weight"


def quantised(folder: Path, choice: SchemeChoice) -> dict[str, QTensor]:
    """Every weight as `choice` has it, rounded to nearest; static activations lie within −4…4."""
    scale, zero = activation_range(torch.tensor(-4.0), torch.tensor(4.0))
    found = {}
    for target in all_targets(Parts(load_model(folder)), choice):
        tensor = quantize(weight_of(target.module), target.scheme)
        found[target.name] = replace(tensor, input_scale=scale, input_zero_point=zero) \
            if target.scheme.static else tensor  # fmt: skip
    return found


def save(folder: Path, tensors: Mapping[str, QTensor], scheme: Scheme, out: Path) -> Path:
    out.mkdir()
    save_quantized(load_model(folder), tensors, scheme, folder, out)
    return out


MIXTURES = {
    "one scheme": W4_BLOCK32,
    "zero points": W4_BLOCK32.asymmetric,
    "two bits": MixedSchemes(SCHEMES["w2-block16"], {"down_proj": SCHEMES["w2-block64"].asymmetric}),
    "ternary": MixedSchemes(TERNARY, {"layers.1.*": W8_BLOCK32, "up_proj": W4_BLOCK32.asymmetric}),
    "dynamic": MixedSchemes(W8A8_DYNAMIC, {"down_proj": None}),
    "seven bits": MixedSchemes(W8A8_DYNAMIC.reduced, {"down_proj": W8_BLOCK32, "layers.2.*": W8A8_STATIC.reduced}),
    "static": W8A8_STATIC,
    "float tables": MixedSchemes(W4_BLOCK32, embeddings=None, head=None),
    "other tables": MixedSchemes(W4_BLOCK32, embeddings=SCHEMES["w2-block32"], head=SCHEMES["w8-block128"].asymmetric),
    "dynamic head": MixedSchemes(W4_BLOCK32, head=W8A8_DYNAMIC),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("model_type", ["mistral", "gpt2"])  # untied; tied and transposed
def test_every_mixture_is_read_as_it_was_written(mixture: str, model_type: str, pico: Pico, tmp_path: Path) -> None:
    choice = MIXTURES[mixture]
    tensors = quantised(pico(model_type), choice)
    scheme = choice if isinstance(choice, Scheme) else choice.scheme
    _, read = read_quantized(save(pico(model_type), tensors, scheme, tmp_path / "q"))
    assert {name for name, tensor in read.items() if isinstance(tensor, QTensor)} == set(tensors)
    for name, tensor in tensors.items():
        again = read[name]
        assert isinstance(again, QTensor)
        assert again.scheme == tensor.scheme
        assert torch.equal(again.codes, tensor.codes)
        assert torch.equal(again.dequantize(), tensor.dequantize())
        assert again.input_range == tensor.input_range
    again_saved = save(
        pico(model_type), {n: t for n, t in read.items() if isinstance(t, QTensor)}, scheme, tmp_path / "r"
    )
    assert (again_saved / "model.safetensors").read_bytes() == (tmp_path / "q" / "model.safetensors").read_bytes()
    assert (again_saved / "config.json").read_bytes() == (tmp_path / "q" / "config.json").read_bytes()


def test_modules_compute_by_their_own_schemes(pico: Pico, tmp_path: Path) -> None:
    choice = MixedSchemes(W8A8_STATIC, {"down_proj": None, "up_proj": TERNARY}, head=W4_BLOCK32)
    tensors = quantised(pico("mistral"), choice)
    model: Any = load_quantized_model(save(pico("mistral"), tensors, W8A8_STATIC, tmp_path / "q"))
    layer = model.model.layers[0]
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.model.embed_tokens.qtensor.scheme == W8_BLOCK32
    assert model.lm_head.qtensor.scheme == W4_BLOCK32
    assert layer.mlp.up_proj.qtensor.scheme == TERNARY
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert isinstance(layer.self_attn.q_proj, QuantLinear)
    x = 3 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = layer.self_attn.q_proj.qtensor.input_range
    rounded = (torch.round(x / scale) + zero).clamp(0, 255) - zero
    expected = rounded * scale @ tensors["model.layers.0.self_attn.q_proj.weight"].dequantize().T
    torch.testing.assert_close(layer.self_attn.q_proj(x), expected)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_head_has_the_embeddings_codes_only_where_it_is_tied(model_type: str, pico: Pico, tmp_path: Path) -> None:
    choice = MixedSchemes(W4_BLOCK32, embeddings=W8_BLOCK32, head=SCHEMES["w4-block64"])
    tensors = quantised(pico(model_type), choice)
    model: Any = load_quantized_model(save(pico(model_type), tensors, W4_BLOCK32, tmp_path / "q"))
    tied = model_type == "llama"
    assert ("lm_head.weight" in tensors) is not tied
    assert model.lm_head.qtensor.scheme.name == ("w8-block32" if tied else "w4-block64")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) is tied


def test_an_embedding_gets_blocks_that_fill_its_rows(tmp_path: Path) -> None:
    folder = make_pico("llama", tmp_path / "odd", num_hidden_layers=1, hidden_size=80, intermediate_size=112)
    tensors = quantised(folder, SCHEMES["w4-block128"])
    assert tensors["model.embed_tokens.weight"].scheme == SCHEMES["w4-block16"]
    out = save(folder, tensors, SCHEMES["w4-block128"], tmp_path / "q")
    declared = json.loads((out / "config.json").read_text())["quantization_config"]["tensors"]
    assert declared["model.embed_tokens.weight"] == {"scheme": "w4-block16"}
    assert declared["model.layers.0.mlp.down_proj.weight"] == {"in_features": 112}
    ids = torch.randint(0, VOCAB_SIZE, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert load_quantized_model(out)(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", [f"model{UP}.scales", f"model{DOWN}.input_scale", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(name: str, value: float, pico: Pico, tmp_path: Path) -> None:
    out = save(pico("llama"), quantised(pico("llama"), W8A8_STATIC), W8A8_STATIC, tmp_path / "q")
    stored = load_file(out / "model.safetensors")
    stored[name].view(-1)[0] = value
    save_file(stored, out / "model.safetensors")
    with pytest.raises(CompressError, match=rf"{name} has values that are NaN or infinite"):
        read_quantized(out)


def test_nothing_is_written_of_scales_that_are_no_numbers(pico: Pico, tmp_path: Path) -> None:
    tensors = quantised(pico("llama"), W4_BLOCK32)
    tensors[f"model{UP}"].scale[0, 0] = float("nan")  # behind the back of the check that QTensor makes
    with pytest.raises(CompressError, match=rf"model{UP}.scales has values that are NaN"):
        save(pico("llama"), tensors, W4_BLOCK32, tmp_path / "q")
    assert not list((tmp_path / "q").iterdir())


def test_parts_that_are_missing_are_refused_by_name(pico: Pico, tmp_path: Path) -> None:
    for index, (scheme, part) in enumerate(
        ((W4_BLOCK32, "scales"), (W4_BLOCK32.asymmetric, "zero_points"), (W8A8_STATIC, "input_zero_point"))
    ):
        out = save(pico("llama"), quantised(pico("llama"), scheme), scheme, tmp_path / f"{index}")
        stored = load_file(out / "model.safetensors")
        del stored[f"model{UP}.{part}"]
        save_file(stored, out / "model.safetensors")
        with pytest.raises(CompressError, match=f"model{UP}: "):
            read_quantized(out)


def test_parts_that_are_not_what_they_were_are_refused_by_name(pico: Pico, tmp_path: Path) -> None:
    asymmetric = W4_BLOCK32.asymmetric
    out = save(pico("llama"), quantised(pico("llama"), asymmetric), asymmetric, tmp_path / "q")
    stored = load_file(out / "model.safetensors")
    codes, scales, zeros = (stored[f"model{UP}.{part}"] for part in ("codes", "scales", "zero_points"))
    fewer_rows = {"codes": codes[:9], "scales": scales[:9], "zero_points": zeros[:9]}
    damages: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"codes": codes.float()}, r"codes are stored as torch\.float32"),
        ({"zero_points": zeros.float()}, r"codes are stored as"),
        ({"zero_points": zeros[:9]}, "zero points do not go with"),
        (fewer_rows, f"mismatched_keys model{UP}"),
    ]
    for parts, said in damages:
        own = {f"model{UP}.{part}": value.contiguous() for part, value in parts.items()}
        save_file({**stored, **own}, out / "model.safetensors")
        with pytest.raises(CompressError, match=said):
            load_quantized_model(out)


def test_a_quantised_folder_is_not_quantised_twice(pico: Pico, tmp_path: Path) -> None:
    out = save(pico("llama"), quantised(pico("llama"), W4_BLOCK32), W4_BLOCK32, tmp_path / "q")
    assert folder_problem(out) == ("is quantised already (compress)", "name the model that it was made from")
    with pytest.raises(CompressError, match="is quantised already"):
        load_model(out)
