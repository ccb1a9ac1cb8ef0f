"""Linear layers exported: equal to torch, whole or step by step, padded or not, native or not, and in genai."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import export, genai_tokens, quantised

from compress.errors import CompressError
from compress.exports.onnx import folder as folder_module
from compress.exports.onnx import operators
from compress.exports.onnx.stage import ExportOnnx
from compress.mixers.spec import SPECS
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.quant.choice import MixedSchemes
from compress.quant.schemes import SCHEMES, Scheme
from compress.runtime.session import OnnxModel
from pico import make_hybrid

PROMPT = np.arange(20, 37, dtype=np.int64)[None]
STEP = np.full((2, 1), 50, np.int64)
LINEAR = "linear_attention"
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
Exported = Callable[[str, bool], Path]
MIXES: dict[str, Sequence[str | None]] = {
    **{name: (name, None) for name in SPECS},
    "all linear": ("linear", "linear"),
    "all mamba2": ("mamba2", "mamba2"),
    "mixed": ("linear", "mamba2", None),
    "window": ("linear", "gated-linear@8", None),
    "all window": ("linear@8", "linear@8"),
    "softmax map": ("linear/softmax", "gated-linear/softmax@8"),
}
each_window = pytest.mark.parametrize("mix", ["window", "all window"])


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hybrid("mamba2")`: the folder of a pico llama with the layers of that mix, written once."""
    folders: dict[str, Path] = {}

    def folder(mix: str) -> Path:
        if mix not in folders:
            folders[mix] = make_hybrid("llama", tmp_path_factory.mktemp("hybrid"), MIXES[mix])
        return folders[mix]

    return folder


@pytest.fixture(scope="session")
def exported(hybrid: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported("mamba2", True)`: the folder of its fused fp32 export, written once."""
    folders: dict[tuple[str, bool], Path] = {}

    def folder(mix: str, fused: bool) -> Path:
        if (mix, fused) not in folders:
            out = tmp_path_factory.mktemp("onnx") / "out"
            export(hybrid(mix), out, fused=fused)
            folders[mix, fused] = out
        return folders[mix, fused]

    return folder


def kinds(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_fp32_is_what_torch_computes(exported: Exported, mix: str, fused: bool) -> None:
    folder = exported(mix, fused)
    record = json.loads((folder / "parity.json").read_text())["exact"]
    assert max(record["whole_error"], record["step_error"], record["own_step_error"]) < 1e-4
    assert (record["mismatches"], record["num_tokens"]) == (0, 64)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert fused or {opset.domain for opset in model.opset_import} == {""}
    assert ("LinearAttention" in kinds(folder)) == fused
    has_conv = bool({"mamba2", "gated-delta"} & set(MIXES[mix]))
    assert ("CausalConvWithState" in kinds(folder)) == (fused and has_conv)
    has_window = any("@" in name for name in MIXES[mix] if name)
    assert ("Attention" in kinds(folder)) == has_window
    assert [opset.version for opset in model.opset_import if not opset.domain] == [23 if has_window else 21]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2", {}),  # biases
        ("qwen3", {}),  # norms of q and k, heads that are no share of the hidden size
        ("mistral", {"layer_types": [LINEAR, "sliding_attention", LINEAR], "sliding_window": 8}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": 1, "rope_parameters": SCALED}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_variants(tmp_path: Path, model_type: str, options: dict[str, Any], fused: bool) -> None:
    source = make_hybrid(model_type, tmp_path / "source", ("mamba2", None, "gated-linear@4"), **options)
    assert export(source, tmp_path / "out", fused=fused)["parity_max_error"] < 1e-4


@pytest.mark.parametrize(
    ("mix", "scheme"),
    [
        ("all linear", SCHEMES["w4-block32"]),
        ("mamba2", SCHEMES["w4-block32"].asymmetric),
        ("gated-delta", SCHEMES["ternary"]),
        ("gated-linear", SCHEMES["w8a8-dynamic"]),
        ("linear", SCHEMES["w8a8-static"]),
        ("window", SCHEMES["w4-block32"]),
    ],
)
def test_projections_are_quantised_and_states_are_not(
    hybrid: Callable[[str], Path], tmp_path: Path, mix: str, scheme: Scheme
) -> None:
    source = quantised(hybrid(mix), tmp_path / "q", scheme)
    figures = export(source, tmp_path / "out", "quantized")
    assert figures["parity_max_error"] < 1e-4
    assert figures["greedy_mismatches"] == 0
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    codes = {tensor.name for tensor in graph.initializer if tensor.name.endswith(".codes")}
    for layer, mixer in enumerate(MIXES[mix]):
        leaves = {name.split("self_attn.")[1] for name in codes if f"layers.{layer}.self_attn." in name}
        assert leaves == {"qkv_proj.weight.codes", "o_proj.weight.codes"}, mixer
    states = [value.type.tensor_type for value in graph.input if value.name.startswith("past.")]
    assert states
    assert all(state.elem_type == onnx.TensorProto.FLOAT for state in states)


@pytest.mark.parametrize("mix", ["linear", "mamba2"])
def test_projections_of_several_kinds_stand_apart(hybrid: Callable[[str], Path], tmp_path: Path, mix: str) -> None:
    choice = MixedSchemes(SCHEMES["w8-block32"], {"v_proj": None})
    source = quantised(hybrid(mix), tmp_path / "q", choice.scheme, choice)
    assert export(source, tmp_path / "out", "quantized")["parity_max_error"] < 1e-4


@pytest.mark.parametrize("mix", ["gated-linear", "mamba2", "window"])
def test_a_mixer_projects_its_rates_with_q_k_and_v(hybrid: Callable[[str], Path], tmp_path: Path, mix: str) -> None:
    source = quantised(hybrid(mix), tmp_path / "q", SCHEMES["w4-block32"])
    export(source, tmp_path / "out", "quantized")
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    weighing = [node for node in nodes if any("self_attn" in name and "_proj.weight" in name for name in node.input)]
    assert Counter(node.op_type for node in weighing) == {"MatMulNBits": 2 * len(MIXES[mix])}


@pytest.mark.parametrize("mix", ["linear", "gated-linear", "all linear"])
def test_fused_takes_right_padded_rows_and_goes_on_after_them(exported: Exported, mix: str) -> None:
    model = OnnxModel(exported(mix, True), threads=1)
    ids, mask = np.repeat(PROMPT[:, :8], 2, 0), np.ones((2, 8), np.int64)
    mask[0, 5:] = 0
    padded, past = model.forward(ids, mask)
    mask = np.ones((2, 9), np.int64)
    mask[0, 6:] = 0
    stepped, _ = model.forward(STEP, mask, past)
    for row, length in enumerate((5, 8)):
        alone, own = model.forward(PROMPT[:, :length])
        np.testing.assert_allclose(padded[row, :length], alone[0], atol=1e-4)
        np.testing.assert_allclose(stepped[row], model.forward(STEP[:1], None, own)[0][0], atol=1e-4)


@pytest.mark.parametrize("mix", MIXES)
def test_unfused_takes_left_padded_rows_and_goes_on_after_them(exported: Exported, mix: str) -> None:
    model = OnnxModel(exported(mix, False), threads=1)
    ids, mask = np.full((2, 17), 3, np.int64), np.ones((2, 17), np.int64)
    ids[0, 12:], ids[1], mask[0, :12] = PROMPT[0, :5], PROMPT[0], 0
    padded, past = model.forward(ids, mask)
    stepped, _ = model.forward(STEP, np.append(mask, np.ones((2, 1), np.int64), axis=1), past)
    for row, length in enumerate((5, 17)):
        alone, own = model.forward(PROMPT[:, :length])
        np.testing.assert_allclose(padded[row, -length:], alone[0], atol=1e-4)
        np.testing.assert_allclose(stepped[row], model.forward(STEP[:1], None, own)[0][0], atol=1e-4)


@pytest.mark.parametrize("mix", ["mamba2", "window"])
def test_a_convolution_or_window_refuses_right_padded_rows(exported: Exported, mix: str) -> None:
    mask = np.ones((1, 17), np.int64)
    mask[0, 12:] = 0
    with pytest.raises(CompressError, match="rows of different lengths"):
        OnnxModel(exported(mix, True), threads=1).forward(PROMPT, mask)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_steps_batches_and_a_resumed_prompt_are_the_whole(exported: Exported, mix: str, fused: bool) -> None:
    model = OnnxModel(exported(mix, fused), threads=1)
    whole, _ = model.forward(PROMPT)
    _, past = model.forward(PROMPT[:, :3])
    rest, past = model.forward(PROMPT[:, 3:], None, past)
    np.testing.assert_allclose(rest[0], whole[0, 3:], atol=1e-4)
    assert past.length == 17
    decoder = model.decoder(17, batch_size=4)
    rows = [decoder.prefill(np.repeat(PROMPT[:, :9], 4, 0))]
    rows += [decoder.step(token.repeat(4)) for token in PROMPT[0, 9:]]
    np.testing.assert_allclose(np.stack(rows, 1), whole[:, 8:].repeat(4, 0), atol=1e-4)
    states = [slot for slot in model.cache if None not in slot.sizes]
    assert states
    assert all(slot.empty(1).shape == slot.empty(1, 1000).shape for slot in states)


@pytest.mark.parametrize("fused", [True, False])
@each_window
def test_a_window_reads_a_long_prompt_in_pieces_of_any_length(
    exported: Exported, hybrid: Callable[[str], Path], mix: str, fused: bool
) -> None:
    ids = np.random.default_rng(0).integers(1, 512, (2, 210))
    model, past, read = OnnxModel(exported(mix, fused), threads=1), None, []
    for piece in np.split(ids[:1], [1, 71, 76, 140, 141], axis=1):  # from nothing; of more than a block, than a window
        logits, past = model.forward(piece, None, past)
        read.append(logits)
    source: Any = load_model(hybrid(mix))
    with torch.inference_mode():
        whole = source(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.concatenate(read, 1), whole[:1], atol=1e-4)
    np.testing.assert_allclose(model.forward(ids)[0], whole, atol=1e-4)


@each_window
def test_a_block_and_more_of_padding_on_the_left_of_a_window_is_nothing(exported: Exported, mix: str) -> None:
    model = OnnxModel(exported(mix, False), threads=1)
    ids, mask = np.full((2, 90), 3, np.int64), np.ones((2, 90), np.int64)
    ids[0, 86:], ids[1], mask[0, :86] = PROMPT[0, :4], 5, 0
    padded, past = model.forward(ids, mask)
    alone, own = model.forward(PROMPT[:, :4])
    np.testing.assert_allclose(padded[0, 86:], alone[0], atol=1e-4)
    for token in PROMPT[0, 4:]:
        mask = np.append(mask, np.ones((2, 1), np.int64), axis=1)
        padded, past = model.forward(token.repeat(2)[:, None], mask, past)
        alone, own = model.forward(token.reshape(1, 1), None, own)
        np.testing.assert_allclose(padded[0], alone[0], atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "decoder"])
@pytest.mark.parametrize("mix", MIXES)
def test_genai_runs_the_folder_unchanged(
    exported: Exported, hybrid: Callable[[str], Path], tmp_path: Path, mix: str, model_type: str
) -> None:
    folder = exported(mix, True)
    config = json.loads((folder / "genai_config.json").read_text())
    if model_type != config["model"]["type"]:  # the generic type runs it too, its states then in buffers of their own
        for file in folder.iterdir():
            (tmp_path / file.name).hardlink_to(file)
        folder, config["model"]["type"] = tmp_path, model_type
        config["search"]["past_present_share_buffer"] = False
        (folder / "genai_config.json").unlink()
        (folder / "genai_config.json").write_text(json.dumps(config))
    tokens = genai_tokens(folder, PROMPT, 24)
    source: Any = load_model(hybrid(mix))
    expected = source.generate(torch.from_numpy(PROMPT), max_new_tokens=24, do_sample=False)[0, 17:].tolist()
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == 24 or tokens[-1] == 0  # the end token
    assert OnnxModel(folder, threads=1).decoder(64).greedy(PROMPT, 24)[0, : len(tokens)].tolist() == tokens


@pytest.mark.parametrize("mix", ["mamba2", "gated-delta", "window"])
def test_a_runtime_without_the_operators_gets_a_decomposed_graph(
    hybrid: Callable[[str], Path], exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, mix: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(folder_module, "missing", lambda names: names)
    assert export(hybrid(mix), tmp_path / "out")["parity_max_error"] < 1e-4
    assert "no LinearAttention and no CausalConvWithState" in caplog.text
    assert {"Scan", "Attention" if mix == "window" else "Conv", "GroupQueryAttention"} <= kinds(tmp_path / "out")
    assert not {"LinearAttention", "CausalConvWithState"} & kinds(tmp_path / "out")
    ours, native = (OnnxModel(folder, threads=1).decoder(64) for folder in (tmp_path / "out", exported(mix, True)))
    assert (ours.greedy(PROMPT, 16) == native.greedy(PROMPT, 16)).all()


@pytest.mark.parametrize("mixers", [("mamba2", "gated-delta"), ("linear@8", "mamba2"), ("linear@8", "linear@4")])
def test_genai_is_not_promised_what_it_cannot_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mixers: Sequence[str]
) -> None:
    source = make_hybrid("llama", tmp_path / "source", mixers)
    assert export(source, tmp_path / "out")["parity_max_error"] < 1e-4
    assert not (tmp_path / "out" / "genai_config.json").exists()
    assert "states of 2 shapes" in caplog.text


def test_check_asks_of_heads_only_what_softmax_layers_need(hybrid: Callable[[str], Path]) -> None:
    for mix, where in (("all linear", []), ("linear", ["fused"])):
        shape = shape_of(json.loads((hybrid(mix) / "config.json").read_text()))
        assert [problem.where for problem in ExportOnnx().check(replace(shape, head_dim=12))] == where


def test_check_asks_of_the_runtime_what_a_window_needs(
    hybrid: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed, plain = (shape_of(json.loads((hybrid(mix) / "config.json").read_text())) for mix in ("window", "linear"))
    assert not list(ExportOnnx().check(windowed))
    monkeypatch.setattr(operators, "missing", lambda names: names)
    assert "no Attention of opset 23" in "".join(map(str, ExportOnnx().check(windowed)))
    assert not list(ExportOnnx().check(plain))
