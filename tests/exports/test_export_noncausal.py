"""Encoders with linear attention as ONNX graphs: equal to torch in every format, padded on either side or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from exporting import export, operators, quantised, rounded

from compress.mixers.spec import SPECS
from compress.models.convert import to_hybrid
from compress.models.load import load_model, save_model
from compress.models.parts import Parts
from compress.quant.schemes import SCHEMES
from compress.quant.store import load_quantized_model
from compress.runtime.session import OnnxModel
from pico import make_pico

NUM_LAYERS = 3


def hybrid(folder: Path, linear: tuple[int, ...] = (0, 2), architecture: str = "BertModel") -> Path:
    """A converted pico with feature maps away from their start."""
    source = make_pico("bert", folder / "source", num_hidden_layers=NUM_LAYERS, architecture=architecture)
    specs = [SPECS["linear"] if layer in linear else None for layer in range(NUM_LAYERS)]
    model = to_hybrid(load_model(source), specs)
    with torch.no_grad():
        for layer in linear:
            mixer = cast(Any, Parts(model).layers[layer]).attention.self
            for feature_map in (mixer.feature_map_q, mixer.feature_map_k):
                feature_map.weight.add_(torch.randn_like(feature_map.weight), alpha=0.3)
    save_model(model, source, folder / "hybrid")
    return folder / "hybrid"


def encoder(source: Path, out: Path, kind: str = "torch", **options: Any) -> OnnxModel:
    assert export(source, out, kind, **options)["parity_max_error"] < 1e-4
    return OnnxModel(out, threads=1)


def padded() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    ids, mask = np.arange(60, 60 + 3 * 17).reshape(3, 17), np.ones((3, 17), np.int64)
    mask[1, 5:] = mask[2, :12] = 0
    return ids, mask


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("linear", [(0, 2), (0, 1, 2), ()])
def test_fp32_is_what_torch_computes_padded_on_either_side(
    tmp_path: Path, linear: tuple[int, ...], fused: bool
) -> None:
    source = hybrid(tmp_path, linear)
    onnx_model = encoder(source, tmp_path / "out", fused=fused)
    ids, mask = padded()
    model: Any = load_model(source)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    actual = onnx_model.encode(ids, mask)["last_hidden_state"]
    kept = mask.astype(bool)
    np.testing.assert_allclose(actual[kept], expected.last_hidden_state.numpy()[kept], atol=1e-4)
    alone = onnx_model.encode(ids[1:2, :5])["last_hidden_state"][0]
    np.testing.assert_allclose(actual[1, :5], alone, atol=1e-4)
    nodes = operators(tmp_path / "out")
    assert nodes.count(("com.microsoft", "MultiHeadAttention")) == (NUM_LAYERS - len(linear) if fused else 0)
    assert fused or {domain for domain, _ in nodes} == {""}
    stored = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    assert not any("feature_map" in tensor.name for tensor in stored)  # folded into the projections


@pytest.mark.parametrize("scheme", ["w4-block32", "w8-block32", "w8a8-dynamic"])
def test_quantised(tmp_path: Path, scheme: str) -> None:
    source = quantised(hybrid(tmp_path), tmp_path / "q", SCHEMES[scheme])
    onnx_model = encoder(source, tmp_path / "out", "quantized")
    assert rounded(tmp_path / "out")["relative_rms"] < 0.1
    kinds = [kind for _, kind in operators(tmp_path / "out")]
    assert ("DynamicQuantizeMatMul" if scheme == "w8a8-dynamic" else "MatMulNBits") in kinds
    if scheme != "w8a8-dynamic":  # torch rounds activations as MatMulNBits does
        ids, mask = padded()
        model: Any = load_quantized_model(source, accuracy_level=4)
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        kept = mask.astype(bool)
        actual = onnx_model.encode(ids, mask)["last_hidden_state"][kept]
        assert np.square(actual - expected.last_hidden_state.numpy()[kept]).mean() < 1e-3


def test_int8_has_standard_operators_only(tmp_path: Path) -> None:
    source = quantised(hybrid(tmp_path), tmp_path / "q", SCHEMES["w8a8-dynamic"])
    encoder(source, tmp_path / "out", "quantized", fused=False)
    assert {domain for domain, _ in operators(tmp_path / "out")} == {""}


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]
)
def test_every_head(tmp_path: Path, architecture: str) -> None:
    assert encoder(hybrid(tmp_path, architecture=architecture), tmp_path / "out").outputs == ("logits",)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "hybrid_bert"
