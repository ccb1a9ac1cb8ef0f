"""The same graph without rounded activations, so that its weights and its shape can be checked to the last digit.

Rounding amplifies the last bit of a float to a whole step of a code, layer after layer, and no two implementations
agree on it. With exact activations what is left is the graph itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from compress.exports.onnx.attention import CACHE_SCALES, QUANTISED_CACHE
from compress.exports.onnx.graph import MODEL_FILE
from compress.runtime.graphs import with_subgraphs

EXACT_FILE = "model.exact.onnx"
FLOAT_CACHE_FILE = "model.float_cache.onnx"
"""Beside `model.onnx`, whose data file they share; deleted after the check."""


def write_exact(folder: Path) -> bool:
    """Write `model.exact.onnx`; False, and nothing written, where nothing but weights is rounded anyway."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    before = model.graph.SerializeToString()
    _float_cache(model.graph)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for graph in reversed([*with_subgraphs(model.graph)]):  # those inside first: twins of what holds them are copies
        nodes = _Exact(graph, sizes).nodes()
        del graph.node[:]
        graph.node.extend(nodes)
    if model.graph.SerializeToString() == before:
        return False
    onnx.save(model, folder / EXACT_FILE)
    return True


def write_float_cache(folder: Path) -> None:
    """Write `model.float_cache.onnx`: the same with a cache of float32, for what its rounding costs."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    _float_cache(model.graph)
    onnx.save(model, folder / FLOAT_CACHE_FILE)


def _float_cache(graph: GraphProto) -> None:
    for node in (node for each in with_subgraphs(graph) for node in each.node):
        if node.op_type == "GroupQueryAttention":
            kept = [attribute for attribute in node.attribute if attribute.name not in QUANTISED_CACHE]
            del node.attribute[:]
            node.attribute.extend(kept)
            del node.input[CACHE_SCALES:]
    for value in (value for each in with_subgraphs(graph) for value in (*each.input, *each.output)):
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


class _Exact:
    """The twins of the nodes of one graph. sizes: of the weights."""

    def __init__(self, graph: GraphProto, sizes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph, self._sizes = graph, sizes
        self._activations = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
        self._twins: Mapping[str, Callable[[NodeProto], Iterable[NodeProto]]] = {
            "MatMulNBits": self._n_bits,
            "DynamicQuantizeLinear": self._unrounded,
            "QuantizeLinear": self._same,
            "DequantizeLinear": self._dequantised,
            "MatMulInteger": self._integers,
            "DynamicQuantizeMatMul": self._dynamic,
        }

    def nodes(self) -> list[NodeProto]:
        """All of them, in the order of the graph."""
        return [twin for node in self._graph.node for twin in self._twins.get(node.op_type, _itself)(node)]

    def _n_bits(self, node: NodeProto) -> Iterable[NodeProto]:
        twin = NodeProto()
        twin.CopyFrom(node)
        for attribute in twin.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        return [twin]

    def _same(self, node: NodeProto) -> Iterable[NodeProto]:
        return [helper.make_node("Identity", [node.input[0]], [node.output[0]], f"{node.name}/exact/same")]

    def _unrounded(self, node: NodeProto) -> Iterable[NodeProto]:
        """The activations as they are, with a scale of 1."""
        one = helper.make_node("Constant", [], [node.output[1]], f"{node.name}/exact/one", value_float=1.0)
        return [*self._same(node), one]

    def _integers(self, node: NodeProto) -> Iterable[NodeProto]:
        name, codes = f"{node.name}/exact", f"{node.output[0]}.codes"
        cast = helper.make_node("Cast", [node.input[1]], [codes], f"{name}/codes", to=TensorProto.FLOAT)
        return [cast, helper.make_node("MatMul", [node.input[0], codes], node.output, f"{name}/product")]

    def _dynamic(self, node: NodeProto) -> Iterable[NodeProto]:
        x, codes, scales, _, bias = (*node.input, "", "")[:5]
        name, (out,) = f"{node.name}/exact", node.output
        floats, weight, product = f"{out}.codes", f"{out}.weight", f"{out}.product" if bias else out
        twins = [
            helper.make_node("Cast", [codes], [floats], f"{name}/codes", to=TensorProto.FLOAT),
            helper.make_node("Mul", [floats, scales], [weight], f"{name}/weight"),
            helper.make_node("MatMul", [x, weight], [product], f"{name}/product"),
        ]
        return [*twins, helper.make_node("Add", [product, bias], [out], f"{name}/bias")] if bias else twins

    def _dequantised(self, node: NodeProto) -> Iterable[NodeProto]:
        """A weight spelled out: a `DequantizeLinear` would be taken into operators that round what they multiply."""
        if node.input[0] in self._activations:
            return self._same(node)
        options = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scales, *zeros = node.input
        name, (out,) = f"{node.name}/exact", node.output
        nodes = [helper.make_node("Cast", [codes], [f"{out}.codes"], f"{name}/codes", to=TensorProto.FLOAT)]
        floats = f"{out}.codes"
        if size := options.get("block_size", 0):
            block_of = np.arange(self._sizes[codes][options["axis"]]) // size
            nodes.append(helper.make_node("Constant", [], [f"{out}.block"], value=numpy_helper.from_array(block_of)))
            nodes.append(helper.make_node("Cast", zeros, [f"{out}.zeros"], f"{name}/zeros", to=TensorProto.FLOAT))
            for value, wide in ((scales, "scale"), (f"{out}.zeros", "zero")):
                inputs, axis = [value, f"{out}.block"], options["axis"]
                nodes.append(helper.make_node("Gather", inputs, [f"{out}.{wide}"], f"{name}/{wide}", axis=axis))
            nodes.append(helper.make_node("Sub", [floats, f"{out}.zero"], [f"{out}.centred"], f"{name}/centred"))
            floats, scales = f"{out}.centred", f"{out}.scale"
        return [*nodes, helper.make_node("Mul", [floats, scales], [out], f"{name}/weight")]


def _itself(node: NodeProto) -> Iterable[NodeProto]:
    return [node]
