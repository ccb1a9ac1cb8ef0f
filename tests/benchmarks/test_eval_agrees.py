"""`evaluate` of quantised weights in torch and of their export: the same figures, within the runtime's rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.pipeline.check import valid_pipeline
from compress.report.figures import figures_of
from compress.runner.run import run_pipeline
from compress.stage import Reporter


@pytest.mark.parametrize(
    ("scheme", "tolerance"), [("w4-block32", 1e-3), ("w8-block32", 1e-3), ("w8a8-static", 1e-3), ("w8a8-dynamic", 1e-2)]
)
def test_torch_and_onnx_agree(scheme: str, tolerance: float, pico: Callable[[str], Path], tmp_path: Path) -> None:
    """With w8a8-dynamic an extreme that falls to the other side of a code moves the range of a whole tensor."""
    own = {"tokens": 256, "sequence_length": 64} if scheme.startswith("w8a8") else {}
    measure = {"evaluate": {"tokens": 512, "sequence_length": 64}}
    content = {
        "name": "p", "model": str(pico("llama")), "data": {"train": "python-docs"},
        "target": {"threads": 1},
        "stages": [{"quantize": {"scheme": scheme, "method": "rtn", **own}}, measure, "export-onnx", measure],
    }  # fmt: skip
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(content))
    record = run_pipeline(valid_pipeline(file), runs=tmp_path, reporter=Reporter(), twin=False)
    torch, onnx = figures_of(record)["quantize"], figures_of(record)["export-onnx"]
    assert onnx["perplexity"] == pytest.approx(torch["perplexity"], rel=tolerance)
    assert onnx["kl"] == pytest.approx(torch["kl"], rel=20 * tolerance)
    assert torch["kl"] > 1e-4, "there is something to agree on"
    files = (tmp_path / "p" / record.stage(id_).directory / "evaluation.json" for id_ in ("evaluate", "evaluate-2"))
    ours_N, theirs_N = (np.array(json.loads(file.read_text())["blocks"]["nll"]) for file in files)
    assert np.median(np.abs(ours_N / theirs_N - 1)) < 1e-4, "most blocks are the same"
