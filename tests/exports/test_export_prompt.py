"""Prompts in int8 and tokens in 4 bits, in one file: each body is torch's, and only prompts are read by the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exporting import export, genai_tokens, quantised

from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.exports.onnx import FEW, prompt
from compress.exports.onnx.stage import ExportOnnx
from compress.models.anatomy import shape_of
from compress.quant.qtensor import QTensor
from compress.quant.schemes import SCHEMES
from compress.quant.store import read_quantized
from compress.runtime.graphs import with_subgraphs
from compress.runtime.session import OnnxModel
from compress.stage import INPUT, Given
from compress.stages.distill.stage import Distill
from compress.stages.quantize.stage import Quantize
from pico import make_hybrid

Pico = Callable[[str], Path]
PROMPT = np.arange(20, 61, dtype=np.int64)[None]
TEXT: Any = TextData(DataConfig())


@pytest.fixture(scope="module")
def folders(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pico Llama in 4 bits: quantised, exported as it is, and with prompts in int8, all of its projections."""
    made = tmp_path_factory.mktemp("prompt")
    names = ("quantised", "plain", "int8")
    found = dict(zip(names, (made / name for name in names), strict=True))
    quantised(pico("llama"), found["quantised"], SCHEMES["w4-block32"])
    export(found["quantised"], found["plain"], "quantized")
    export(found["quantised"], found["int8"], "quantized", data=TEXT, prompt="int8", prompt_exceptions=())
    return found


def graphs(folder: Path) -> Iterator[onnx.GraphProto]:
    return with_subgraphs(onnx.load(folder / "model.onnx", load_external_data=False).graph)


def kinds(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "gpt2", "hybrid"])
def test_both_bodies_are_torchs_and_genai_runs_them(pico: Pico, tmp_path: Path, model_type: str) -> None:
    source = pico(model_type) if model_type != "hybrid" else make_hybrid("llama", tmp_path / "source")
    quantised(source, tmp_path / "int4", SCHEMES["w4-block32"])
    figures = export(tmp_path / "int4", tmp_path / "out", "quantized", data=TEXT, prompt="int8")
    assert figures["parity_max_error"] < 1e-4
    assert 0 < figures["prompt_kl"] < 0.02
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["rounded"]["relative_rms"] > 0
    if model_type != "hybrid":  # whose four mixers keep states that onnxruntime-genai can't
        expected = OnnxModel(tmp_path / "out", threads=1).decoder(64).greedy(PROMPT, 16)[0].tolist()
        tokens = genai_tokens(tmp_path / "out", PROMPT, 16)
        assert tokens == expected[: len(tokens)]


def test_genai_takes_a_second_turn_and_goes_back(folders: dict[str, Path]) -> None:
    """Of any folder, it caches a token that it wrote with the next step only: a turn begins with the last one."""
    import onnxruntime_genai as og

    turn, first = np.arange(100, 120, dtype=np.int64), PROMPT.shape[1]
    parameters = og.GeneratorParams(model := og.Model(str(folders["int8"])))
    parameters.set_search_options(max_length=128, do_sample=False)
    generator = og.Generator(model, parameters)

    def written(ids: Any, number: int) -> list[int]:
        generator.append_tokens(np.asarray(ids).astype(np.int32))
        found = []
        for _ in range(number):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found

    def expected(*reads: Any, number: int) -> list[int]:
        decoder = OnnxModel(folders["int8"], threads=1).decoder(128)
        logits = [decoder.prefill(np.asarray(ids)) for ids in reads][-1]
        found = [int(logits.argmax())]
        while len(found) < number:
            found.append(int(decoder.step(found[-1]).argmax()))
        return found

    *cached, last = written(PROMPT[0], 4)
    assert [*cached, last] == expected(PROMPT[0], number=4)
    generator.rewind_to(first + len(cached))
    steps = [[token] for token in cached]
    assert written([last, *turn], 4) == expected(PROMPT[0], *steps, [last, *turn], number=4)
    generator.rewind_to(first)
    assert written(turn, 4) == expected(PROMPT[0], turn, number=4)


def test_it_goes_with_an_int8_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"prompt": "int8", "prompt_exceptions": (), "kv_cache": "int8"}
    figures = export(folders["quantised"], tmp_path / "out", "quantized", data=TEXT, **options)
    assert figures["parity_max_error"] < 1e-3
    assert {"kv_cache_kl", "prompt_kl"} <= figures.keys()


def test_few_tokens_are_read_by_the_weights_that_write(folders: dict[str, Path]) -> None:
    plain, both = (OnnxModel(folders[name], threads=1) for name in ("plain", "int8"))
    _, past = plain.forward(PROMPT)
    for number, alike in ((1, True), (FEW, True), (FEW + 1, False)):
        (ours, own), (theirs, other) = (model.forward(PROMPT[:, :number], None, past) for model in (both, plain))
        assert np.array_equal(ours, theirs) == alike
        assert all(map(np.array_equal, own, other)) == alike
        np.testing.assert_allclose(ours, theirs, atol=0.5)


def test_prompts_have_their_own_operators_and_the_rest_is_shared(folders: dict[str, Path]) -> None:
    whole, reads, token = graphs(folders["int8"])
    assert (reads.name, token.name) == ("prompt", "token")
    assert "MatMulNBits" not in kinds(reads)
    assert kinds(reads).count("DynamicQuantizeMatMul") == 4 * (1 + 1 + 3)  # q, k and v in one; gate and up apart
    assert kinds(token).count("MatMulNBits") == 4 * (1 + 1 + 1 + 1)
    assert kinds(whole).count("GatherBlockQuantized") == 1
    assert not reads.initializer
    assert not token.initializer
    plain = {each.name for each in next(graphs(folders["plain"])).initializer}
    own = {each.name for each in whole.initializer} - plain
    assert {re.sub(r"layers\.\d+", "layers.N", name) for name in own if ".prompt." in name} == {
        f"model.layers.N.{path}.prompt.weight.{part}" for part in ("codes", "scales")
        for path in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert all(".prompt." in name or not name.startswith("model.") for name in own)


def test_a_prompts_codes_stand_for_the_values_that_write(folders: dict[str, Path]) -> None:
    _, tensors = read_quantized(folders["quantised"])
    model = onnx.load(folders["int8"] / "model.onnx")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        codes_KN, scales_N = (stored[f"{name}.prompt.weight.{part}"] for part in ("codes", "scales"))
        written = tensors[f"{name}.weight"]
        assert isinstance(written, QTensor)
        off_KN = codes_KN * scales_N - written.dequantize().T.numpy()
        assert (np.abs(off_KN) <= scales_N / 2 * (1 + 1e-5)).all()


def test_excepted_projections_keep_the_tokens_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"prompt": "int8", "prompt_exceptions": ("down_proj", "layers.0.self_attn.v_proj")}
    export(folders["quantised"], tmp_path / "out", "quantized", data=TEXT, **options)
    _, reads, _ = graphs(tmp_path / "out")
    assert kinds(reads).count("MatMulNBits") == 4 + 1
    assert kinds(reads).count("DynamicQuantizeMatMul") == 3 * (1 + 1 + 2) + (2 + 1 + 2)
    folders = {**folders, "out": tmp_path / "out"}
    plain, out, int8 = ((folders[name] / "model.onnx.data").stat().st_size for name in ("plain", "out", "int8"))
    assert plain < out < int8


def test_auto_excepts_what_rounding_harms(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensors = read_quantized(folders["quantised"])
    harmed: dict[str, float] = {}
    errors = prompt._errors
    monkeypatch.setattr(prompt, "_errors", lambda *args: harmed.update(found := errors(*args)) or found)
    export(folders["quantised"], tmp_path / "none", "quantized", data=TEXT, prompt="int8")
    limit = float(np.median([*harmed.values()]))
    assert len(harmed) == 4 * 7
    for number, (own, left) in enumerate(((limit, 14), (0.0, 0))):
        monkeypatch.setattr(prompt, "OUTLIER_ERROR", own)
        export(folders["quantised"], tmp_path / str(number), "quantized", data=TEXT, prompt="int8")
        _, *bodies = graphs(tmp_path / str(number))
        stored = next(graphs(tmp_path / str(number))).initializer
        rows = sum(each.dims[1] for each in stored if each.name.endswith(".prompt.weight.codes"))
        expected = sum(tensors[name].shape[0] for name, error in harmed.items() if error <= own)
        assert (len(bodies), rows) == (2 if left else 0, expected)


def test_what_has_no_prompt_is_refused_by_name(pico: Pico) -> None:
    shapes = {name: shape_of(json.loads((pico(name) / "config.json").read_text())) for name in ("llama", "bert")}

    def said(model_type: str = "llama", **options: Any) -> list[str]:
        return [problem.where for problem in ExportOnnx(**options).check(shapes[model_type])]

    assert said(prompt="int8") == []
    assert said("bert", prompt="int8") == ["prompt"]
    assert said(prompt="int8", fused=False) == ["prompt"]
    assert said(prompt="int8", chunk_size=FEW) == ["chunk_size"]
    assert said(prompt="int8", prompt_exceptions=("down",)) == ["prompt_exceptions"]
    assert said(prompt_exceptions=()) == ["prompt_exceptions"]
    previous = (Quantize(scheme="w4-block32"), Quantize(scheme="w8a8-dynamic"), Distill())
    found = [[problem.where for problem in ExportOnnx(prompt="int8").check_input(each)] for each in previous]
    assert found == [[], ["prompt"], ["prompt"]]


def test_what_it_reads_and_is_keyed_by(pico: Pico) -> None:
    given = Given(shape_of(json.loads((pico("llama") / "config.json").read_text())), {INPUT: "quantized"})
    plain, auto, told = ExportOnnx(), ExportOnnx(prompt="int8"), ExportOnnx(prompt="int8", prompt_exceptions=())
    assert [each.reads() for each in (plain, auto, told)] == [set(), {"train", "eval"}, {"eval"}]
    assert not {"prompt", "prompt_exceptions"} & plain.settled(given).keys()
    assert auto.settled(given)["prompt_exceptions"] == "auto"
    assert auto.settled(given) != told.settled(given)
    assert not plain.depends_on_cpu(given)
    assert auto.depends_on_cpu(given)
