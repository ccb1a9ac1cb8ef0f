"""Scales that are folded leave the model as it is, and make rounding cheaper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.modules import set_weight, weight_of
from compress.quant.options import QuantizeOptions
from compress.quant.rounding import quantize
from compress.quant.scaling import ALPHAS, Fold, awq_factors, folds, smoothquant_factors, unfolded
from compress.quant.schemes import SCHEMES
from compress.quant.search import output_error
from pico import MODEL_TYPES, VOCAB_SIZE, make_hybrid

Pico = Callable[[str], Path]


def output(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(ids)[0]
    return result


def scale_all(parts: Parts) -> int:
    """Fold random factors wherever that is possible; how many channels were scaled."""
    generator, scaled = torch.Generator().manual_seed(0), 0
    for index in range(len(parts.layers)):
        for fold in folds(parts, index):
            factor_K = 4.0 ** torch.randn(len(fold.source_K), generator=generator).clamp(-2, 2)
            fold.apply(fold.tied(factor_K, "amax"))
            scaled += len(fold.source_K)
    return scaled


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_folding_leaves_every_family_as_it_is(model_type: str, pico: Pico) -> None:
    model = load_model(pico(model_type))
    before, weight = output(model), weight_of(next(Parts(model).projections(Parts(model).layers[0]))[1]).clone()
    assert scale_all(Parts(model)) >= 4 * 64
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    changed = not torch.equal(weight_of(next(Parts(model).projections(Parts(model).layers[0]))[1]), weight)
    assert changed == (model_type != "bert")  # whose norm is the residual too


@pytest.mark.parametrize(("model_type", "missed"), [
    ("llama", []), ("qwen3", []), ("gpt2", ["mlp.c_proj"]), ("gpt_neox", ["mlp.dense_4h_to_h"]),
    ("bert", ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense",
              "output.dense"]),
])  # fmt: skip
def test_what_can_not_be_folded_is_named(model_type: str, missed: list[str], pico: Pico) -> None:
    parts = Parts(load_model(pico(model_type)))
    assert [path for path in unfolded(parts) if path.startswith(parts.layer_path(0))] == [
        f"{parts.layer_path(0)}.{path}" for path in missed
    ]


def test_mixers_keep_their_inputs_and_values(tmp_path: Path) -> None:
    folder = make_hybrid("llama", tmp_path / "hybrid", ("mamba2", None))
    model = load_model(folder)
    before = output(model)
    scale_all(Parts(model))
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    assert [path.rpartition(".")[2] for path in unfolded(Parts(model))] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "dt_proj", "g_proj",
    ]  # fmt: skip


def test_heads_that_share_values_share_factors() -> None:
    fold = Fold(torch.nn.Identity(), torch.tensor([0, 1, 0, 1]), ())
    statistic_K = torch.tensor([1.0, 2.0, 3.0, 8.0])
    assert fold.tied(statistic_K, "mean").tolist() == [2.0, 5.0, 2.0, 5.0]
    assert fold.tied(statistic_K, "amax").tolist() == [3.0, 8.0, 3.0, 8.0]


def test_smoothquant_is_its_formula_but_for_a_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    largest_K, weight_NK = torch.rand(8, generator=generator), torch.randn(5, 8, generator=generator)
    largest_K[3] = 0.0
    factor_K = smoothquant_factors(largest_K, [weight_NK[:2], weight_NK[2:]], 0.7)
    ratio_K = factor_K / (largest_K**0.7 / weight_NK.abs().amax(0) ** 0.3)
    used = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(ratio_K[used], ratio_K[0].expand(7))
    assert factor_K[3] == 1.0


def test_awq_chooses_the_exponent_with_the_least_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(256, 64, generator=generator) * torch.logspace(-1, 1.5, 64)
    weight_NK, scheme = torch.randn(24, 64, generator=generator), SCHEMES["w4-block32"]
    moment_KK, mean_K = x_TK.T @ x_TK / 256, x_TK.abs().mean(0)

    def naive(alpha: float) -> float:
        factor_K = mean_K**alpha
        rounded_NK = quantize(weight_NK * factor_K, scheme).dequantize() / factor_K
        return ((x_TK @ (rounded_NK - weight_NK).T).square().sum() / (x_TK @ weight_NK.T).square().sum()).item()

    factor_K, alpha = awq_factors(mean_K, [weight_NK], [scheme], moment_KK)
    assert 0 < alpha == min(ALPHAS, key=naive)
    rounded_NK = quantize(weight_NK * factor_K, scheme).dequantize() / factor_K
    assert output_error(weight_NK, rounded_NK, moment_KK) == pytest.approx(naive(alpha), rel=1e-3)
    assert naive(alpha) < 0.8 * naive(0.0)


def outliers(parts: Parts) -> Parts:
    """One channel of what layer 1's down projection reads is a hundredfold."""
    up = parts.layers[1].get_submodule(parts.family.mlp.up)
    weight_NK = weight_of(up).clone()
    weight_NK[5] *= 100
    set_weight(up, weight_NK)
    return parts


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static"])
def test_smoothquant_lowers_what_rounding_activations_costs(scheme: str, pico: Pico) -> None:
    ids_BT = torch.randint(0, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    costs = []
    for scaling in ("none", "smoothquant"):
        parts = outliers(Parts(load_model(pico("llama"))))
        options = QuantizeOptions(scheme=scheme, method="rtn", scaling=scaling, reduce_range=False)  # type: ignore[arg-type]
        found = quantize_model(parts, options, ids_BT)
        costs.append(found.rounding["model.layers.1.mlp.down_proj.weight"])
        assert (len(found.smoothing), found.unscaled) == (28 if scaling == "smoothquant" else 0, [])
    assert costs[1] < 0.3 * costs[0]


def test_latents_are_the_scaled_weights_that_the_codes_round(pico: Pico) -> None:
    ids_BT = torch.randint(0, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    parts = Parts(load_model(pico("mistral")))
    before = output(parts.model)
    options = QuantizeOptions(method="rtn", scaling="awq")
    found = quantize_model(parts, options, ids_BT, keep_latents=True)
    assert found.latents.keys() == found.tensors.keys()
    for name, latent_NK in found.latents.items():
        assert torch.equal(found.tensors[name].codes, quantize(latent_NK, options.base).codes)
        module = parts.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(weight_of(module), found.tensors[name].dequantize())
        set_weight(module, latent_NK)
    torch.testing.assert_close(output(parts.model), before, rtol=1e-4, atol=1e-4)
