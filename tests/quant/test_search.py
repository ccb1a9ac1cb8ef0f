"""Every search is judged by its own objective."""

from __future__ import annotations

import pytest
import torch

from compress.quant.schemes import W4_BLOCK32, W8_BLOCK32, W8_DYNAMIC, Scheme, quantize, round_to_nearest
from compress.quant.search import gptq, output_error, search_scales

SCHEMES = [W4_BLOCK32, W8_BLOCK32, W8_DYNAMIC, W8_DYNAMIC.reduced]


def weight_and_moment(n: int = 48, k: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (N, K) with a few large entries, and E[x xᵀ] (K, K) of strongly correlated inputs of unlike size."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(n, k, generator=generator) ** 3
    x_TK = torch.randn(512, 12, generator=generator) @ torch.randn(12, k, generator=generator)
    x_TK = (x_TK + 0.3 * torch.randn(512, k, generator=generator)) * torch.rand(k, generator=generator)
    return weight_NK, x_TK.T @ x_TK / 512


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{s.bits}")
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_never_worse_in_any_block(scheme: Scheme, weighted: bool) -> None:
    weight_NK, moment_KK = weight_and_moment()
    importance_K = moment_KK.diagonal() if weighted else torch.ones(96)
    block = scheme.block_size or 96

    def errors(scale_NG: torch.Tensor) -> torch.Tensor:
        error_NK = (quantize(weight_NK, scheme, scale_NG).dequantize() - weight_NK).square() * importance_K
        return error_NK.reshape(48, -1, block).sum(-1)

    plain, _ = round_to_nearest(weight_NK, scheme)
    searched = search_scales(weight_NK, scheme, importance_K if weighted else None)
    assert (errors(searched) <= errors(plain) * (1 + 1e-4) + 1e-9).all()
    assert errors(searched).sum() < errors(plain).sum()
    if scheme is W4_BLOCK32:
        assert (errors(searched) / errors(plain)).mean() < 0.95


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{s.bits}")
def test_gptq_beats_searched_scales_beat_rounding_on_correlated_inputs(scheme: Scheme) -> None:
    weight_NK, moment_KK = weight_and_moment()
    rounded = output_error(weight_NK, quantize(weight_NK, scheme), moment_KK)
    scales = search_scales(weight_NK, scheme, moment_KK.diagonal())
    searched = output_error(weight_NK, quantize(weight_NK, scheme, scales), moment_KK)
    fed_forward = output_error(weight_NK, gptq(weight_NK, scheme, moment_KK), moment_KK)
    assert searched < rounded
    assert fed_forward < 0.8 * searched
    assert output_error(weight_NK, gptq(weight_NK, scheme, moment_KK, shrinkage=0), moment_KK) < 0.6 * searched


def test_gptq_of_unrelated_alike_inputs_rounds_to_nearest() -> None:
    weight_NK, _ = weight_and_moment(k=64)
    found = gptq(weight_NK, W4_BLOCK32, torch.eye(64))
    torch.testing.assert_close(found.scale, search_scales(weight_NK, W4_BLOCK32))
    assert torch.equal(found.codes, quantize(weight_NK, W4_BLOCK32, found.scale).codes)


def test_gptq_takes_channels_that_never_occur_and_a_part_filled_last_block() -> None:
    weight_NK, moment_KK = weight_and_moment(k=80)
    moment_KK[7], moment_KK[:, 7] = 0, 0
    found = gptq(weight_NK, W4_BLOCK32, moment_KK)
    assert found.shape == (48, 80)
    assert found.scale.shape == (48, 3)
    assert output_error(weight_NK, found, moment_KK) < 0.1
