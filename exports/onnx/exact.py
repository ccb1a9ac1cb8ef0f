"""The same graph without rounded activations, so that its weights and its shape can be checked to the last digit.

Rounding amplifies the last bit of a float to a whole step of a code, layer after layer, and no two implementations
agree on it. With exact activations what is left is the graph itself.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, helper

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
    if node.op_type == "MatMulNBits":
        twin = NodeProto()
        twin.CopyFrom(node)
        for attribute in twin.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        return [twin]
    if node.op_type != "DynamicQuantizeMatMul":
        return [node]
    x, codes, scales, _, bias = (*node.input, "", "")[:5]
    (out,) = node.output
    weight, product = f"{out}.weight", f"{out}.product" if bias else out
    twins = [
        helper.make_node("DequantizeLinear", [codes, scales], [weight], f"{node.name}/exact/weight", axis=1),
        helper.make_node("MatMul", [x, weight], [product], f"{node.name}/exact/product"),
    ]
    return [*twins, helper.make_node("Add", [product, bias], [out], f"{node.name}/exact/bias")] if bias else twins
