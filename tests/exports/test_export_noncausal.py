"""Encoders with linear attention as ONNX graphs: equal to torch in every format, padded on either side or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

from compress.artifact import Artifact
from compress.exports.onnx.stage import ExportOnnx
from compress.mixers.spec import SPECS
from compress.models.convert import to_hybrid
from compress.models.load import load_model, save_model
from compress.models.parts import Parts
from compress.quant.modules import weight_of
from compress.quant.schemes import SCHEMES, quantize
from compress.quant.store import load_quantized_model, save_quantized
from compress.quant.targets import all_targets
from compress.runtime.session import OnnxModel
from compress.stage import StageContext, Target
from pico import make_pico

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
NUM_LAYERS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pico matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def quantised(source: Path, out: Path, scheme_name: str) -> Path:
    out.mkdir()
    model, scheme = load_model(source), SCHEMES[scheme_name]
    targets = all_targets(Parts(model), scheme)
    tensors = {target.name: quantize(weight_of(target.module), target.scheme) for target in targets}
    save_quantized(model, tensors, scheme, source, out)
    return out


def export(source: Path, out: Path, kind: str = "torch", **options: Any) -> OnnxModel:
    out.mkdir()
    inputs = {"input": Artifact(source, kind, "test", "key")}  # type: ignore[arg-type]
    data: Any = None  # the stage reads none
    context = StageContext(out=out, work=out, inputs=inputs, data=data, seed=0, target=Target(threads=1))
    figures = ExportOnnx(**options).run(context)["result"]
    assert figures["parity_max_error"] < 1e-4
    return OnnxModel(out, threads=1)


def operators(folder: Path) -> list[tuple[str, str]]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [(node.domain, node.op_type) for node in graph.node]


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
    onnx_model = export(source, tmp_path / "out", fused=fused)
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


@pytest.mark.parametrize("scheme", ["w4-block32", "w8-block32", "w8-dynamic"])
def test_quantised(tmp_path: Path, scheme: str) -> None:
    source = quantised(hybrid(tmp_path), tmp_path / "q", scheme)
    onnx_model = export(source, tmp_path / "out", "quantized")
    rounded = json.loads((tmp_path / "out" / "parity.json").read_text())["rounded"]
    assert rounded["relative_rms"] < 0.1
    kinds = [kind for _, kind in operators(tmp_path / "out")]
    assert ("DynamicQuantizeMatMul" if scheme == "w8-dynamic" else "MatMulNBits") in kinds
    if scheme != "w8-dynamic":  # torch rounds activations as MatMulNBits does
        ids, mask = padded()
        model: Any = load_quantized_model(source, accuracy_level=4)
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        kept = mask.astype(bool)
        actual = onnx_model.encode(ids, mask)["last_hidden_state"][kept]
        assert np.square(actual - expected.last_hidden_state.numpy()[kept]).mean() < 1e-3


def test_int8_has_standard_operators_only(tmp_path: Path) -> None:
    source = quantised(hybrid(tmp_path), tmp_path / "q", "w8-dynamic")
    export(source, tmp_path / "out", "quantized", fused=False)
    assert {domain for domain, _ in operators(tmp_path / "out")} == {""}


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]
)
def test_every_head(tmp_path: Path, architecture: str) -> None:
    assert export(hybrid(tmp_path, architecture=architecture), tmp_path / "out").outputs == ("logits",)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "hybrid_bert"
