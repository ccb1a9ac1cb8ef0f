"""Models with fake-quantised modules in place: what they compute is what is stored and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compress.errors import StageFailed
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.modules import replace_modules
from compress.quant.options import QuantizeOptions
from compress.quant.store import load_quantized_model, save_quantized
from compress.quant.trained import FakeQuantEmbedding, FakeQuantisation, FakeQuantLinear, Learn
from pico import make_hybrid

IDS = torch.arange(1, 65).reshape(2, 32)
Pico = Callable[[str], Path]


def faked(folder: Path, learn: Learn = "both", level: int = 0, **options: Any) -> tuple[Any, Any, FakeQuantisation]:
    """(model with fakes in place, what it was quantised to, the fakes)."""
    model = load_model(folder)
    found = quantize_model(Parts(model), QuantizeOptions(**options), IDS, keep_latents=True)
    return model, found, FakeQuantisation(model, found.tensors, found.latents, learn, level)


def says(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return cast(Tensor, output.logits if "logits" in output else output.last_hidden_state)


def one_step(model: nn.Module, rate: float = 1e-2) -> None:
    """Moves every parameter that has a gradient."""
    output = model(IDS)
    (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad.sign() * parameter.abs().mean())
                parameter.grad = None


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"scheme": "w4-block32"}), ("gpt2", {"scheme": "w2-block16", "symmetric": False}),
        ("gpt_neox", {"scheme": "ternary"}), ("bert", {"scheme": "w8a8-dynamic", "exceptions": {}}),
        ("llama", {"scheme": "w8a8-static", "reduce_range": True}), ("bert", {"scheme": "w8a8-static"}),
        ("mistral", {"scheme": "w4-block16", "symmetric": False, "embeddings": "float32",
                     "exceptions": {"down_proj": "w8-block32", "layers.0.self_attn.*": "float32"}}),
    ],
)  # fmt: skip
def test_trained_stored_and_loaded_it_says_the_same(
    model_type: str, options: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    source = pico(model_type)
    model, found, fakes = faked(source, method="search", tokens=64, sequence_length=32, **options)
    start = load_model(source)
    replace_modules(start, found.tensors)
    assert torch.allclose(says(model), says(start), atol=1e-5), "it starts from what it was quantised to"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        one_step(model)
    stuck = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not {name for name in stuck if name.endswith("weight") and "pooler" not in name}
    assert sum("scale" in name for name in stuck) == 0
    said = says(model)
    tensors = fakes.remove()
    assert any(not torch.equal(tensors[name].codes, found.tensors[name].codes) for name in tensors)
    assert not any(isinstance(module, FakeQuantLinear | FakeQuantEmbedding) for module in model.modules())
    save_quantized(model, tensors, QuantizeOptions(**options).base, source, tmp_path)
    loaded = load_quantized_model(tmp_path)
    assert torch.equal(says(loaded), said)
    if QuantizeOptions(**options).base.blockwise:
        assert torch.equal(says(model), said), "the float model that is left has the weights that the codes stand for"


@pytest.mark.parametrize("factor", [-1.0, -0.5, 0.0])
def test_a_range_that_training_moves_past_zero_stays_one(factor: float, pico: Pico, tmp_path: Path) -> None:
    model, _, fakes = faked(pico("bert"), scheme="w8a8-static", exceptions={}, method="rtn")
    fake = next(module for module in model.modules() if isinstance(module, FakeQuantLinear))
    before = says(model)
    with torch.no_grad():
        cast(nn.Parameter, fake.input_scale).mul_(factor)
    model(IDS).last_hidden_state.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    said = says(model)
    assert torch.equal(said, before) == (factor == -1.0)
    tensors = fakes.remove()
    save_quantized(model, tensors, QuantizeOptions(scheme="w8a8-static").base, pico("bert"), tmp_path)
    assert torch.equal(says(load_quantized_model(tmp_path)), said)


@pytest.mark.parametrize(
    ("name", "what"), [("scale", "1 scales are NaN or infinite"), ("input_scale", "the input's scale is nan")]
)
def test_a_scale_that_is_no_number_is_named(name: str, what: str, pico: Pico) -> None:
    model, _, fakes = faked(pico("llama"), scheme="w8a8-static", exceptions={}, method="rtn")
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.down_proj, name)[0] = torch.nan
    with pytest.raises(StageFailed) as failed:
        fakes.remove()
    assert failed.value.problem.where == "model.layers.1.mlp.down_proj.weight"
    assert failed.value.problem.what == f"training diverged: {what}"
    assert "scale_learning_rate" in failed.value.problem.fix


def test_a_tied_head_trains_the_embeddings_table_once(pico: Pico) -> None:
    model, _, fakes = faked(pico("llama"), method="rtn")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.scale is model.model.embed_tokens.scale
    assert len({name for name, _ in model.named_parameters() if "lm_head" in name}) == 0
    model(IDS).logits.square().sum().backward()
    unread = model.model.embed_tokens.weight.grad[100:]
    assert unread.abs().sum() > 0, "the head reads all rows"
    fakes.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_what_is_replaced_takes_no_memory_meanwhile(model_type: str, pico: Pico) -> None:
    model = load_model(pico(model_type))
    modules = dict(model.named_modules()).items()
    own = {name: module for name, module in modules if isinstance(getattr(module, "weight", None), Tensor)}
    found = quantize_model(Parts(model), QuantizeOptions(method="rtn"), keep_latents=True)
    rounded = {name: module.weight.detach().clone() for name, module in own.items()}
    fakes = FakeQuantisation(model, found.tensors, found.latents, "both")
    for name in found.tensors:
        assert own[name.removesuffix(".weight")].weight.numel() == 0, name
    fakes.remove()
    for name, module in own.items():
        assert module is model.get_submodule(name)
        assert module.weight.shape == rounded[name].shape
        assert torch.allclose(module.weight, rounded[name], atol=1e-6), name


def test_hybrids_too(tmp_path: Path) -> None:
    folder = make_hybrid("llama", tmp_path / "hybrid", ("mamba2", None))
    model, _, fakes = faked(folder, method="gptq", tokens=64, sequence_length=32)
    one_step(model)
    said = says(model)
    (tmp_path / "out").mkdir()
    save_quantized(model, fakes.remove(), QuantizeOptions().base, folder, tmp_path / "out")
    assert torch.equal(says(load_quantized_model(tmp_path / "out")), said)


@pytest.mark.parametrize("learn", ["weights", "scales"])
def test_what_is_not_learnt_stays(learn: Learn, pico: Pico) -> None:
    model, found, fakes = faked(pico("qwen3"), learn, method="gptq", symmetric=False)
    norm = model.model.norm.weight.clone()
    one_step(model)
    tensors = fakes.remove()
    assert not torch.equal(model.model.norm.weight, norm), "what is not quantised is trained in any case"
    for name, tensor in tensors.items():
        assert torch.equal(tensor.codes, found.tensors[name].codes) == (learn == "scales"), name
        assert torch.equal(tensor.scale, found.tensors[name].scale) == (learn == "weights"), name
        assert torch.equal(tensor.zero_point, found.tensors[name].zero_point)


def test_accuracy_level_4_is_that_of_the_operator(pico: Pico) -> None:
    model, found, _ = faked(pico("llama"), level=4, method="rtn")
    expected = load_model(pico("llama"))
    replace_modules(expected, found.tensors, 4)
    assert torch.equal(says(model), says(expected))
    one_step(model)
    assert not torch.equal(says(model), says(expected))


def test_evaluated_at_another_level_than_it_is_trained_at(pico: Pico) -> None:
    model = load_model(pico("llama"))
    found = quantize_model(Parts(model), QuantizeOptions(method="rtn"), keep_latents=True)
    FakeQuantisation(model, found.tensors, found.latents, "both", 0, 4)
    for training, level in ((False, 4), (True, 0)):
        expected = load_model(pico("llama"))
        replace_modules(expected, found.tensors, level)
        assert torch.equal(says(model.train(training)), says(expected))


def test_under_autocast_it_computes_in_bfloat16_what_plain_modules_do(pico: Pico) -> None:
    model, found, _ = faked(pico("llama"), method="rtn")
    plain = load_model(pico("llama"))
    quantize_model(Parts(plain), QuantizeOptions(method="rtn"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(says(model), says(plain))
        loss = model(IDS).logits.square().mean()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    del found


def test_rates_are_shares_of_scales_and_of_all_codes(pico: Pico) -> None:
    options = {"scheme": "w8a8-static", "tokens": 64, "sequence_length": 32, "exceptions": {"down_proj": "w4-block32"}}
    _, found, fakes = faked(pico("llama"), **options)
    rates = fakes.rates(0.01)
    name = "model.layers.0.mlp.up_proj"
    tensor = found.tensors[f"{name}.weight"]
    assert rates[f"{name}.scale"] == pytest.approx(0.01 * tensor.scale.median().item())
    assert rates[f"{name}.input_scale"] == pytest.approx(0.01 * tensor.input_scale.item())
    assert rates[f"{name}.input_zero_point"] == pytest.approx(2.55)
    assert f"{name}.zero_point" not in rates
    assert f"{name}.weight" not in rates
