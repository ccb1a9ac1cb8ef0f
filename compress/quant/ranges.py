"""Ranges of activations for `w8a8-static`: what is cut off, and what is rounded coarser for keeping it.

A histogram of each tensor is kept over symmetric bins whose width doubles whenever a value falls outside, so that one
pass over the text is enough. `percentile` and `entropy` are those of TensorRT's and ONNX Runtime's calibrators
(Migacz, 8-bit Inference with TensorRT, GTC 2017), for the 255 steps of an asymmetric uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.quant.calibrate import Range, Watcher
from compress.quant.options import Ranges
from compress.quant.rounding import activation_range

NUM_BINS = 8192
LEVELS = 255
PERCENTILE = 99.99
"""Of the values, so much is kept; half of the rest is cut off at either end."""
CANDIDATES = 96
"""Thresholds that `entropy` compares, from twice as many bins as levels to the largest value."""


class Histogram:
    """Counts of values in NUM_BINS bins over [−limit, limit], with the least and the greatest."""

    def __init__(self) -> None:
        self.low, self.high, self.limit = torch.tensor(0.0), torch.tensor(0.0), 0.0
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64)

    @property
    def centres(self) -> Tensor:
        """Of the bins."""
        return (torch.arange(NUM_BINS) + 0.5) * (2 * self.limit / NUM_BINS) - self.limit

    def add(self, x: Tensor) -> None:
        """Count values of any shape."""
        low, high = torch.aminmax(x)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        largest = max(-low.item(), high.item())
        self.limit = self.limit or largest
        while largest > self.limit:
            inner = self.counts.reshape(-1, 2).sum(1)
            self.counts = nn.functional.pad(inner, (NUM_BINS // 4, NUM_BINS // 4))
            self.limit *= 2
        if self.limit:
            self.counts += torch.histc(x.float(), NUM_BINS, -self.limit, self.limit)

    def ends(self, method: Ranges) -> tuple[Tensor, Tensor]:
        """(low, high) float32 scalars of the range that `method` keeps."""
        if method == "minmax" or not self.limit:
            return self.low, self.high
        low, high = self._percentile() if method == "percentile" else self._entropy()
        return torch.maximum(low, self.low), torch.minimum(high, self.high)

    def _percentile(self) -> tuple[Tensor, Tensor]:
        share = self.counts.cumsum(0) / self.counts.sum()
        tail = (100 - PERCENTILE) / 200
        ends = torch.searchsorted(share, torch.tensor([tail, 1 - tail], dtype=share.dtype)).clamp(max=NUM_BINS - 1)
        low, high = self.centres[ends]
        return low, high

    def _entropy(self) -> tuple[Tensor, Tensor]:
        """The threshold whose clipped and rounded distribution diverges least from what is there."""
        largest = torch.maximum(-self.low, self.high)
        least = LEVELS * 2 * self.limit / NUM_BINS
        thresholds = torch.linspace(min(least, largest.item()), largest.item(), CANDIDATES)
        divergences = torch.stack([self._divergence(threshold) for threshold in thresholds])
        best = thresholds[divergences.argmin()]
        return -best, best

    def _divergence(self, threshold: Tensor) -> Tensor:
        """KL(P ‖ Q) of the values clipped to ±threshold and the same spread over the bins of each level."""
        low, high = torch.maximum(-threshold, self.low), torch.minimum(threshold, self.high)
        scale, zero_point = activation_range(low, high)
        levels = (torch.round(self.centres / scale) + zero_point.float()).clamp(0, LEVELS).long()
        inside = (self.centres >= low) & (self.centres <= high)
        real = self.counts * inside
        first, last = inside.nonzero()[[0, -1], 0]
        clipped = real.clone()
        clipped[first] += self.counts[:first].sum()
        clipped[last] += self.counts[last + 1 :].sum()
        filled = (real > 0).double()
        mass, bins = (torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, levels, x) for x in (real, filled))
        spread = (mass / bins.clamp(min=1))[levels] * filled
        p, q = clipped / clipped.sum(), spread / spread.sum()
        return (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum()


class InputRanges(Watcher):
    """The range of each module's input, over all of the text."""

    def __init__(self, method: Ranges) -> None:
        super().__init__()
        self._method = method
        self._histograms: dict[nn.Module, Histogram] = {}

    def __getitem__(self, module: nn.Module) -> Range:
        return activation_range(*self._histograms[self._owner[module]].ends(self._method))

    def add(self, owner: nn.Module, x_RK: Tensor) -> None:
        self._histograms.setdefault(owner, Histogram()).add(x_RK)
