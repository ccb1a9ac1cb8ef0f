"""Our arithmetic is ONNX Runtime's: one-node models run on packed codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compress.quant.modules import QuantEmbedding, QuantLinear
from compress.quant.schemes import W4_BLOCK32, W8_BLOCK32, W8_DYNAMIC, Scheme, quantize

Arrays = Mapping[str, NDArray[Any]]


def run_onnx(nodes: Sequence[NodeProto], constants: Arrays, feeds: Arrays) -> NDArray[np.float32]:
    """The output `y` of a graph."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "graph", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(["y"], dict(feeds))[0]
    return result


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", [W4_BLOCK32, W8_BLOCK32], ids=lambda s: s.name)
@pytest.mark.parametrize("k", [80, 96])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_matmul_nbits(scheme: Scheme, k: int, symmetric: bool, accuracy_level: int) -> None:
    x = 3 * random(2, 5, k, seed=1)
    found = quantize(random(48, k, seed=2), scheme, symmetric=symmetric)
    constants = {name: part.numpy() for name, part in found.pack().items()}
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=k, N=48, bits=scheme.bits, block_size=scheme.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    ours = QuantLinear(found, None, accuracy_level)(x)
    theirs = run_onnx([node], constants, {"x": x.numpy()})
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=2e-5, atol=2e-4)
    if accuracy_level == 4:  # and not merely the float product
        assert (ours - QuantLinear(found, None)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("scheme", [W8_DYNAMIC, W8_DYNAMIC.reduced], ids=lambda s: f"{s.bits}-bit")
def test_dynamic_quantize_linear_and_matmul_integer(scheme: Scheme) -> None:
    x = 2 * random(2, 5, 96, seed=3)
    found = quantize(random(48, 96, seed=4), scheme)
    packed = found.pack()
    constants = {"codes": packed["codes"].T.contiguous().numpy(), "scales": packed["scales"][:, 0].numpy()}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["xq", "codes", "x_zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "scales"], ["scale"]),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    theirs = run_onnx(nodes, constants, {"x": x.numpy()})
    ours = QuantLinear(found, None)(x)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=2e-5, atol=2e-4)
    assert (ours - x @ found.dequantize().T).abs().max() > 1e-2


@pytest.mark.parametrize("scheme", [W4_BLOCK32, W8_BLOCK32], ids=lambda s: s.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gather_block_quantized(scheme: Scheme, symmetric: bool) -> None:
    found = quantize(random(48, 96, seed=5), scheme, symmetric=symmetric)
    packed = found.pack()
    constants = {"codes": packed["codes"].flatten(1).numpy(), "scales": packed["scales"].numpy()}
    zeros = {} if symmetric else {"zero_points": packed["zero_points"].numpy()}
    ids = np.array([[1, 5], [47, 0]])
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales", *zeros], ["y"], domain="com.microsoft",
        bits=scheme.bits, block_size=scheme.block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    theirs = run_onnx([node], {**constants, **zeros}, {"ids": ids})
    assert torch.equal(QuantEmbedding(found)(torch.from_numpy(ids)), torch.from_numpy(theirs))
