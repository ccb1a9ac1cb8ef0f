"""An ONNX graph as lines of text: what computes what, from what, with which attributes. Values' names do not count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def graph_of(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The graph in `folder`, and its weights and constants by name."""
    model = onnx.load(folder / "model.onnx")
    weights = model.graph.initializer
    names = {each.name: f"scalar.{number}" if _is_scalar(each) else each.name for number, each in enumerate(weights)}
    arrays = {names[each.name]: numpy_helper.to_array(each) for each in weights}
    return {
        "opsets": {opset.domain: opset.version for opset in model.opset_import},
        "metadata": {each.key: each.value for each in model.metadata_props},
        "inputs": [_value(each) for each in model.graph.input],
        "outputs": [_value(each) for each in model.graph.output],
        "nodes": list(_nodes(model.graph, names, itertools.count())),
    }, arrays  # fmt: skip


def _nodes(graph: onnx.GraphProto, known: dict[str, str], numbers: Iterator[int]) -> Iterator[str]:
    """`%3, %4 = domain.Kind(a, %2) {attribute: value}`, a graph's own graphs in their place."""
    known = known | {each.name: each.name for each in graph.input}
    outputs = {each.name for each in graph.output}
    for node in graph.node:
        for name in node.output:
            known[name] = name if name in outputs and "/" not in name else f"%{next(numbers)}"
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        own = {name: value for name, value in told.items() if not isinstance(value, onnx.GraphProto)}
        text = ", ".join(f"{name}: {_attribute(value)}" for name, value in sorted(own.items()))
        made, given = (", ".join(known[name] if name else "" for name in names) for names in (node.output, node.input))
        yield f"{made} = {kind}({given})" + (f" {{{text}}}" if text else "")
        for name, value in sorted(told.items()):
            if isinstance(value, onnx.GraphProto):
                yield f"{name}: ({', '.join(map(_value, value.input))})"
                yield from _nodes(value, known, numbers)
    yield f"return {', '.join(known[each.name] for each in graph.output)}"


def _is_scalar(tensor: onnx.TensorProto) -> bool:
    """Whether it is a number, which the builder names by its value: rounded otherwise it would have another name."""
    return not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT


def _attribute(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return str(numpy_helper.to_array(value).tolist())
    return f"{value:.6g}" if isinstance(value, float) else str(list(value) if hasattr(value, "__iter__") else value)


def _value(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    sizes = ", ".join(each.dim_param or str(each.dim_value) for each in kind.shape.dim)
    return f"{value.name}: {helper.tensor_dtype_to_np_dtype(kind.elem_type)} ({sizes})"
