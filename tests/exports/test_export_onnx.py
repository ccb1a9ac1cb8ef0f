"""Every family × format × kind of graph: equal to torch, padded or not, whole or step by step, and in genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import export, genai_tokens, only_standard, operators, quantised, rounded

from compress.errors import CompressError, StageFailed
from compress.exports.onnx.stage import ExportOnnx
from compress.models.anatomy import FAMILIES, shape_of
from compress.models.load import load_model
from compress.quant.schemes import SCHEMES
from compress.runtime.session import OnnxModel
from compress.stage import INPUT, Given
from pico import MODEL_TYPES, make_pico

DECODERS = [name for name in MODEL_TYPES if name != "bert"]
PROMPT = np.arange(20, 37, dtype=np.int64)[None]
Pico = Callable[[str], Path]


@pytest.fixture(scope="session")
def exported(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """`exported("llama", True)`: the folder of the fused fp32 export, written once."""
    folders: dict[tuple[str, bool], Path] = {}

    def folder(model_type: str, fused: bool) -> Path:
        if (model_type, fused) not in folders:
            out = tmp_path_factory.mktemp("onnx") / "out"
            export(pico(model_type), out, fused=fused)
            folders[model_type, fused] = out
        return folders[model_type, fused]

    return folder


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fp32_is_what_torch_computes(exported: Callable[[str, bool], Path], model_type: str, fused: bool) -> None:
    record = json.loads((exported(model_type, fused) / "parity.json").read_text())
    assert record["exact"]["whole_error"] < 1e-4
    assert record["exact"]["step_error"] < 1e-4
    assert record["exact"]["mismatches"] == 0
    assert record["rounded"] is None
    assert record["exact"]["num_tokens"] == (0 if model_type == "bert" else 64)


@pytest.mark.parametrize("scheme", ["w4-block32", "w8-block32", "w8a8-dynamic"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "gpt2", "bert"])
def test_quantised_codes_are_emitted_untouched(pico: Pico, tmp_path: Path, model_type: str, scheme: str) -> None:
    source = quantised(pico(model_type), tmp_path / "q", SCHEMES[scheme])
    figures = export(source, tmp_path / "out", "quantized")
    assert figures["parity_max_error"] < 1e-4
    assert figures["greedy_mismatches"] == 0
    assert rounded(tmp_path / "out")["whole_error"] > 1e-4
    assert rounded(tmp_path / "out")["relative_rms"] < 0.1
    operator = "DynamicQuantizeMatMul" if scheme == "w8a8-dynamic" else "MatMulNBits"
    assert ("com.microsoft", operator) in operators(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "model.exact.onnx").exists()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_int8_has_standard_operators_only(pico: Pico, tmp_path: Path, model_type: str) -> None:
    source = quantised(pico(model_type), tmp_path / "q", SCHEMES["w8a8-dynamic"])
    assert export(source, tmp_path / "out", "quantized", fused=False)["parity_max_error"] < 1e-4
    assert only_standard(tmp_path / "out")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_unfused_graph_has_standard_operators_only(exported: Callable[[str, bool], Path], model_type: str) -> None:
    assert only_standard(exported(model_type, False))


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_computed_twice(exported: Callable[[str, bool], Path], fused: bool) -> None:
    nodes = onnx.load(exported("llama", fused) / "model.onnx", load_external_data=False).graph.node
    assert len({(node.op_type, *node.input, *map(str, node.attribute)) for node in nodes}) == len(nodes)


@pytest.mark.parametrize("model_type", DECODERS)
def test_fused_takes_right_padded_rows(exported: Callable[[str, bool], Path], model_type: str) -> None:
    onnx_model = OnnxModel(exported(model_type, True), threads=1)
    lengths, ids = (5, 17), np.full((2, 17), 3, np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = PROMPT[0, :length], 1
    padded, _ = onnx_model.forward(ids, mask)
    last = onnx_model.run({**onnx_model.token_feeds(ids, mask), **no_past(onnx_model, 2)})["logits"]
    assert last.shape == (2, 1, 512)
    for row, length in enumerate(lengths):
        alone, _ = onnx_model.forward(PROMPT[:, :length])
        np.testing.assert_allclose(padded[row, :length], alone[0], atol=1e-4)
        np.testing.assert_allclose(last[row, 0], alone[0, -1], atol=1e-4)


@pytest.mark.parametrize("model_type", DECODERS)
def test_fused_goes_on_after_right_padded_rows(exported: Callable[[str, bool], Path], model_type: str) -> None:
    onnx_model = OnnxModel(exported(model_type, True), threads=1)
    mask = np.ones((2, 8), np.int64)
    mask[0, 5:] = 0
    _, past = onnx_model.forward(np.repeat(PROMPT[:, :8], 2, 0), mask)
    mask = np.ones((2, 9), np.int64)
    mask[0, 6:] = 0
    stepped, _ = onnx_model.forward(np.full((2, 1), 50, np.int64), mask, past)
    for row, length in enumerate((5, 8)):
        alone, _ = onnx_model.forward(np.append(PROMPT[:, :length], [[50]], axis=1))
        np.testing.assert_allclose(stepped[row, -1], alone[0, -1], atol=1e-4)


@pytest.mark.parametrize("model_type", DECODERS)
def test_unfused_takes_left_padded_rows(exported: Callable[[str, bool], Path], model_type: str) -> None:
    onnx_model = OnnxModel(exported(model_type, False), threads=1)
    ids, mask = np.full((2, 17), 3, np.int64), np.ones((2, 17), np.int64)
    ids[0, 12:], ids[1] = PROMPT[0, :5], PROMPT[0]
    mask[0, :12] = 0
    padded, past = onnx_model.forward(ids, mask)
    step = np.full((2, 1), 50, np.int64)
    stepped, _ = onnx_model.forward(step, np.append(mask, np.ones((2, 1), np.int64), axis=1), past)
    for row, length in enumerate((5, 17)):
        alone, own = onnx_model.forward(PROMPT[:, :length])
        np.testing.assert_allclose(padded[row, -length:], alone[0], atol=1e-4)
        np.testing.assert_allclose(stepped[row], onnx_model.forward(step[:1], None, own)[0][0], atol=1e-4)


def no_past(onnx_model: OnnxModel, batch_size: int) -> dict[str, Any]:
    return {slot.past: slot.empty(batch_size) for slot in onnx_model.cache}


@pytest.mark.parametrize("fused", [True, False])
def test_encoder_takes_padding_on_either_side(exported: Callable[[str, bool], Path], pico: Pico, fused: bool) -> None:
    onnx_model = OnnxModel(exported("bert", fused), threads=1)
    ids, mask = np.full((2, 17), 3, np.int64), np.ones((2, 17), np.int64)
    ids[0, :5], ids[1], mask[0, 5:] = PROMPT[0, :5], PROMPT[0], 0
    padded = onnx_model.encode(ids, mask)["last_hidden_state"]
    model: Any = load_model(pico("bert"))
    with torch.inference_mode():
        turned_ids, turned_mask = (torch.from_numpy(array[:, ::-1].copy()) for array in (ids, mask))
        left = model(input_ids=turned_ids, attention_mask=turned_mask)
    np.testing.assert_allclose(padded[0, :5], onnx_model.encode(PROMPT[:, :5])["last_hidden_state"][0], atol=1e-4)
    turned = onnx_model.encode(ids[:, ::-1], mask[:, ::-1])["last_hidden_state"]
    np.testing.assert_allclose(turned[0, 12:], left.last_hidden_state[0, 12:].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
        ("gpt_neox", {"hidden_act": "gelu_new"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("bert", {"architecture": "BertForMaskedLM"}),
        ("bert", {"architecture": "BertForSequenceClassification", "num_labels": 3}),
        ("bert", {"architecture": "BertForSequenceClassification", "num_labels": 1}),
        ("bert", {"architecture": "BertForTokenClassification"}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_variants(tmp_path: Path, model_type: str, options: dict[str, Any], fused: bool) -> None:
    source = make_pico(model_type, tmp_path / "source", num_hidden_layers=3, **options)
    assert export(source, tmp_path / "out", fused=fused)["parity_max_error"] < 1e-4


def test_llama3_rotary(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 1e4}  # fmt: skip
    source = make_pico("llama", tmp_path / "source", num_hidden_layers=1, rope_parameters=rope)
    assert export(source, tmp_path / "out")["parity_max_error"] < 1e-4


@pytest.mark.parametrize("model_type", DECODERS)
def test_genai_runs_the_folder_unchanged(exported: Callable[[str, bool], Path], pico: Pico, model_type: str) -> None:
    import onnxruntime_genai as og

    folder = exported(model_type, True)
    expected = OnnxModel(folder, threads=1).decoder(64).greedy(PROMPT, 24)[0]
    tokens = genai_tokens(folder, PROMPT, 24)
    assert tokens == expected[: len(tokens)].tolist()
    assert len(tokens) == 24 or tokens[-1] == 0  # the end token
    assert og.Tokenizer(og.Model(str(folder))).decode(tokens)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_prompt_in_chunks_is_the_prompt(
    exported: Callable[[str, bool], Path], pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    folder, whole = tmp_path / "chunks", OnnxModel(exported(model_type, True), threads=1)
    lengths, forward = list[int](), OnnxModel.forward
    monkeypatch.setattr(OnnxModel, "forward", lambda *args: (lengths.append(args[1].shape[1]), forward(*args))[1])
    export(pico(model_type), folder, chunk_size=7)
    assert max(lengths) > 100, "the gate compares whole prompts, whatever the chunks"
    chunked, read = OnnxModel(folder, threads=1), list[int]()
    assert (whole.chunk_size, chunked.chunk_size) == (256, 7)
    expected = whole.decoder(64).prefill(PROMPT)
    feeds = OnnxModel.token_feeds
    monkeypatch.setattr(OnnxModel, "token_feeds", lambda *args: (read.append(args[1].shape[1]), feeds(*args))[1])
    np.testing.assert_allclose(chunked.decoder(64).prefill(PROMPT), expected, atol=1e-5)
    assert read == [7, 7, 3]
    assert json.loads((folder / "genai_config.json").read_text())["search"]["chunk_size"] == 7
    assert genai_tokens(folder, PROMPT, 24) == genai_tokens(exported(model_type, True), PROMPT, 24)


def test_only_a_fused_decoder_is_read_in_chunks(exported: Callable[[str, bool], Path], pico: Pico) -> None:
    assert OnnxModel(exported("llama", False), threads=1).chunk_size == 0
    keys = {}
    for model_type, fused in (("llama", True), ("llama", False), ("bert", True)):
        shape = shape_of(json.loads((pico(model_type) / "config.json").read_text()))
        given = Given(shape, {INPUT: "torch"}, frozenset())
        keys[model_type, fused] = ExportOnnx(fused=fused).settled(given).get("chunk_size")
    assert keys == {("llama", True): 256, ("llama", False): None, ("bert", True): None}


def test_files_names_and_licence(exported: Callable[[str, bool], Path], pico: Pico) -> None:
    folder = exported("llama", True)
    names = {file.name for file in folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json", "parity.json", "LICENSE", "README.md",
            "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names  # fmt: skip
    assert "genai_config.json" not in {file.name for file in exported("llama", False).iterdir()}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = [node.name for node in session.get_inputs()]
    assert inputs[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert {node.name for node in session.get_outputs()} >= {"logits", "present.3.key", "present.3.value"}
    assert session.get_modelmeta().custom_metadata_map["task"] == "text-generation-with-past"
    assert "position_ids" in OnnxModel(exported("llama", False)).inputs


def test_tied_embedding_is_stored_once(exported: Callable[[str, bool], Path], pico: Pico, tmp_path: Path) -> None:
    weights = (pico("llama") / "model.safetensors").stat().st_size
    tables = 2 * 256 * 8 * 4  # cos and sin
    assert (exported("llama", True) / "model.onnx.data").stat().st_size < weights + tables + 4096
    source = quantised(pico("llama"), tmp_path / "q", SCHEMES["w4-block32"])
    export(source, tmp_path / "out", "quantized")
    stored = (source / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < stored + tables + 4096


def test_sentence_embedding(tmp_path: Path) -> None:
    source = make_pico("bert", tmp_path / "source", num_hidden_layers=2)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"type": "models.Pooling", "path": "1_Pooling"}, {"type": "models.Normalize"}]
    (source / "modules.json").write_text(json.dumps(modules))
    export(source, tmp_path / "out")
    onnx_model = OnnxModel(tmp_path / "out", threads=1)
    mask = np.ones_like(PROMPT)
    mask[0, 9:] = 0
    outputs = onnx_model.encode(PROMPT, mask)
    mean = outputs["last_hidden_state"][0, :9].mean(0)
    np.testing.assert_allclose(outputs["sentence_embedding"][0], mean / np.linalg.norm(mean), atol=1e-5)
    assert "pooler_output" not in outputs
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_what_it_cannot_do_is_refused_by_name(pico: Pico, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = make_pico("llama", tmp_path / "dynamic", num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(StageFailed, match="'dynamic'"):
        export(dynamic, tmp_path / "a")
    mish = make_pico("llama", tmp_path / "mish", num_hidden_layers=1, hidden_act="mish")
    with pytest.raises(StageFailed, match="'mish'"):
        export(mish, tmp_path / "b")
    source = quantised(pico("llama"), tmp_path / "q", SCHEMES["w4-block32"])
    with pytest.raises(StageFailed, match="'w4-block32' already"):
        export(source, tmp_path / "c", "quantized", format="int8")
    with pytest.raises(StageFailed, match="parity_tolerance"):
        export(pico("llama"), tmp_path / "d", parity_tolerance=1e-12)


def test_a_wrong_weight_fails_the_parity_check(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.exports.onnx import attention

    monkeypatch.setattr(attention, "scale", lambda model, layer: 0.2)
    with pytest.raises(StageFailed, match="differs from torch by"):
        export(pico("llama"), tmp_path / "out")


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_outputs_that_are_no_numbers_fail_it_too(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    from compress.exports.onnx import attention, encoder

    for module in (attention, encoder):
        monkeypatch.setattr(module, "scale", lambda model, layer: float("nan"))
    with pytest.raises(StageFailed, match="differs from torch by inf"):
        export(pico(model_type), tmp_path / "out", fused=False)


def test_check_input_knows_what_was_quantised_before() -> None:
    from compress.stages.prune.layers import PruneLayers
    from compress.stages.quantize.stage import Quantize

    w4, w8, w2 = (Quantize(scheme=name) for name in ("w4-block32", "w8a8-dynamic", "w2-block32"))
    for previous, options, where in (
        (w8, {"format": "int4"}, ["format"]), (w4, {"format": "int8"}, ["format"]),
        (w4, {"format": "fp32"}, ["format"]), (w4, {"fused": False}, []), (w2, {"fused": False}, ["fused"]),
        (w4, {}, []), (w4, {"format": "int4"}, []), (w8, {"fused": False}, []), (PruneLayers(drop=1), {}, []),
    ):  # fmt: skip
        assert [problem.where for problem in ExportOnnx(**options).check_input(previous)] == where  # type: ignore[arg-type]


def test_check_and_before(pico: Pico) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert not list(ExportOnnx(format="int4", fused=False).check(shape))
    assert [problem.where for problem in ExportOnnx().check(replace(shape, head_dim=12))] == ["fused"]
    assert ExportOnnx(format="int4").before("torch") == (("quantize", {"scheme": "w4-block32"}),)
    assert ExportOnnx(format="int8").before("torch") == (("quantize", {"scheme": "w8a8-dynamic"}),)
    assert ExportOnnx(format="int4").before("quantized") == ExportOnnx().before("torch") == ()
    assert {name for family in FAMILIES for name in family.model_types} == set(MODEL_TYPES)


def test_missing_tokenizer(pico: Pico, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((pico("llama") / name).read_bytes())
    with pytest.raises(CompressError, match="tokenizer"):
        export(source, tmp_path / "out")
