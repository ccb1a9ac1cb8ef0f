"""Every search is judged by its own objective, and GPTQ by a naive one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quant.grid import search_grid
from compress.quant.qtensor import QTensor
from compress.quant.rounding import quantize
from compress.quant.schemes import SCHEMES, W4_BLOCK32, Scheme
from compress.quant.search import DAMPING, gptq, output_error, search_scales

SOME = [
    SCHEMES["w4-block32"], SCHEMES["w4-block16"].asymmetric, SCHEMES["w8-block128"], SCHEMES["w2-block32"],
    SCHEMES["w2-block64"].asymmetric, SCHEMES["ternary"], SCHEMES["w8a8-dynamic"], SCHEMES["w8a8-static"].reduced,
]  # fmt: skip


def label(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.bits}-{'sym' if scheme.symmetric else 'asym'}"


def weight_and_moment(n: int = 48, k: int = 96) -> tuple[Tensor, Tensor]:
    """A weight (N, K) with a few large entries, and E[x xᵀ] (K, K) of strongly correlated inputs of unlike size."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(n, k, generator=generator) ** 3
    x_TK = torch.randn(512, 12, generator=generator) @ torch.randn(12, k, generator=generator)
    x_TK = (x_TK + 0.3 * torch.randn(512, k, generator=generator)) * torch.rand(k, generator=generator)
    return weight_NK, x_TK.T @ x_TK / 512


def error(weight_NK: Tensor, found: QTensor, moment_KK: Tensor | None) -> float:
    return output_error(weight_NK, found.dequantize(), moment_KK)


@pytest.mark.parametrize("scheme", SOME, ids=label)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_grids_are_never_worse_in_any_block(scheme: Scheme, weighted: bool) -> None:
    weight_NK, moment_KK = weight_and_moment(k=128)
    importance_K = moment_KK.diagonal() if weighted else torch.ones(128)

    def errors(found: QTensor) -> Tensor:
        error_NK = (found.dequantize() - weight_NK).square() * importance_K
        return error_NK.reshape(48, -1, scheme.block_size or 128).sum(-1)

    plain, searched = quantize(weight_NK, scheme), search_scales(weight_NK, scheme, importance_K if weighted else None)
    assert (errors(searched) <= errors(plain) * (1 + 1e-4) + 1e-9).all()
    assert errors(searched).sum() < errors(plain).sum()
    if scheme.bits < 8 and scheme.blockwise:
        assert (errors(searched) / errors(plain)).mean() < 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bits_find_the_four_levels_that_weights_were_made_of(symmetric: bool) -> None:
    scheme = SCHEMES["w2-block16"] if symmetric else SCHEMES["w2-block16"].asymmetric
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(0, 4, (32, 16), generator=generator)
    codes_NK[:, :4] = torch.arange(4)
    scale_N1 = torch.rand(32, 1, generator=generator) + 0.1
    zero_N1 = torch.full((32, 1), 2) if symmetric else torch.randint(0, 4, (32, 1), generator=generator)
    weight_NK = (codes_NK - zero_N1) * scale_N1
    found = search_scales(weight_NK, scheme)
    torch.testing.assert_close(found.dequantize(), weight_NK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SOME, ids=label)
def test_gptq_beats_searched_scales_beat_rounding_on_correlated_inputs(scheme: Scheme) -> None:
    weight_NK, moment_KK = weight_and_moment()
    rounded = error(weight_NK, quantize(weight_NK, scheme), moment_KK)
    searched = error(weight_NK, search_scales(weight_NK, scheme, moment_KK.diagonal()), moment_KK)
    assert searched < rounded
    assert error(weight_NK, gptq(weight_NK, scheme, moment_KK), moment_KK) < 0.8 * searched
    assert error(weight_NK, gptq(weight_NK, scheme, moment_KK, shrinkage=0), moment_KK) < 0.6 * searched
    assert error(weight_NK, gptq(weight_NK, scheme, moment_KK, act_order=True), moment_KK) < 0.8 * searched


def naive_gptq(weight_NK: Tensor, grid: QTensor, moment_KK: Tensor, order: list[int]) -> Tensor:
    """Codes by the rule as it is written down: the inverse of the open channels' Hessian anew for every channel."""
    k = len(moment_KK)
    hessian_KK = moment_KK.double() + DAMPING * moment_KK.diagonal().mean() * torch.eye(k)
    open_NK, codes_NK, remaining = weight_NK.double().clone(), torch.zeros(weight_NK.shape), list(order)
    for j in order:
        block = j // grid.scheme.block_size if grid.scheme.block_size else 0
        zero_N = grid.scheme.midpoint if grid.zero_point is None else grid.zero_point[:, block].double()
        scale_N = grid.scale[:, block].double()
        codes_NK[:, j] = (torch.round(open_NK[:, j] / scale_N) + zero_N).clamp(*grid.scheme.limits).float()
        error_N = open_NK[:, j] - (codes_NK[:, j] - zero_N) * scale_N
        inverse = torch.linalg.inv(hessian_KK[remaining][:, remaining])
        at = remaining.index(j)
        open_NK[:, remaining] -= torch.outer(error_N / inverse[at, at], inverse[at])
        remaining.remove(j)
    return codes_NK


@pytest.mark.parametrize("scheme", SOME, ids=label)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_naive_rule_on_its_own_grid(scheme: Scheme, act_order: bool) -> None:
    weight_NK, moment_KK = weight_and_moment(n=16, k=160)  # more than what is fed forward lazily
    found = gptq(weight_NK, scheme, moment_KK, act_order=act_order, shrinkage=0)
    order = moment_KK.diagonal().argsort(descending=True).tolist() if act_order else list(range(160))
    codes_NK = naive_gptq(weight_NK, found, moment_KK, order)
    assert (found.codes == codes_NK).float().mean() > (0.999 if scheme.bits < 7 else 0.97)  # float32, not float64


def test_with_act_order_the_grid_is_found_on_the_weights_as_they_are() -> None:
    """By blocks that lie where they lay: what `MatMulNBits` holds."""
    weight_NK, moment_KK = weight_and_moment()
    found = gptq(weight_NK, W4_BLOCK32, moment_KK, act_order=True, shrinkage=1.0)  # the diagonal feeds nothing forward
    scale_NG, _ = search_grid(weight_NK, W4_BLOCK32, moment_KK.diagonal() + DAMPING * moment_KK.diagonal().mean())
    torch.testing.assert_close(found.scale, scale_NG, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.codes, quantize(weight_NK, W4_BLOCK32, found.scale).codes)


def test_gptq_of_unrelated_alike_inputs_rounds_to_nearest() -> None:
    weight_NK, _ = weight_and_moment(k=64)
    found = gptq(weight_NK, W4_BLOCK32, torch.eye(64))
    torch.testing.assert_close(found.scale, search_scales(weight_NK, W4_BLOCK32).scale)
    assert torch.equal(found.codes, quantize(weight_NK, W4_BLOCK32, found.scale).codes)


def test_a_weight_of_zeros_has_no_error() -> None:
    zeros_NK = torch.zeros(4, 64)
    assert output_error(zeros_NK, zeros_NK, None) == output_error(zeros_NK, zeros_NK, torch.eye(64)) == 0.0


def test_rows_in_several_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, moment_KK = weight_and_moment()
    whole = gptq(weight_NK, W4_BLOCK32.asymmetric, moment_KK)
    monkeypatch.setattr("compress.quant.search.ROWS", 20)
    parts = gptq(weight_NK, W4_BLOCK32.asymmetric, moment_KK)
    assert torch.equal(whole.codes, parts.codes)
    torch.testing.assert_close(whole.dequantize(), parts.dequantize(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", [W4_BLOCK32, W4_BLOCK32.asymmetric], ids=label)
def test_tables_in_several_parts_are_the_same_tables(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, moment_KK = weight_and_moment()

    def seen() -> tuple[QTensor, Tensor, float]:
        found = search_scales(weight_NK, scheme, moment_KK.diagonal())
        return found, found.dequantize(), output_error(weight_NK, found.dequantize(), moment_KK)

    whole, whole_NK, whole_error = seen()
    for module in ("search", "qtensor"):
        monkeypatch.setattr(f"compress.quant.{module}.ROWS", 20)
    parts, parts_NK, parts_error = seen()
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts_NK, whole_NK)
    assert parts_error == pytest.approx(whole_error, rel=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_takes_channels_that_never_occur_and_a_part_filled_last_block(act_order: bool) -> None:
    weight_NK, moment_KK = weight_and_moment(k=80)
    moment_KK[7], moment_KK[:, 7] = 0, 0
    found = gptq(weight_NK, W4_BLOCK32, moment_KK, act_order=act_order)
    assert found.shape == (48, 80)
    assert found.scale.shape == (48, 3)
    assert error(weight_NK, found, moment_KK) < 0.1
