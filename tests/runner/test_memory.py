"""The peak memory that a report gives a stage is that stage's own, also where Linux's mark can't be reset."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import numpy as np
import pytest

from compress import hardware
from compress.hardware import PeakMemory

MB = 150


def peaks() -> tuple[float, float]:
    """MB of a block that holds MB more for a while, and of one after it that does not."""
    with PeakMemory() as first:
        held = np.ones(MB * 1_000_000, np.uint8)
        sleep(3 * hardware.SAMPLE_SECONDS)
        del held
        high = first.peak_mb()
    with PeakMemory() as second:
        sleep(3 * hardware.SAMPLE_SECONDS)
        return high, second.peak_mb()


@pytest.mark.parametrize("can_reset", [True, False])
def test_a_stage_is_not_told_the_peak_of_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_reset: bool
) -> None:
    if not can_reset:
        monkeypatch.setattr(hardware, "_RESET", tmp_path)  # a directory: writing it is an OSError
    high, low = peaks()
    assert high - low > 0.8 * MB
    assert low > 10
