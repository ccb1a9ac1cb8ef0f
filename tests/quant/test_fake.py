"""Fake quantisation: the forward pass is the codes' arithmetic to the bit, the gradients are LSQ's and LSQ+'s."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.quant import fake
from compress.quant.fake import fake_quant, inside_cells, straight_through
from compress.quant.rounding import quantize, round_activations, round_to_nearest
from compress.quant.schemes import SCHEMES, W4_BLOCK32, Scheme
from compress.quant.search import search_scales
from compress.quant.trained import ACTIVATIONS

BLOCKWISE = [scheme for scheme in SCHEMES.values() if scheme.blockwise]
ASYMMETRIC = [scheme.asymmetric for scheme in BLOCKWISE if not scheme.ternary]
ROWS = [SCHEMES["w8a8-dynamic"], SCHEMES["w8a8-static"].reduced]


def weights(n: int = 12, k: int = 144, seed: int = 0) -> Tensor:
    """A last block that is part-filled, whatever the scheme; some weights are beyond the range that is used below."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def ranges(scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales of either sign that clip some weights, and zero points between codes, some of them beyond the codes."""
    scale, zero = round_to_nearest(weights(), scheme)
    if zero is None:
        return 0.7 * scale, None
    jitter = torch.rand(zero.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return 0.7 * scale, zero.float() + 1.6 * jitter


def naive(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The same in plain autograd, one step after another, nothing chunked."""

    def nearest(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    low, high = scheme.limits
    block = scheme.block_size or weight.shape[1]
    whole_zero = torch.tensor(float(scheme.midpoint))
    if zero is not None:
        whole_zero = (zero + (zero.round().clamp(low, high) - zero).detach()).repeat_interleave(block, 1)
        whole_zero = whole_zero[:, : weight.shape[1]]
    each = scale.repeat_interleave(block, 1)[:, : weight.shape[1]]
    return ((nearest(weight / each) + whole_zero).clamp(low, high) - whole_zero) * each


@pytest.mark.parametrize("scheme", BLOCKWISE + ASYMMETRIC + ROWS, ids=lambda s: f"{s.name}-{s.symmetric}-{s.bits}")
def test_forward_is_what_is_stored_to_the_bit(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, zero = ranges(scheme)
    stored = quantize(weights(), scheme, scale, None if zero is None else fake.whole_codes(zero, scheme).byte())
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(fake, "_CHUNK", chunk)
        assert torch.equal(fake_quant(weights(), scale, zero, scheme), stored.dequantize())
    half = fake_quant(weights(), scale, zero, scheme, torch.bfloat16)
    assert torch.equal(half, stored.dequantize().bfloat16())
    assert torch.equal(fake_quant(stored.codes, scale, zero, scheme), stored.dequantize()), "codes stay as they are"


@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["w4-block32"], SCHEMES["w2-block16"].asymmetric, SCHEMES["ternary"], SCHEMES["w8a8-dynamic"], ACTIVATIONS],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_gradients_are_those_of_lsq(scheme: Scheme, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "_CHUNK", chunk)
    given = weights(seed=2)
    found = []
    for function in (fake_quant, naive):
        scale, zero = ranges(scheme)
        inputs = [tensor.clone().requires_grad_() for tensor in (weights(), scale, zero) if tensor is not None]
        function(*inputs, *([None] if zero is None else []), scheme).backward(given)
        found.append([tensor.grad for tensor in inputs])
    ours, expected = found
    levels = scheme.limits[1] - (scheme.midpoint if scheme.symmetric else 0)
    levels = max(levels, scheme.midpoint - scheme.limits[0]) if scheme.symmetric else levels
    share = 1 / math.sqrt((scheme.block_size or 144) * levels)
    assert torch.allclose(ours[0], expected[0], rtol=1e-5)
    assert torch.equal(ours[0], given.where(expected[0] != 0, 0.0))
    assert 0 < (ours[0] == 0).float().mean() < 0.9, "some are clipped, not all"
    assert torch.allclose(ours[1], share * expected[1], rtol=1e-4, atol=1e-5)
    if len(ours) > 2:
        assert ours[2].abs().max() > 0
        assert torch.allclose(ours[2], share * expected[2], rtol=1e-4, atol=1e-6)


def test_only_what_is_learnt_gets_a_gradient() -> None:
    scale, _ = ranges(W4_BLOCK32)
    codes = quantize(weights(), W4_BLOCK32, scale).codes
    learnt = scale.clone().requires_grad_()
    fake_quant(codes, learnt, None, W4_BLOCK32).sum().backward()
    expected = scale.clone().requires_grad_()
    each = expected.repeat_interleave(32, 1)[:, :144]
    ((codes.float() - 8) * each).sum().backward()
    assert learnt.grad is not None
    assert expected.grad is not None
    assert torch.allclose(learnt.grad, expected.grad / math.sqrt(32 * 8), atol=1e-5)
    weight = weights().requires_grad_()
    fake_quant(weight, scale, None, W4_BLOCK32, torch.bfloat16).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_start_keeps_the_codes_and_all_that_they_allow_of_the_weights() -> None:
    for scheme in (W4_BLOCK32, W4_BLOCK32.asymmetric, SCHEMES["ternary"], SCHEMES["w8a8-dynamic"]):
        rounded = quantize(weights(), scheme)
        assert torch.equal(inside_cells(weights(), rounded), weights()), "as they were where codes are the nearest"
        other = quantize(weights() + 0.3 * weights(seed=3), scheme, rounded.scale, rounded.zero_point)
        start = inside_cells(weights(), other)
        assert torch.equal(quantize(start, scheme, other.scale, other.zero_point).codes, other.codes)
        moved = start != weights()
        assert 0 < moved.float().mean() < 1
        assert ((start - weights()).abs() < (other.dequantize() - weights()).abs())[moved].all()


def test_a_searched_grid_is_a_start() -> None:
    found = search_scales(weights(), SCHEMES["w2-block32"].asymmetric)
    assert torch.equal(fake_quant(inside_cells(weights(), found), found.scale, found.zero_point.float(), found.scheme),
                       found.dequantize())  # fmt: skip


def test_static_activations_are_one_row() -> None:
    x, scale, zero = 3 * weights(), torch.tensor([[0.02]]), torch.tensor([[130.0]])
    expected = round_activations(x, SCHEMES["w8a8-static"], input_range=(scale[0, 0], zero[0, 0].byte()))
    assert torch.equal(fake_quant(x.reshape(1, -1), scale, zero, ACTIVATIONS).view(x.shape), expected)


def test_straight_through() -> None:
    x = weights().requires_grad_()
    rounded = straight_through(x, x.detach().round())
    (rounded * weights(seed=1)).sum().backward()
    assert torch.equal(rounded, x.detach().round())
    assert torch.equal(x.grad, weights(seed=1)) if x.grad is not None else False
