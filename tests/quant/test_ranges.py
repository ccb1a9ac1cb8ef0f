"""Ranges of activations, against what NumPy finds in all of the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.quant.ranges import NUM_BINS, Histogram, InputRanges
from compress.quant.rounding import round_activations
from compress.quant.schemes import W8A8_STATIC


def filled(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def heavy_tailed() -> torch.Tensor:
    """A million values around 0, a few of them far out on the right."""
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    values[:20] = torch.linspace(50.0, 100.0, 20)
    return values


def test_minmax_is_the_ends_of_all_batches() -> None:
    low, high = filled(torch.tensor([0.5, -1.0]), torch.tensor([3.0, 2.0])).ends("minmax")
    assert (low.item(), high.item()) == (-1.0, 3.0)


def test_bins_grow_with_the_values_and_keep_their_counts() -> None:
    batches = [torch.full((10,), 0.1), torch.full((7,), -0.35), torch.full((3,), 1.0)]
    histogram = filled(*batches)
    assert histogram.limit == pytest.approx(1.6)
    assert histogram.counts.sum() == 20
    for value, count in ((0.1, 10), (-0.35, 7), (1.0, 3)):
        near = (histogram.centres - value).abs() <= 2 * histogram.limit / NUM_BINS
        assert histogram.counts[near].sum() == count


def test_percentile_is_numpys() -> None:
    values = heavy_tailed()
    found = filled(*values.split(100_000)).ends("percentile")
    expected = np.quantile(values.numpy(), [0.00005, 0.99995])
    assert [end.item() for end in found] == pytest.approx(expected, abs=2 * 2 * 128 / NUM_BINS)
    assert found[1] < 10, "the 20 large ones are less than half of the share that is cut off"


def test_entropy_cuts_outliers_off_and_leaves_uniform_values_alone() -> None:
    low, high = filled(heavy_tailed()).ends("entropy")
    assert 3 < high < 20
    assert -high <= low < -3
    uniform = torch.linspace(-1.0, 1.0, 200_000)
    assert filled(uniform).ends("entropy")[1] == pytest.approx(1.0, abs=0.02)


def test_an_input_that_is_always_zero_has_a_range() -> None:
    for method in ("minmax", "percentile", "entropy"):
        assert filled(torch.zeros(8)).ends(method) == (0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_a_range_rounds_what_it_keeps_by_half_a_step(method: str) -> None:
    module, x_RK = torch.nn.Identity(), torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 1.0
    ranges = InputRanges(method)  # type: ignore[arg-type]
    with ranges.watching([module]):
        module(x_RK)
    scale, zero_point = ranges[module]
    assert zero_point.dtype == torch.uint8
    kept = (x_RK >= -zero_point.float() * scale) & (x_RK <= (255 - zero_point.float()) * scale)
    assert kept.float().mean() > 0.98
    error_RK = (round_activations(x_RK, W8A8_STATIC, input_range=(scale, zero_point)) - x_RK).abs()
    assert error_RK[kept].max() <= scale / 2 * 1.001
