"""What the comparison with torch lets pass: differences beside the outputs' spread, rounding by what is rounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exporting import export, quantised
from safetensors.torch import load_file, save_file

from compress.errors import StageFailed
from compress.exports.onnx import attention, encoder, parity
from compress.quant.rounding import quantize
from compress.quant.schemes import SCHEMES
from pico import make_hybrid, make_pico

Pico = Callable[[str], Path]


def scaled(source: Path, out: Path, factor: float) -> Path:
    """The same model with logits of `factor` times the size."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_large_outputs_may_differ_by_more(pico: Pico, tmp_path: Path) -> None:
    figures = export(scaled(pico("llama"), tmp_path / "source", 1e4), tmp_path / "out")
    assert figures["parity_max_error"] > 1e-3
    assert figures["parity_relative_error"] < 1e-4
    assert figures["greedy_mismatches"] == 0
    assert figures["greedy_agreement"] == 1


def test_small_outputs_must_not_differ_by_as_much_as_they_are(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scaled(pico("llama"), tmp_path / "source", 1e-5)
    monkeypatch.setattr(attention, "scale", lambda model, layer: 0.2)
    with pytest.raises(StageFailed, match=r"of the outputs' spread, beyond parity_tolerance 0\.001"):
        export(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [("w4-block32", 0.15), ("w8-block32", 0.15), ("w2-block32", 0.3), ("ternary", 0.3), ("w8a8-dynamic", 0.5)],
)
def test_each_scheme_has_its_own_limit(scheme: str, limit: float) -> None:
    import torch

    def described(*names: str, **options: Any) -> Any:
        tensors = {name: quantize(torch.ones(8, 64), SCHEMES[name]) for name in names}
        return SimpleNamespace(tensors=tensors, **{"prompt": {}, "cache_scales": {}, **options})

    assert parity.rounding_limit(described(scheme)) == limit
    assert parity.rounding_limit(described("w4-block64", scheme)) == limit, "the widest of what is in the graph"
    prompt = described("w8a8-dynamic").tensors
    assert parity.rounding_limit(described("w4-block32", prompt={"q": prompt["w8a8-dynamic"]})) == 0.5
    assert parity.rounding_limit(described(cache_scales={0: None})) == 0.15


def test_rounding_beyond_the_limit_is_refused_and_what_agrees_is_said(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantised(pico("llama"), tmp_path / "q", SCHEMES["w4-block32"])
    figures = export(source, tmp_path / "out", "quantized")
    record = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert record["rounding_limit"] == 0.15
    assert 0 < record["rounded"]["relative_rms"] < record["rounding_limit"]
    assert figures["greedy_agreement"] == record["rounded"]["agreeing"] / 64
    monkeypatch.setitem(parity._LIMITS, "blocks", 1e-6)
    with pytest.raises(StageFailed, match="of their spread; the limit is 1e-06"):
        export(source, tmp_path / "refused", "quantized")


@pytest.mark.parametrize("model_type", ["bert", "hybrid"])
def test_an_encoders_rows_are_the_same_beside_longer_ones(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    source = pico("bert") if model_type == "bert" else make_hybrid("bert", tmp_path / "source", ("linear", None))
    assert "greedy_agreement" not in export(source, tmp_path / "out", fused=False)
    blind = lambda graph: graph.scalar(0.0)  # noqa: E731 (padding is attended to)
    monkeypatch.setattr(encoder, "_bias", blind)
    with pytest.raises(StageFailed, match="differs from torch by"):
        export(source, tmp_path / "refused", fused=False)


def test_the_padded_batch_has_special_tokens(pico: Pico) -> None:
    class Tokenizer:
        pad_token_id = None

        def __call__(self, text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
            return {"input_ids": [1, *range(20, 18 + max_length), 2]}

    from compress.models.load import load_model

    batch: Any = parity._expect_batch(load_model(pico("bert")), Tokenizer(), ["long", "short"], 60, None)  # type: ignore[arg-type]
    assert batch.feeds["input_ids"].shape == batch.feeds["attention_mask"].shape == (2, 60)
    assert batch.feeds["attention_mask"].sum(1).tolist() == [60, 6]
    assert batch.feeds["input_ids"][1].tolist() == [1, 20, 21, 22, 23, 2, *[0] * 54]
    assert [row.outputs["last_hidden_state"].shape[1] for row in batch.rows] == [60, 6]


@pytest.mark.parametrize("scheme", ["", "w4-block32"])
def test_two_labels_that_are_almost_the_same_are_no_spread(tmp_path: Path, scheme: str) -> None:
    source = make_pico("bert", tmp_path / "source", architecture="BertForSequenceClassification", num_labels=2)
    tensors = load_file(source / "model.safetensors")
    tensors["classifier.weight"][1] = tensors["classifier.weight"][0] * 1.00001
    tensors["classifier.bias"][:] = 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if scheme:
        source = quantised(source, tmp_path / "q", SCHEMES[scheme])
    figures = export(source, tmp_path / "out", "quantized" if scheme else "torch")
    assert figures["parity_relative_error"] < 1e-4


def test_outputs_that_are_all_the_same_have_a_spread() -> None:
    assert parity._spread(np.array([[2.0]])) == 2
    assert parity._spread(np.zeros((1, 3))) == 1
    assert parity._spread(np.tile([3.0, 5.0], 50)) == 1
