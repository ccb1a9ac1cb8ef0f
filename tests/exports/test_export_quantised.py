"""Every scheme exported: the integers that are stored, to the bit, and what torch computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import export, genai_tokens, only_standard, operators, optimised, quantised, rounded
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file

from compress.errors import StageFailed
from compress.exports.onnx import operators as operators_module
from compress.exports.onnx.stage import ExportOnnx
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.quant.choice import MixedSchemes
from compress.quant.qtensor import QTensor
from compress.quant.schemes import SCHEMES
from compress.quant.store import load_quantized_model, read_quantized, save_quantized
from compress.runtime.session import OnnxModel
from pico import make_hybrid, make_pico

PROMPTS = np.random.default_rng(0).integers(1, 500, (7, 1, 4))
NUM_LAYERS = 2
W4, W8, TERNARY, DYNAMIC, STATIC = (
    SCHEMES[name] for name in ("w4-block32", "w8-block32", "ternary", "w8a8-dynamic", "w8a8-static")
)
SYMMETRIC = [(name, True) for name in SCHEMES]
ASYMMETRIC = [(name, False) for name, scheme in SCHEMES.items() if scheme.blockwise and not scheme.ternary]
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def picos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("picos")
    return {kind: make_pico(kind, folder / kind, num_hidden_layers=NUM_LAYERS) for kind in ("llama", "bert")}


def weights_of(folder: Path) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}


def found(stored: Arrays, weights: Arrays, name: str, source: Path) -> NDArray[Any]:
    """The initialiser of a stored tensor, or its rows of the [q; k; v] or [gate; up] that it stands in."""
    if name in weights:
        return weights[name]
    family = shape_of(json.loads((source / "config.json").read_text())).family
    stacks = {
        "qkv_proj": [family.attention.q, family.attention.k, family.attention.v],
        "mlp.gate_up_proj": [family.mlp.gate, family.mlp.up],
    }
    within = ((stack, leaf, leaves) for stack, leaves in stacks.items() for leaf in leaves)
    stack, leaf, leaves = next(each for each in within if f".{each[1]}.weight." in name)
    first = sum(len(stored[name.replace(leaf, other)]) for other in leaves[: leaves.index(leaf)])
    whole = weights[name.replace(leaf, stack)]
    axis = 1 if whole.dtype == np.int8 else 0  # MatMulInteger's weights lie transposed
    return whole.take(np.arange(first, first + len(stored[name])), axis)


@pytest.mark.parametrize(
    ("kind", "name", "symmetric"),
    [("llama", *scheme) for scheme in SYMMETRIC + ASYMMETRIC] + [("bert", *scheme) for scheme in SYMMETRIC],
)
def test_integers_are_equal_to_the_bit_and_outputs_within_rounding(
    picos: dict[str, Path], tmp_path: Path, kind: str, name: str, symmetric: bool
) -> None:
    scheme = SCHEMES[name] if symmetric else SCHEMES[name].asymmetric
    source, out = quantised(picos[kind], tmp_path / "q", scheme), tmp_path / "out"
    figures = export(source, out, "quantized")
    assert figures["parity_max_error"] < 1e-4
    assert figures["greedy_mismatches"] == 0
    stored, weights = load_file(source / "model.safetensors"), weights_of(out)
    parts = [key for key in stored if key.endswith((".codes", ".scales", ".zero_points"))]
    assert len(parts) >= NUM_LAYERS * 6 * (2 if symmetric else 3)
    for key in parts:
        actual = found(stored, weights, key, source)
        actual = actual.T if actual.dtype == np.int8 else actual.reshape(stored[key].shape)
        np.testing.assert_array_equal(actual, stored[key], err_msg=key)
    assert ranges_of(out) == {
        (stored[key].item(), stored[key.replace("scale", "zero_point")].item())
        for key in stored if key.endswith(".input_scale")
    }  # fmt: skip
    model, graph = load_quantized_model(source, accuracy_level=4), OnnxModel(out, threads=1)
    assert np.median([relative_error(model, graph, prompt) for prompt in PROMPTS]) < 1e-3


def ranges_of(folder: Path) -> set[tuple[float, int]]:
    """(scale, zero point) of every tensor of activations that is rounded over a stored range."""
    weights, nodes = weights_of(folder), onnx.load(folder / "model.onnx").graph.node
    pairs = [node.input[1:] for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    pairs = [pair for pair in pairs if weights[pair[0]].ndim == 0]
    return {(weights[scale].item(), weights[zero].item()) for scale, zero in pairs}


def relative_error(model: Any, graph: OnnxModel, prompt: NDArray[np.int64]) -> float:
    """A value that falls between two codes flips now and then, and moves all after it: hence medians of these."""
    with torch.inference_mode():
        expected = model(torch.from_numpy(prompt))[0].numpy()
    actual = graph.forward(prompt)[0] if graph.is_decoder else graph.encode(prompt)["last_hidden_state"]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("scheme", [W4.asymmetric, TERNARY, STATIC, DYNAMIC.reduced])
def test_saved_and_exported_again_it_is_the_same_bytes(picos: dict[str, Path], tmp_path: Path, scheme: Any) -> None:
    first = quantised(picos["llama"], tmp_path / "first", scheme)
    tensors = {name: tensor for name, tensor in read_quantized(first)[1].items() if isinstance(tensor, QTensor)}
    second = tmp_path / "second"
    second.mkdir()
    save_quantized(load_model(picos["llama"]), tensors, scheme, first, second)
    outs = [tmp_path / f"out{i}" for i in range(2)]
    for source, out in zip((first, second), outs, strict=True):
        export(source, out, "quantized")
    for file in ("model.onnx", "model.onnx.data"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("scheme", [W4, W4.asymmetric, SCHEMES["w4-block128"], W8, DYNAMIC, STATIC])
def test_standard_operators_hold_4_and_8_bits(picos: dict[str, Path], tmp_path: Path, kind: str, scheme: Any) -> None:
    source, out = quantised(picos[kind], tmp_path / "q", scheme), tmp_path / "out"
    assert export(source, out, "quantized", fused=False)["parity_max_error"] < 1e-4
    assert only_standard(out)
    assert rounded(out)["relative_rms"] < 0.1
    run = {"block": "MatMulNBits", "dynamic": "DynamicQuantizeMatMul", "static": "MatMulIntegerToFloat"}
    assert run[scheme.activations] in optimised(out, tmp_path)
    stored, weights = load_file(source / "model.safetensors"), weights_of(out)
    own = read_quantized(source)[1]
    last = ("mlp.down_proj.weight.codes", "output.dense.weight.codes")
    names = [key.removesuffix(".codes") for key in stored if key.endswith(last)]
    assert len(names) >= NUM_LAYERS
    for name in names:
        tensor = own[name]
        assert isinstance(tensor, QTensor)
        np.testing.assert_array_equal(weights[f"{name}.codes"].astype(np.int16).T, tensor.codes.short().numpy())


def test_static_activations_run_on_integers_and_are_rounded_once(picos: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    choice = MixedSchemes(STATIC, {"k_proj": W8})  # q and v stand apart, and read the same codes
    for folder, mixed, products in ((out, None, 4), (tmp_path / "mixed", choice, 5)):
        source = quantised(picos["llama"], tmp_path / f"q{products}", STATIC, mixed)
        export(source, folder, "quantized")
        kinds = [kind for _, kind in operators(folder)]
        assert kinds.count("QuantizeLinear") == 4 * NUM_LAYERS
        assert optimised(folder, tmp_path).count("MatMulIntegerToFloat") == products * NUM_LAYERS
        assert "MatMul" not in optimised(folder, tmp_path)


def test_mixed_schemes_tables_and_a_head_of_its_own(tmp_path: Path) -> None:
    pico = make_pico("llama", tmp_path / "pico", num_hidden_layers=2, tie_word_embeddings=False, attention_bias=True)
    exceptions = {"layers.0.*.q_proj": W8, "layers.1.*.up_proj": None, "down_proj": DYNAMIC}
    choice = MixedSchemes(SCHEMES["w2-block16"], exceptions, embeddings=SCHEMES["w4-block16"], head=W8)
    source, out = quantised(pico, tmp_path / "q", SCHEMES["w2-block16"], choice), tmp_path / "out"
    assert export(source, out, "quantized")["parity_max_error"] < 1e-4
    weights = weights_of(out)
    assert {"lm_head.weight.codes", "model.embed_tokens.weight.codes", "model.layers.1.mlp.up_proj.weight",
            "model.layers.0.self_attn.q_proj.weight.codes", "model.layers.1.self_attn.qkv_proj.weight.codes",
            "model.layers.1.self_attn.qkv_proj.bias"} <= weights.keys()  # fmt: skip
    assert {"MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul", "MatMul"} <= {k for _, k in operators(out)}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scheme", [W4, W4.asymmetric, SCHEMES["w4-block128"], W8, TERNARY])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_whose_rows_no_block_fills(tmp_path: Path, scheme: Any, tied: bool, fused: bool) -> None:
    if scheme is TERNARY and not fused:
        pytest.skip("2 bits have no standard operator")
    sizes = {"hidden_size": 72, "head_dim": 16, "tie_word_embeddings": tied}
    source = quantised(make_pico("llama", tmp_path / "pico", num_hidden_layers=1, **sizes), tmp_path / "q", scheme)
    assert export(source, tmp_path / "out", "quantized", fused=fused)["parity_max_error"] < 1e-4
    weights = weights_of(tmp_path / "out")
    assert "model.embed_tokens.weight" not in weights
    table = weights["model.embed_tokens.weight.codes"]
    assert table.dtype == np.uint8 or not fused
    assert ("GatherBlockQuantized" in {kind for _, kind in operators(tmp_path / "out")}) == fused


class Text:
    """Random tokens in place of a pipeline's text."""

    def blocks(self, split: str, tokenizer: Any, length: int, tokens: int) -> NDArray[np.int64]:
        return np.random.default_rng(len(split)).integers(1, 500, (4, length))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gpt_neox", {}), ("gpt2", {}), ("mistral", {"sliding_window": 8}), ("hybrid", {})],
)
def test_int8_cache(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    pico, out = tmp_path / "pico", tmp_path / "out"
    if kind == "hybrid":
        make_hybrid("llama", pico, ("linear", None))
    else:
        make_pico(kind, pico, num_hidden_layers=NUM_LAYERS, **options)
    figures = export(pico, out, data=Text(), kv_cache="int8")
    assert figures["parity_max_error"] < 1e-4  # with the cache in float32
    assert 0 < figures["kv_cache_kl"] < 0.02
    assert abs(figures["kv_cache_perplexity"] - 1) < 0.02
    graph = OnnxModel(out, threads=1)
    cached = [slot for slot in graph.cache if None in slot.sizes]
    assert {slot.dtype for slot in cached} == {np.dtype(np.int8)}
    codes = sum(1024 * slot.sizes[0] * slot.sizes[2] for slot in cached)  # type: ignore[operator]
    states = sum(slot.empty(1, 1024).nbytes for slot in graph.cache if slot not in cached)
    assert figures["kv_cache_mb@1024"] * 1e6 == pytest.approx(codes + states)
    assert not (out / "model.float_cache.onnx").exists()
    prompt = PROMPTS.reshape(1, -1)
    tokens = genai_tokens(out, prompt, 24)
    assert graph.decoder(64).greedy(prompt, 24)[0, : len(tokens)].tolist() == tokens


def test_an_int8_cache_is_refused_where_there_is_none(picos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    llama, bert = (shape_of(json.loads((picos[kind] / "config.json").read_text())) for kind in ("llama", "bert"))
    cached = ExportOnnx(kv_cache="int8")
    assert not list(cached.check(llama))
    assert cached.reads() == {"train", "eval"} != ExportOnnx().reads()
    assert [problem.what for problem in cached.check(bert)] == ["no layer of this model caches keys and values"]
    assert [problem.where for problem in ExportOnnx(kv_cache="int8", fused=False).check(llama)] == ["kv_cache"]
    monkeypatch.setattr(operators_module, "_runs", lambda probe: False)
    (problem,) = cached.check(llama)
    assert "has no GroupQueryAttention with an int8 cache" in problem.what


def test_what_no_operator_holds_is_refused_before_anything_is_written(
    picos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantised(picos["llama"], tmp_path / "q", TERNARY)
    with pytest.raises(StageFailed, match="ternary weights have no standard operator"):
        export(source, tmp_path / "a", "quantized", fused=False)
    monkeypatch.setattr(operators_module, "_runs", lambda probe: "bits = 2" not in probe)
    with pytest.raises(StageFailed, match=r"ONNX Runtime \d.* has no MatMulNBits of 2 bits in blocks of 64"):
        export(source, tmp_path / "b", "quantized")
    assert not list((tmp_path / "b").iterdir())
