"""The table of operators says what the exported graph has, matrix by matrix, of every kind of graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from exporting import export, quantised

from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.quant.choice import MixedSchemes
from compress.quant.schemes import SCHEMES
from compress.report.operators import operators_table
from compress.report.tables import Table, as_markdown
from compress.runner.record import RunRecord, SourceRecord, StageRecord, State
from compress.runtime.graphs import operators_of, with_subgraphs
from pico import make_hybrid

Pico = Callable[[str], Path]
TEXT: Any = TextData(DataConfig())
N_BITS = "4 bits, block 32, accuracy 4"
DYNAMIC = "int8, activations uint8 by each call's range"


def table(folder: Path) -> Table:
    """As the report of a run has it whose last stage wrote `folder`."""
    stage = StageRecord(
        id="export", stage="export-onnx", key="k", directory=folder.name, returns="onnx", hidden=False,
        inputs={"input": "source"},
    )  # fmt: skip
    record = RunRecord(
        name="r", state=State.DONE, started="", seed=0, versions={}, hardware={}, target={}, git_commit=None,
        source=SourceRecord(name="m", key="s"), stages=(stage,),
    )  # fmt: skip
    found = operators_table(folder.parent, record)
    assert found is not None
    return found


def rows(folder: Path) -> list[tuple[str, ...]]:
    """All but the megabytes."""
    return [row[:-1] for row in table(folder).rows]


def test_floats(pico: Pico, tmp_path: Path) -> None:
    export(pico("llama"), tmp_path / "out")
    assert rows(tmp_path / "out") == [
        ("outside the layers", "model.embed_tokens", "float32", "Gather"),
        ("layers 0–3", "self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj", "float32", "MatMul"),
        ("layers 0–3", "attention", "", "GroupQueryAttention"),
        ("outside the layers", "model.embed_tokens", "float32", "FusedMatMul"),
    ]
    numbers = 4 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    assert float(table(tmp_path / "out").rows[1][-1]) == pytest.approx(4 * numbers / 1e6, rel=1e-2)


def test_a_matrix_of_another_scheme_stands_apart(pico: Pico, tmp_path: Path) -> None:
    choice = MixedSchemes(SCHEMES["w4-block32"], {"layers.1.mlp.down_proj": SCHEMES["w8-block32"]})
    quantised(pico("llama"), tmp_path / "int4", SCHEMES["w4-block32"], choice)
    export(tmp_path / "int4", tmp_path / "out", "quantized")
    found = rows(tmp_path / "out")
    most = ("layers 0–3", "self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj", N_BITS, "MatMulNBits")
    assert found[0] == ("outside the layers", "model.embed_tokens", "4 bits, block 32", "GatherBlockQuantized")
    assert most in found
    assert ("layers 0, 2–3", "mlp.down_proj", N_BITS, "MatMulNBits") in found
    assert ("layer 1", "mlp.down_proj", "8 bits, block 32, accuracy 4", "MatMulNBits") in found
    assert "rounded to int8 in blocks" in table(tmp_path / "out").note


@pytest.mark.parametrize(
    ("scheme", "fused", "weights", "operator"),
    [
        ("w8a8-dynamic", True, DYNAMIC, "DynamicQuantizeMatMul"),
        ("w8a8-dynamic", False, DYNAMIC, "MatMulInteger"),
        ("w8a8-static", True, "int8, activations uint8 by a stored range", "DequantizeLinear → MatMul"),
        ("w4-block32", False, "4 bits, block 32", "DequantizeLinear → MatMul"),
        ("w2-block32", True, "2 bits, block 32, accuracy 4", "MatMulNBits"),
    ],
)
def test_each_scheme_by_its_operator(
    pico: Pico, tmp_path: Path, scheme: str, fused: bool, weights: str, operator: str
) -> None:
    quantised(pico("bert"), tmp_path / "quantised", SCHEMES[scheme])
    export(tmp_path / "quantised", tmp_path / "out", "quantized", fused=fused)
    found = table(tmp_path / "out")
    inside = [row[1:-1] for row in found.rows if row[0] == "layers 0–3"]
    assert any("intermediate.dense" in paths and rest == [weights, operator] for paths, *rest in inside), inside
    assert ("DequantizeLinear before" in found.note) == any("→" in row[3] for row in found.rows)


def test_both_bodies_of_a_model_whose_prompts_are_int8(pico: Pico, tmp_path: Path) -> None:
    quantised(pico("llama"), tmp_path / "int4", SCHEMES["w4-block32"])
    export(tmp_path / "int4", tmp_path / "out", "quantized", data=TEXT, prompt="int8", prompt_exceptions=("o_proj",))
    found = rows(tmp_path / "out")
    reading = "self_attn.qkv_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj"
    writing = "self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj"
    assert ("layers 0–3, prompt", reading, DYNAMIC, "DynamicQuantizeMatMul") in found
    assert ("layers 0–3, prompt", "self_attn.o_proj", N_BITS, "MatMulNBits") in found
    assert ("layers 0–3, token", writing, N_BITS, "MatMulNBits") in found
    assert "the body that reads many new tokens at once" in table(tmp_path / "out").note


def test_a_hybrids_layers_by_what_mixes_their_tokens(tmp_path: Path) -> None:
    make_hybrid("llama", tmp_path / "hybrid", ("linear", None, "linear", None))
    export(tmp_path / "hybrid", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert ("layers 0, 2", "attention", "", "LinearAttention") in found
    assert ("layers 1, 3", "attention", "", "GroupQueryAttention") in found


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2", "qwen3", "bert"])
def test_no_product_with_a_weight_is_left_out(pico: Pico, tmp_path: Path, model_type: str) -> None:
    quantised(pico(model_type), tmp_path / "int4", SCHEMES["w4-block32"])
    export(tmp_path / "int4", tmp_path / "out", "quantized")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    nodes = [node for each in with_subgraphs(graph) for node in each.node if node.op_type == "MatMulNBits"]
    uses = [use for use in operators_of(tmp_path / "out" / "model.onnx") if use.operator == "MatMulNBits"]
    assert len(uses) == len(nodes) > 8


def test_what_is_no_graph_has_no_table(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff none")
    assert operators_of(tmp_path / "model.onnx") == []


def test_words_stand_on_the_left_and_figures_on_the_right() -> None:
    lines = as_markdown(Table("", ("where", "what", "MB"), (("here", "this", "1"),), num_words=2)).splitlines()
    assert lines[1] == "|---|---|--:|"
