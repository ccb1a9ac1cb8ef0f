"""Toy ONNX models, made by hand: what the worker and the stage need to see of an export, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

VOCAB_SIZE, HIDDEN = 32, 4


def _save(folder: Path, nodes: list[onnx.NodeProto], inputs: dict, outputs: dict) -> Path:  # type: ignore[type-arg]
    def infos(shapes: dict) -> list[onnx.ValueInfoProto]:  # type: ignore[type-arg]
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]

    table = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1], np.int64), "one")]
    graph = helper.make_graph(nodes, "toy", infos(inputs), infos(outputs), weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture
def toy_decoder(tmp_path: Path) -> Callable[[str], Path]:
    """`toy_decoder(name)`: a bigram model whose cache is the embeddings of all tokens so far."""
    cache = (TensorProto.FLOAT, ["batch", 1, "past", VOCAB_SIZE])
    grown = (TensorProto.FLOAT, ["batch", 1, "total", VOCAB_SIZE])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Unsqueeze", ["logits", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
    ]
    inputs = {
        "input_ids": (TensorProto.INT64, ["batch", "new"]),
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    outputs = {
        "logits": (TensorProto.FLOAT, ["batch", "new", VOCAB_SIZE]),
        "present.0.key": grown,
        "present.0.value": grown,
    }
    return lambda name: _save(tmp_path / name, nodes, inputs, outputs)


@pytest.fixture
def toy_encoder(tmp_path: Path) -> Callable[[str], Path]:
    """`toy_encoder(name)`: embeddings alone."""
    inputs = {"input_ids": (TensorProto.INT64, ["batch", "sequence"])}
    outputs = {"last_hidden_state": (TensorProto.FLOAT, ["batch", "sequence", VOCAB_SIZE])}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    return lambda name: _save(tmp_path / name, nodes, inputs, outputs)
