"""What an ONNX graph says of itself: which operator computes with each of its weights, which are not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_PRODUCTS = {
    "MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "Gather",
    "GatherBlockQuantized",
}  # fmt: skip
"""What multiplies by a matrix, or takes rows of it."""
_ON_THE_WAY = {"DequantizeLinear", "Transpose", "Reshape", "Cast"}
"""What a stored weight goes through before."""
_MIXING = {"GroupQueryAttention", "MultiHeadAttention", "Attention", "LinearAttention", "CausalConvWithState", "Scan"}
"""What mixes the tokens of a layer."""
_LAYER = re.compile(r"(?:.*?[./])?(\d+)[./](.+)")
"""(layer, path within the layer) of a module's path or a node's name."""
_WEIGHT = re.compile(r"(.+?)(?:\.prompt)?\.weight(?:\.\w+)?")
"""The module's path of a weight's name."""
_BITS = {"UINT4": 4, "INT4": 4, "INT8": 8, "UINT8": 8}
_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


@dataclass(frozen=True)
class Use:
    """One operator of a graph, and the weight that it computes with.

    layer: None outside the layers. path: the module's, within its layer; of an operator without weights the name of
    its place. operator: what the weight goes through on the way is before an arrow. weights: how it is stored, and what
    becomes of the numbers that it is multiplied by. body: of a graph with two, `prompt` or `token`; else `""`.
    """

    layer: int | None
    path: str
    operator: str
    weights: str = ""
    body: str = ""
    num_bytes: int = 0


def with_subgraphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every one inside it: bodies of loops, branches."""
    from onnx import AttributeProto

    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from with_subgraphs(attribute.g)


def operators_of(file: Path) -> list[Use]:
    """Every matrix of the graph in `file` with what computes with it, in the graph's order, and what mixes the tokens
    of each layer. Nothing of a file that is no ONNX graph."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except DecodeError:
        return []
    return list(dict.fromkeys(_Reader(graph).uses(graph, "")))


class _Reader:
    """Looks the weights of a graph up by name: what is inside a branch sees them too."""

    def __init__(self, graph: GraphProto) -> None:
        self._weights = {tensor.name: tensor for each in with_subgraphs(graph) for tensor in each.initializer}
        self._num_bytes: dict[str, int] = {}
        for name, tensor in self._weights.items():
            whole = name.rpartition(".weight")[0]  # codes, scales and zero points are parts of it
            self._num_bytes[whole] = self._num_bytes.get(whole, 0) + _num_bytes(tensor)

    def uses(self, graph: GraphProto, body: str) -> Iterator[Use]:
        """Those of one graph, and of what is inside it."""
        made = {value: node for node in graph.node for value in node.output}
        for node in graph.node:
            if node.op_type in _MIXING and (place := _LAYER.fullmatch(node.name)):
                yield Use(int(place[1]), place[2].rpartition("/")[0], node.op_type, body=body)
            if node.op_type in _PRODUCTS and (use := self._product(node, made, body)):
                yield use
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from self.uses(attribute.g, attribute.g.name if node.op_type == "If" else body)

    def _product(self, node: NodeProto, made: Mapping[str, NodeProto], body: str) -> Use | None:
        """None of a product of activations."""
        for value in node.input:
            readers = [node]
            while value in made and made[value].op_type in _ON_THE_WAY:
                readers.insert(0, made[value])
                value = made[value].input[0]
            weight, name = self._weights.get(value), _WEIGHT.fullmatch(value)
            if weight is None or name is None or len(weight.dims) < 2:
                continue
            place = _LAYER.fullmatch(name[1])
            kinds = [each.op_type for each in readers if each is node or each.op_type == "DequantizeLinear"]
            weights = ", ".join(filter(None, (_stored(weight, readers), _rounded(node, made))))
            num_bytes = self._num_bytes[value.rpartition(".weight")[0]]
            layer, path = (int(place[1]), place[2]) if place else (None, name[1])
            return Use(layer, path, " → ".join(kinds), weights, body, num_bytes)
        return None


def _stored(weight: TensorProto, readers: Sequence[NodeProto]) -> str:
    """How a weight is stored, as the nodes that read it say: `4 bits, block 32`, `int8`, `float32`."""
    from onnx import TensorProto

    options = {each.name: each.i for node in readers for each in node.attribute}
    kind = str(TensorProto.DataType.Name(weight.data_type))
    if kind not in _BITS:
        return _FLOATS.get(kind, kind.lower())
    bits, block_size = options.get("bits", _BITS[kind]), options.get("block_size", 0)
    return f"{bits} bits, block {block_size}" if block_size else f"int{bits}"


def _rounded(node: NodeProto, made: Mapping[str, NodeProto]) -> str:
    """What becomes of the activations that a node multiplies by its weight; `""`: nothing."""
    if node.op_type == "MatMulNBits":
        return f"accuracy {next((each.i for each in node.attribute if each.name == 'accuracy_level'), 0)}"
    if node.op_type in ("DynamicQuantizeMatMul", "MatMulInteger"):
        return "activations uint8 by each call's range"
    source = made.get(node.input[0])
    if node.op_type == "MatMul" and source is not None and source.op_type == "DequantizeLinear":
        return "activations uint8 by a stored range"
    return ""


def _num_bytes(tensor: TensorProto) -> int:
    length = next((int(each.value) for each in tensor.external_data if each.key == "length"), None)
    return len(tensor.raw_data) if length is None else length
