"""Folders that others made: which graph is meant, what its config may name, and what its numbers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.benchmarks.genai import with_threads
from compress.benchmarks.scorers import open_scorer, task_of
from compress.cli.bench import bench
from compress.errors import CompressError, InvalidInput
from compress.runtime.session import OnnxModel, graph_file

FLOAT, FLOAT16, BFLOAT16, DOUBLE = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE,
)  # fmt: skip
TABLE_VH = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32) * 3
IDS = np.array([[3, 1, 4]])


def write(file: Path, *, logits: int = FLOAT, cache: int | None = FLOAT, rank: int = 3) -> Path:
    """A bigram model, with a cache of its embeddings unless that is None, or a classifier (rank 2); its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    nodes.append(helper.make_node("ReduceMean", ["rows", "one"], ["said"], keepdims=0) if rank == 2 else
                 helper.make_node("Identity", ["rows"], ["said"]))  # fmt: skip
    nodes += [helper.make_node("Cast", ["said"], ["logits"], to=logits)]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])]
    outputs = [helper.make_tensor_value_info("logits", logits, ["B", "T", 16] if rank == 3 else ["B", 16])]
    for part in () if cache is None else ("key", "value"):
        past, present = f"past_key_values.0.{part}", f"present.0.{part}"
        nodes += [
            helper.make_node("Unsqueeze", ["rows", "one"], [f"row.{part}"]),
            helper.make_node("Cast", [f"row.{part}"], [f"new.{part}"], to=cache),
            helper.make_node("Concat", [past, f"new.{part}"], [present], axis=2),
        ]
        inputs.append(helper.make_tensor_value_info(past, cache, ["B", 1, "P", 16]))
        outputs.append(helper.make_tensor_value_info(present, cache, ["B", 1, "N", 16]))
    weights = [numpy_helper.from_array(TABLE_VH, "table"), numpy_helper.from_array(np.array([1]), "one")]
    model = helper.make_model(helper.make_graph(nodes, "toy", inputs, outputs, weights))
    model.opset_import[0].version, model.ir_version = 21, 10
    onnx.save(model, file)
    return file.parent


def said(folder: Path, config: object) -> Path:
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("logits", [FLOAT, FLOAT16, BFLOAT16, DOUBLE])
def test_logits_are_read_as_what_they_are(logits: int, tmp_path: Path) -> None:
    model = OnnxModel(write(tmp_path / "model.onnx", logits=logits), threads=1)
    close = {"rtol": 1e-2, "atol": 1e-2} if logits in (FLOAT16, BFLOAT16) else {"rtol": 1e-6}
    whole, past = model.forward(IDS)
    np.testing.assert_allclose(whole[0].astype(np.float64), TABLE_VH[IDS[0]], **close)
    assert (past.length, past[0].shape) == (3, (1, 1, 3, 16))
    decoder = model.decoder(8)
    np.testing.assert_allclose(decoder.prefill(IDS).astype(np.float64), TABLE_VH[[4]], **close)
    np.testing.assert_allclose(decoder.step(7).astype(np.float64), TABLE_VH[[7]], **close)
    rows = open_scorer(tmp_path, "causal", threads=1)(IDS[0])
    np.testing.assert_allclose(rows.astype(np.float64), TABLE_VH[IDS[0]], **close)


def test_a_double_is_cached_as_one_and_bfloat16_is_refused(tmp_path: Path) -> None:
    assert OnnxModel(write(tmp_path / "double/model.onnx", cache=DOUBLE)).cache[0].dtype == np.float64
    with pytest.raises(CompressError, match=r"caches past_key_values\.0\.key as tensor\(bfloat16\)"):
        OnnxModel(write(tmp_path / "wide/model.onnx", cache=BFLOAT16))


def test_the_only_graph_is_the_one_that_is_meant(tmp_path: Path) -> None:
    folder = write(tmp_path / "model_quantized.onnx")
    assert graph_file(folder).name == "model_quantized.onnx"
    assert OnnxModel(folder, threads=1).is_decoder
    write(tmp_path / "other.onnx")
    for refused in (OnnxModel, lambda folder: bench([folder])):
        with pytest.raises(
            CompressError, match=r"2 graphs, and none of them is model\.onnx: model_quantized\.onnx"
        ):
            refused(folder)
    write(tmp_path / "model.onnx")
    assert graph_file(folder).name == "model.onnx"
    assert graph_file(said(folder, {"model": {"decoder": {"filename": "other.onnx"}}})).name == "other.onnx"


@pytest.mark.parametrize(
    "model",
    [
        {"decoder": {"filename": "../other.onnx"}},
        {"decoder": {"filename": "/tmp/other.onnx"}},
        {"decoder": {"filename": "a\\..\\..\\other.onnx"}},
        {"decoder": {"filename": 3}},
        {"decoder": {"filename": "model.onnx"}, "vision": {"config_filename": "../../secret.json"}},
        {"decoder": {"pipeline": [{"first": {"filename": "/other.onnx"}}]}},
        {"decoder": {"session_options": {"optimized_model_filepath": "../../written.onnx"}}},
    ],
)
def test_a_config_names_no_file_outside_of_its_folder(model: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "other.onnx")
    folder = said(write(tmp_path / "in" / "model.onnx"), {"model": model})
    pattern = r"genai_config\.json: names a file outside of its folder: "
    for refused in (OnnxModel, lambda folder: with_threads(folder, 1, tmp_path / "copy")):
        with pytest.raises(CompressError, match=pattern):
            refused(folder)
    with pytest.raises(InvalidInput, match=pattern):
        bench([folder])


@pytest.mark.parametrize("config", [[], "x", {"model": []}, {"model": {"decoder": "model.onnx"}}])
def test_a_config_that_is_none(config: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has no mapping model\.decoder"):
        bench([said(write(tmp_path / "model.onnx"), config)])


@pytest.mark.parametrize("place", ["../w.data", "ABSOLUTE"])
def test_weights_outside_of_the_folder_are_not_read(place: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in" / "model.onnx")
    (tmp_path / "w.data").write_bytes(TABLE_VH.tobytes())
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place.replace("ABSOLUTE", str(tmp_path / "w.data")))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompressError, match=r"can't open it: .*[Ee]xternal data"):
        OnnxModel(folder)


def test_what_a_graph_without_a_config_is_for(tmp_path: Path) -> None:
    classifier = write(tmp_path / "classifier/model.onnx", cache=None, rank=2)
    with pytest.raises(CompressError, match=r"a graph without a cache, and no config\.json that says what it is for"):
        open_scorer(classifier, task_of(classifier), threads=1)
    (classifier / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CompressError, match="gives no logits of each token, but logits"):
        open_scorer(classifier, task_of(classifier), threads=1)
    (classifier / "config.json").write_text("{")
    with pytest.raises(CompressError, match=r"has no readable config\.json"):
        task_of(classifier)


def test_a_decoder_without_a_cache_reads_all_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "model.onnx", cache=None)
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    ids_T = np.random.default_rng(0).integers(0, 16, 1500)
    np.testing.assert_array_equal(open_scorer(folder, "causal", threads=1)(ids_T), TABLE_VH[ids_T])
