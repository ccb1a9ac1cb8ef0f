"""The grid that a block's weights are rounded to, by least error: a scale and, where there is one, a zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.qtensor import to_blocks
from compress.quant.rounding import round_to_nearest
from compress.quant.schemes import Scheme

CLIPS = (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10)
"""Candidates: the block's extreme over the outermost code, times these."""
LOW_BIT_CLIPS = (0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, *CLIPS)
"""The same where there are 4 codes or 3, which an extreme would take all for itself."""
NUM_REFITS = 2
CHUNK = 1 << 17
"""Weights searched at a time: the working set stays in the processor's cache."""


def search_grid(
    weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales (N, K_blocks), of either sign where symmetric, and zero points (uint8) or None, with the least
    Σ importance·(w − ŵ)² found in each block: never worse than round-to-nearest's.

    importance_K: per input channel, E[x²]; None counts all alike.
    """
    blocks_NGB = to_blocks(weight_NK.float(), scheme)
    n, g, b = blocks_NGB.shape
    importance_K = torch.ones(weight_NK.shape[1]) if importance_K is None else importance_K.float()
    importance_RB = to_blocks(importance_K[None], scheme).expand(n, g, b).reshape(-1, b)
    scale_NG, zero_NG = round_to_nearest(weight_NK, scheme)
    zero_NG = torch.full_like(scale_NG, scheme.midpoint) if zero_NG is None else zero_NG.float()
    rows = max(1, CHUNK // b)
    starts = (blocks_NGB.reshape(-1, b), importance_RB, scale_NG.flatten(), zero_NG.flatten())
    parts = zip(*(torch.split(each, rows) for each in starts), strict=True)
    found = [_Blocks(x, importance, scale, zero, scheme).search() for x, importance, scale, zero in parts]
    scale_NG = torch.cat([scale_R for scale_R, _ in found]).reshape(n, g)
    if scheme.symmetric:
        return scale_NG, None
    return scale_NG, torch.cat([zero_R for _, zero_R in found]).reshape(n, g).to(torch.uint8)


class _Blocks:
    """Blocks of weights (R, B) and the best grid of each so far."""

    def __init__(self, x_RB: Tensor, importance_RB: Tensor, scale_R: Tensor, zero_R: Tensor, scheme: Scheme) -> None:
        self.x_RB, self.importance_RB, self.scheme = x_RB, importance_RB, scheme
        self.scale_R, self.zero_R = scale_R, zero_R
        self.error_R = self._error(scale_R, zero_R)

    def search(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, both float (R,)."""
        clips = LOW_BIT_CLIPS if self.scheme.bits == 2 else CLIPS
        for start_R in self._starts():
            for clip in clips:
                self._offer(start_R * clip, self.zero_R)
        for _ in range(NUM_REFITS):
            self._refit() if self.scheme.symmetric else self._refit_both()
        return self.scale_R if self.scheme.blockwise else self.scale_R.abs(), self.zero_R

    def _starts(self) -> list[Tensor]:
        """Scales that put the extreme on the outermost code, on either side of a symmetric grid."""
        if not self.scheme.symmetric:
            return [self.scale_R]
        extreme_R = self.x_RB.gather(1, self.x_RB.abs().argmax(1, keepdim=True)).squeeze(1)
        low, high = (limit - self.scheme.midpoint for limit in self.scheme.limits)
        return [extreme_R / high] if low == -high else [extreme_R / low, extreme_R / high]

    def _refit(self) -> None:
        """Least squares of the scale, the codes given."""
        codes_RB = self._codes(self.scale_R, self.zero_R)
        weighted_RB = self.importance_RB * codes_RB
        self._offer((weighted_RB * self.x_RB).sum(1) / (weighted_RB * codes_RB).sum(1), self.zero_R)

    def _refit_both(self) -> None:
        """Least squares of scale and zero point, then of the scale for the integer that the zero point becomes."""
        codes_RB = self._codes(self.scale_R, self.zero_R) + self.zero_R[:, None]
        total_R = self.importance_RB.sum(1)
        mean_x, mean_code = ((self.importance_RB * each).sum(1) / total_R for each in (self.x_RB, codes_RB))
        off_RB = self.importance_RB * (codes_RB - mean_code[:, None])
        scale_R = (off_RB * self.x_RB).sum(1) / (off_RB * codes_RB).sum(1)
        zero_R = torch.round(mean_code - mean_x / scale_R).clamp_(*self.scheme.limits)
        self._offer(scale_R, zero_R.where(zero_R.isfinite(), self.zero_R))
        self._refit()

    def _codes(self, scale_R: Tensor, zero_R: Tensor) -> Tensor:
        """Codes (R, B) less their zero points."""
        rounded_RB = torch.round(self.x_RB / scale_R[:, None])
        low, high = self.scheme.limits
        if self.scheme.symmetric:
            return rounded_RB.clamp_(low - self.scheme.midpoint, high - self.scheme.midpoint)
        return rounded_RB.clamp_(low - zero_R[:, None], high - zero_R[:, None])

    def _error(self, scale_R: Tensor, zero_R: Tensor) -> Tensor:
        rounded_RB = self._codes(scale_R, zero_R).mul_(scale_R[:, None])
        return rounded_RB.sub_(self.x_RB).square_().mul_(self.importance_RB).sum(1)

    def _offer(self, scale_R: Tensor, zero_R: Tensor) -> None:
        """Take the grid wherever it is better than the best so far."""
        scale_R = scale_R.where(scale_R.isfinite() & (scale_R != 0), self.scale_R)
        error_R = self._error(scale_R, zero_R)
        better_R = error_R < self.error_R
        self.scale_R, self.zero_R = scale_R.where(better_R, self.scale_R), zero_R.where(better_R, self.zero_R)
        self.error_R = torch.minimum(error_R, self.error_R)
