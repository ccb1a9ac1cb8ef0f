"""What reading a prompt in int8 costs is measured where it is read, and is nothing where nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import export, quantised

from compress.benchmarks.prompt_quality import judged, main, row
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.quant.schemes import SCHEMES
from compress.runtime.session import OnnxModel, call_sizes

TEXT: Any = TextData(DataConfig())
IDS_NT = np.random.default_rng(0).integers(20, 200, (3, 41))


def test_calls_are_of_that_size_and_the_rest() -> None:
    assert call_sizes(20, 8) == [8, 8, 4]
    assert call_sizes(16, 8) == [8, 8]
    assert call_sizes(0, 8) == []


def test_only_what_is_read_as_a_prompt_differs(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised(pico("llama"), tmp_path / "int4", SCHEMES["w4-block32"])
    export(tmp_path / "int4", tmp_path / "plain", "quantized")
    export(tmp_path / "int4", tmp_path / "int8", "quantized", data=TEXT, prompt="int8", prompt_exceptions=())
    for name, costs in (("plain", False), ("int8", True)):
        onnx = OnnxModel(tmp_path / name, threads=1)
        whole, after = (np.array(each) for each in judged(onnx, IDS_NT, num_prompt=24, chunk=24))
        assert whole.shape == after.shape == (3, 3)
        assert bool(np.abs(whole[:, 0]).max() > 1e-3) == costs
        assert bool(np.abs(after[:, 0]).max() > 1e-4) == costs
        assert (whole[:, 1:] > after[:, 1:]).all()
    main([str(tmp_path / "int8"), "--prompt", "24", "--new", "16", "--blocks", "2", "--threads", "1"])
    assert "the last 16, written behind a prompt of 24" in capsys.readouterr().out


def test_figures_are_means_a_token_with_their_errors() -> None:
    figures = [(1.0, 6.0, 5.0), (3.0, 8.0, 5.0)]
    assert row("x", figures, 10) == ("x", "0.2000 ± 0.1000", "1.2214 ± 0.1221")
