"""Codes, scales and their packing."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quant.choice import MixedSchemes, matches
from compress.quant.qtensor import QTensor
from compress.quant.rounding import activation_range, quantize, round_activations, round_to_nearest
from compress.quant.schemes import (
    SCHEMES,
    TERNARY,
    W4_BLOCK32,
    W8_BLOCK32,
    W8A8_DYNAMIC,
    W8A8_STATIC,
    Scheme,
    SchemeName,
    not_gathered,
)

BLOCKWISE = [scheme for scheme in SCHEMES.values() if scheme.blockwise]
EVERY = [
    *SCHEMES.values(),
    *(scheme.asymmetric for scheme in BLOCKWISE if not scheme.ternary),
    W8A8_DYNAMIC.reduced,
    W8A8_STATIC.reduced,
]


def label(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.bits}" + ("" if scheme.symmetric else "-asymmetric")


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def with_range(found: QTensor) -> QTensor:
    """`found` as it can be stored: a static scheme has a range of activations."""
    if not found.scheme.static:
        return found
    scale, zero = activation_range(torch.tensor(-1.0), torch.tensor(3.0))
    return replace(found, input_scale=scale, input_zero_point=zero)


def test_the_names_that_options_take_are_the_schemes() -> None:
    assert set(get_args(SchemeName)) == set(SCHEMES)
    assert all(scheme.name == name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("scheme", EVERY, ids=label)
@pytest.mark.parametrize("k", [128, 200])
def test_an_entry_is_off_by_half_a_step_at_most(scheme: Scheme, k: int) -> None:
    weight_NK = random_weight(6, k)
    weight_NK[0] = 0.0
    found = quantize(weight_NK, scheme)
    step_NK = found.scale.abs().repeat_interleave(scheme.block_size or k, 1)[:, :k]
    error_NK = (found.dequantize() - weight_NK).abs()
    low, high = (bound - scheme.midpoint for bound in scheme.limits)
    representable = (weight_NK / step_NK).clamp(low, high) * step_NK
    # of a symmetric block-wise scale, the side opposite the extreme is one step short
    nearest = 0.5001 if not scheme.blockwise else 1.0001
    if scheme.ternary:  # what is beyond the scale is clipped to it
        assert ((found.dequantize() - representable).abs() <= step_NK * 0.5001).all()
    else:
        assert (error_NK <= step_NK * nearest).all()
    assert (error_NK[0] == 0).all()
    assert found.codes.min() >= scheme.limits[0]
    assert found.codes.max() <= scheme.limits[1]


def test_the_largest_entry_is_kept_exactly_whatever_its_sign() -> None:
    weight_NK = torch.linspace(-1, 0.3, 32)[None].repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    for scheme in (W4_BLOCK32, SCHEMES["w2-block32"]):
        found = quantize(weight_NK, scheme)
        torch.testing.assert_close(found.dequantize()[:, 0], weight_NK[:, 0])
        assert found.codes[:, 0].tolist() == [0, 0]
        assert found.scale[0, 0] > 0 > found.scale[1, 0]


def test_zero_points_hold_what_lies_on_one_side() -> None:
    weight_NK = 2 + random_weight(8, 64).abs()
    for bits in (2, 4, 8):
        scheme = SCHEMES[f"w{bits}-block32"]
        error, lopsided = (
            (quantize(weight_NK, own).dequantize() - weight_NK).square().mean() for own in (scheme.asymmetric, scheme)
        )
        assert error < lopsided
        assert quantize(-weight_NK, scheme.asymmetric).zero_point.eq(scheme.limits[1]).all()  # type: ignore[union-attr]


def test_a_ternary_scale_is_the_mean_of_what_is_large() -> None:
    """Against TWN's own words, one block after another; the last block is part-filled."""
    weight_NK = random_weight(3, 100) ** 3
    scale_NG, zero_points = round_to_nearest(weight_NK, TERNARY)
    assert zero_points is None
    for row, scales in zip(weight_NK, scale_NG, strict=True):
        for block, scale in zip(row.split(64), scales, strict=True):
            large = [abs(w) for w in block.tolist() if abs(w) > 0.7 * block.abs().mean().item()]
            assert scale.item() == pytest.approx(sum(large) / len(large), rel=1e-5)
    levels = (quantize(weight_NK, TERNARY).dequantize() / scale_NG.repeat_interleave(64, 1)[:, :100]).round()
    assert levels.unique().tolist() == [-1, 0, 1]


@settings(max_examples=200, deadline=None)
@given(scheme=st.sampled_from(EVERY), n=st.integers(1, 5), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(scheme: Scheme, n: int, k: int, seed: int) -> None:
    found = with_range(quantize(random_weight(n, k, seed), scheme))
    packed = found.pack()
    again = QTensor.unpack(packed, scheme, k)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.dequantize(), found.dequantize())
    assert again.input_range == found.input_range
    bits = sum(8 * part.nbytes for name, part in packed.items() if "input" not in name) / found.codes.numel()
    assert bits == pytest.approx(scheme.bits_per_weight(k))


@pytest.mark.parametrize("scheme", [s for s in EVERY if s.blockwise], ids=label)
def test_padding_is_zero_weights(scheme: Scheme) -> None:
    k, padded = scheme.block_size + 3, 2 * scheme.block_size
    whole = QTensor.unpack(quantize(random_weight(4, k), scheme).pack(), scheme, padded).dequantize()
    assert (whole[:, k:] == 0).all()
    assert (whole[:, :k] != 0).any()


def test_codes_of_less_than_a_byte_lie_lowest_first() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None]
    packed = QTensor(codes % 16, torch.ones(1, 1), None, W4_BLOCK32).pack()["codes"]
    assert packed.shape == (1, 1, 16)
    assert packed[0, 0, :2].tolist() == [0x10, 0x32]
    packed = QTensor(codes % 4, torch.ones(1, 1), None, SCHEMES["w2-block32"]).pack()["codes"]
    assert packed.shape == (1, 1, 8)
    assert packed[0, 0].tolist() == [0b11100100] * 8


def test_unpacking_refuses_what_does_not_fit() -> None:
    stored = quantize(random_weight(4, 64), W4_BLOCK32).pack()
    with pytest.raises(ValueError, match="are no w4-block32 of 96"):
        QTensor.unpack(stored, W4_BLOCK32, 96)
    with pytest.raises(ValueError, match="zero points expected"):
        QTensor.unpack(stored, W4_BLOCK32.asymmetric, 64)
    static = with_range(quantize(random_weight(4, 64), W8A8_STATIC)).pack()
    del static["input_scale"]
    with pytest.raises(ValueError, match="activations have no range"):
        QTensor.unpack(static, W8A8_STATIC, 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(value: float) -> None:
    found = quantize(random_weight(4, 64), W4_BLOCK32)
    scale_NG = found.scale.clone()
    scale_NG[2, 1] = value
    with pytest.raises(ValueError, match="1 scales are NaN or infinite"):
        replace(found, scale=scale_NG)
    weight_NK = random_weight(4, 64)
    weight_NK[1, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight_NK, W4_BLOCK32)
    static = quantize(random_weight(4, 64), W8A8_STATIC)
    with pytest.raises(ValueError, match="input's scale"):
        replace(static, input_scale=torch.tensor(value), input_zero_point=torch.tensor(0, dtype=torch.uint8))


def test_zero_points_belong_to_asymmetric_schemes_only() -> None:
    weight_NK, zeros = random_weight(4, 64), torch.full((4, 2), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no zero points expected"):
        quantize(weight_NK, W4_BLOCK32, torch.ones(4, 2), zeros)
    with pytest.raises(ValueError, match="zero points expected"):
        quantize(weight_NK, W4_BLOCK32.asymmetric, torch.ones(4, 2))
    for scheme in (TERNARY, W8A8_DYNAMIC, W8A8_STATIC):
        with pytest.raises(ValueError, match="have no zero points"):
            _ = scheme.asymmetric
    with pytest.raises(ValueError, match="no reduced range"):
        _ = W8_BLOCK32.reduced


def test_split_rows_are_the_rows() -> None:
    for scheme in (W4_BLOCK32.asymmetric, W8A8_STATIC):
        whole = with_range(quantize(random_weight(7, 64), scheme))
        parts = whole.split([3, 4])
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
        assert all(part.input_range == whole.input_range for part in parts)


def test_zero_activations_stay_zero() -> None:
    nowhere = activation_range(torch.tensor(0.0), torch.tensor(0.0))
    for scheme in EVERY:
        assert (round_activations(torch.zeros(2, 3, 64), scheme, accuracy_level=4, input_range=nowhere) == 0).all()


def test_static_activations_are_clipped_to_their_range() -> None:
    scale, zero = activation_range(torch.tensor(-1.0), torch.tensor(3.0))
    rounded = round_activations(torch.tensor([-9.0, 0.0, 1.0, 9.0]), W8A8_STATIC, input_range=(scale, zero))
    torch.testing.assert_close(rounded, torch.tensor([-1.0, 0.0, 1.0, 3.0]), rtol=0, atol=scale.item())
    assert rounded[1] == 0
    assert (scale.dtype, zero.dtype, zero.item()) == (torch.float32, torch.uint8, 64)
    with pytest.raises(ValueError, match="w8a8-static activations have no range"):
        round_activations(rounded, W8A8_STATIC)


def test_what_goes_with_a_scheme() -> None:
    names = {name: scheme.table.name for name, scheme in SCHEMES.items()}
    assert {names[f"w2-block{size}"] for size in (16, 32, 64, 128)} == {f"w4-block{s}" for s in (16, 32, 64, 128)}
    assert names["ternary"] == "w4-block64"
    assert names["w8a8-dynamic"] == names["w8a8-static"] == "w8-block32"
    assert all(names[name] == name for name in names if name.startswith(("w4", "w8-")))
    assert not SCHEMES["w2-block64"].asymmetric.table.symmetric


@pytest.mark.parametrize("scheme", [s for s in EVERY if s.blockwise], ids=label)
def test_blocks_that_fill_a_row(scheme: Scheme) -> None:
    assert scheme.filling(1024) == scheme
    assert scheme.filling(40) == scheme  # its last block is filled up
    narrower = scheme.filling(576)
    assert 576 % narrower.block_size == 0
    assert narrower == scheme or (narrower.block_size, scheme.block_size) == (64, 128)
    assert (narrower.bits, narrower.symmetric) == (scheme.bits, scheme.symmetric)


def test_what_the_runtime_does_not_gather() -> None:
    assert not_gathered(W4_BLOCK32) is None
    assert "has no per-channel weights" in str(not_gathered(W8A8_DYNAMIC))


def test_a_mixed_choice() -> None:
    mixed = MixedSchemes(W8A8_DYNAMIC, {"layers.0.mlp.*": None, "mlp.down_proj": W8_BLOCK32}, head=W4_BLOCK32)
    assert mixed.of("model.layers.0.mlp.down_proj.weight", "projection") is None
    assert mixed.of("model.layers.1.mlp.down_proj.weight", "projection") == W8_BLOCK32
    assert mixed.of("model.layers.10.mlp.up_proj.weight", "projection") == W8A8_DYNAMIC
    assert mixed.of("model.embed_tokens.weight", "embedding") == W8_BLOCK32
    assert mixed.of("lm_head.weight", "head") == W4_BLOCK32
    assert MixedSchemes(W4_BLOCK32, embeddings=None).of("model.embed_tokens.weight", "embedding") is None
    assert TERNARY.of("model.layers.0.mlp.up_proj.weight", "projection") == TERNARY
    assert TERNARY.of("lm_head.weight", "head") == SCHEMES["w4-block64"]
    assert matches("model.layers.0.self_attn.q_proj", "q_proj")
    assert not matches("model.layers.0.mlp.up_proj", "p_proj"), "an end begins after a dot"
