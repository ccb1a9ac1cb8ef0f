"""Which schemes give a row the same logits in any batch, as the README says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporting import export, quantised

from compress.quant.schemes import SCHEMES
from compress.runtime.session import OnnxModel

Pico = Callable[[str], Path]


@pytest.mark.parametrize(
    ("scheme", "depends"), [("w8a8-dynamic", True), ("w8a8-static", False), ("w4-block32", False)]
)
def test_only_one_scale_a_call_makes_a_row_depend_on_its_batch(
    pico: Pico, tmp_path: Path, scheme: str, depends: bool
) -> None:
    quantised(pico("llama"), tmp_path / "quantised", SCHEMES[scheme], reduce_range=True)
    export(tmp_path / "quantised", tmp_path / "out", "quantized", chunk_size=None)
    model = OnnxModel(tmp_path / "out", threads=1)
    rows = np.random.default_rng(0).integers(10, 500, (4, 24))
    (alone, _), (together, _) = model.forward(rows[:1]), model.forward(rows)
    difference = np.abs(together[:1] - alone).max()
    assert (difference > 1e-3) == depends
