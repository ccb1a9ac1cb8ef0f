"""The same graph without rounded activations, so that its weights and its shape can be checked to the last digit.

Rounding amplifies the last bit of a float to a whole step of a code, layer after layer, and no two implementations
agree on it. With exact activations what is left is the graph itself.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from compress.exports.onnx.graph import MODEL_FILE

EXACT_FILE = "model.exact.onnx"
"""Beside `model.onnx`, whose data file it shares; deleted after the check."""


def write_exact(folder: Path) -> bool:
    """Write `model.exact.onnx`; False, and nothing written, where no activation is rounded anyway."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    nodes = [twin for node in model.graph.node for twin in _exact(node)]
    if nodes == list(model.graph.node):
        return False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / EXACT_FILE)
    return True


def _exact(node: NodeProto) -> list[NodeProto]:
    """What computes the same without rounding. Weights are cast, as a `DequantizeLinear` would be fused again."""
    twin = NodeProto()
    twin.CopyFrom(node)
    name, out = f"{node.name}/exact", list(node.output)
    if node.op_type == "MatMulNBits":
        for attribute in twin.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        return [twin]
    if node.op_type == "DynamicQuantizeLinear":  # the activations as they are, with a scale of 1
        one = helper.make_node("Constant", [], [out[1]], f"{name}/one", value_float=1.0)
        return [helper.make_node("Identity", [node.input[0]], [out[0]], f"{name}/same"), one]
    if node.op_type == "MatMulInteger":
        cast = helper.make_node("Cast", [node.input[1]], [f"{out[0]}.codes"], f"{name}/codes", to=TensorProto.FLOAT)
        return [cast, helper.make_node("MatMul", [node.input[0], f"{out[0]}.codes"], out, f"{name}/product")]
    if node.op_type != "DynamicQuantizeMatMul":
        return [node]
    x, codes, scales, _, bias = (*node.input, "", "")[:5]
    floats, weight, product = f"{out[0]}.codes", f"{out[0]}.weight", f"{out[0]}.product" if bias else out[0]
    twins = [
        helper.make_node("Cast", [codes], [floats], f"{name}/codes", to=TensorProto.FLOAT),
        helper.make_node("Mul", [floats, scales], [weight], f"{name}/weight"),
        helper.make_node("MatMul", [x, weight], [product], f"{name}/product"),
    ]
    return [*twins, helper.make_node("Add", [product, bias], out, f"{name}/bias")] if bias else twins
