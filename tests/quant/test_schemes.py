"""Codes, scales and their packing."""

from __future__ import annotations

import pytest
import torch

from compress.quant.qtensor import QTensor
from compress.quant.schemes import SCHEMES, W4_BLOCK32, W8_DYNAMIC, Scheme, fake_quant, quantize, round_activations

EVERY = [*SCHEMES.values(), W8_DYNAMIC.reduced]


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: f"{s.name}-{s.bits}")
@pytest.mark.parametrize("k", [64, 80, 96])
def test_an_entry_is_off_by_half_a_step_at_most(scheme: Scheme, k: int) -> None:
    weight_NK = random_weight(6, k)
    weight_NK[0] = 0.0
    found = quantize(weight_NK, scheme)
    step_NK = found.scale.abs().repeat_interleave(scheme.block_size or k, 1)[:, :k]
    error_NK = (found.dequantize() - weight_NK).abs()
    # of a symmetric block-wise scale, the side opposite the extreme is one step short
    assert (error_NK <= step_NK * (0.5001 if scheme.dynamic else 1.0001)).all()
    assert (error_NK[0] == 0).all()
    assert found.codes.min() >= scheme.limits[0]
    assert found.codes.max() <= scheme.limits[1]


def test_the_largest_entry_is_kept_exactly_whatever_its_sign() -> None:
    weight_NK = torch.linspace(-1, 0.3, 32)[None].repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    found = quantize(weight_NK, W4_BLOCK32)
    torch.testing.assert_close(found.dequantize()[:, 0], weight_NK[:, 0])
    assert found.codes[:, 0].tolist() == [0, 0]
    assert found.scale[0, 0] > 0 > found.scale[1, 0]


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: f"{s.name}-{s.bits}")
@pytest.mark.parametrize("k", [64, 80, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpacking_undoes_packing(scheme: Scheme, k: int, symmetric: bool) -> None:
    found = quantize(random_weight(5, k), scheme, symmetric=symmetric)
    again = QTensor.unpack(found.pack(), scheme, k)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.dequantize(), found.dequantize())
    bits = sum(8 * part.nbytes for part in found.pack().values()) / found.codes.numel()
    if symmetric or scheme.dynamic:
        assert bits == pytest.approx(scheme.bits_per_weight(k))


def test_four_bit_codes_lie_low_nibble_first() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    packed = QTensor(codes, torch.ones(1, 1), None, W4_BLOCK32).pack()["codes"]
    assert packed.shape == (1, 1, 16)
    assert packed[0, 0, :2].tolist() == [0x10, 0x32]


def test_unpacking_refuses_what_does_not_fit() -> None:
    stored = quantize(random_weight(4, 64), W4_BLOCK32).pack()
    with pytest.raises(ValueError, match="are no w4-block32 of 96"):
        QTensor.unpack(stored, W4_BLOCK32, 96)


def test_split_rows_are_the_rows() -> None:
    weight_NK = random_weight(7, 64)
    whole = quantize(weight_NK, W4_BLOCK32, symmetric=False)
    parts = whole.split([3, 4])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: f"{s.name}-{s.bits}")
def test_fake_quant_is_quantize_with_a_straight_gradient(scheme: Scheme) -> None:
    weight_NK = random_weight(4, 64).requires_grad_()
    faked = fake_quant(weight_NK, scheme)
    torch.testing.assert_close(faked, quantize(weight_NK.detach(), scheme).dequantize(), rtol=0, atol=1e-6)
    (faked * 3).sum().backward()
    assert torch.equal(weight_NK.grad, torch.full_like(weight_NK, 3))


def test_zero_activations_stay_zero() -> None:
    for scheme in EVERY:
        assert (round_activations(torch.zeros(2, 3, 64), scheme, accuracy_level=4) == 0).all()
