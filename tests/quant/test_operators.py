"""Our arithmetic is ONNX Runtime's: one-node models run on packed codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compress.quant.modules import QuantEmbedding, QuantLinear
from compress.quant.qtensor import QTensor
from compress.quant.rounding import activation_range, quantize, round_activations
from compress.quant.schemes import SCHEMES, W4_BLOCK32, W8A8_DYNAMIC, W8A8_STATIC, Scheme

Arrays = Mapping[str, NDArray[Any]]
SYMMETRIC = [scheme for scheme in SCHEMES.values() if scheme.blockwise]
BLOCKWISE = [*SYMMETRIC, *(scheme.asymmetric for scheme in SYMMETRIC if not scheme.ternary)]


def label(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.bits}" + ("" if scheme.symmetric else "-asymmetric")


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


def assert_same(ours: torch.Tensor, theirs: NDArray[np.float32]) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=2e-5, atol=5e-4)


def matmul_nbits(found: QTensor, x: torch.Tensor, accuracy_level: int) -> NDArray[np.float32]:
    """`x Wᵀ` by the operator, of packed codes."""
    (n, k), constants = found.shape, {name: part.numpy() for name, part in found.pack().items()}
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=k, N=n, bits=found.scheme.bits, block_size=found.scheme.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    return run_onnx([node], constants, {"x": x.numpy()})


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("scheme", BLOCKWISE, ids=label)
def test_matmul_nbits(scheme: Scheme, accuracy_level: int) -> None:
    """Rows that fill their blocks and rows that do not; one token and several, which other kernels compute."""
    for k in (3 * scheme.block_size, 2 * scheme.block_size + 5):
        found = quantize(random(48, k, seed=2), scheme)
        ours = QuantLinear(found, None, accuracy_level)
        for x in (3 * random(2, 5, k, seed=1), 3 * random(1, 1, k, seed=3)):
            assert_same(ours(x), matmul_nbits(found, x, accuracy_level))
            change = (ours(x) - QuantLinear(found, None)(x)).abs().max()
            assert change > 1e-2 if scheme.rounds_activations(accuracy_level) else change == 0


def test_a_bias_and_rows_of_odd_number() -> None:
    found, bias, x = quantize(random(7, 64, seed=2), W4_BLOCK32), random(7, seed=4), random(3, 64, seed=1)
    assert_same(QuantLinear(found, bias, 4)(x), matmul_nbits(found, x, 4) + bias.numpy())


def weights_for(scheme: Scheme) -> torch.Tensor:
    """(48, 96). With 8-bit codes every second column is 0: without VNNI the sum of two products can exceed int16."""
    weight_NK = random(48, 96, seed=4)
    if scheme.limits[1] > 64:
        weight_NK[:, 1::2] = 0
    return weight_NK


@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, W8A8_DYNAMIC.reduced], ids=label)
def test_dynamic_quantize_linear_and_matmul_integer(scheme: Scheme) -> None:
    x = 2 * random(2, 5, 96, seed=3) + 0.5
    found = quantize(weights_for(scheme), scheme)
    packed = found.pack()
    constants = {"codes": packed["codes"].T.contiguous().numpy(), "scales": packed["scales"][:, 0].numpy()}
    standard = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["xq", "codes", "x_zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "scales"], ["scale"]),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    fused = [helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")]
    ours = QuantLinear(found, None)(x)
    for nodes in (standard, fused):
        assert_same(ours, run_onnx(nodes, constants, {"x": x.numpy()}))
    assert (ours - x @ found.dequantize().T).abs().max() > 1e-2


def test_rounded_activations_are_equal_to_the_bit() -> None:
    for low, high in ((-3.0, 2.0), (0.5, 4.0), (-9.0, -1.0), (-1e-6, 7e3)):
        x = low + (high - low) * torch.rand(5000, generator=torch.Generator().manual_seed(0))
        back = helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["y"])
        dynamic = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "scale", "zero"]), back]
        theirs = torch.from_numpy(run_onnx(dynamic, {}, {"x": x.numpy()}))
        assert torch.equal(round_activations(x, W8A8_DYNAMIC), theirs)
        found = activation_range(x.quantile(0.01), x.quantile(0.99))
        constants = {"scale": found[0].numpy(), "zero": found[1].numpy()}
        static = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]), back]
        theirs = torch.from_numpy(run_onnx(static, constants, {"x": x.numpy()}))
        assert torch.equal(round_activations(x, W8A8_STATIC, input_range=found), theirs)


@pytest.mark.parametrize("scheme", [W8A8_STATIC, W8A8_STATIC.reduced], ids=label)
def test_static_quantize_and_dequantize_linear(scheme: Scheme) -> None:
    x = 2 * random(2, 5, 96, seed=3)  # beyond the range, on both sides
    scale, zero_point = activation_range(torch.tensor(-3.0), torch.tensor(2.0))
    found = replace(quantize(weights_for(scheme), scheme), input_scale=scale, input_zero_point=zero_point)
    packed = {name: part.numpy() for name, part in found.pack().items()}
    x_range = ["input_scale", "input_zero_point"]
    constants = {**packed, "codes": packed["codes"].T.copy(), "scales": packed["scales"][:, 0]}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *x_range], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", *x_range], ["rounded"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=1),
        helper.make_node("MatMul", ["rounded", "weight"], ["y"]),
    ]
    ours = QuantLinear(found, None)(x)
    assert_same(ours, run_onnx(nodes, constants, {"x": x.numpy()}))
    assert (ours - x @ found.dequantize().T).abs().max() > 1e-2


@pytest.mark.parametrize("scheme", BLOCKWISE, ids=label)
def test_gather_block_quantized(scheme: Scheme) -> None:
    found = quantize(random(48, 3 * scheme.block_size, seed=5), scheme)
    packed = {name: part.numpy() for name, part in found.pack().items()}
    constants = {**packed, "codes": packed["codes"].reshape(48, -1)}
    zeros = [name for name in packed if name == "zero_points"]
    ids = np.array([[1, 5], [47, 0]])
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales", *zeros], ["y"], domain="com.microsoft",
        bits=scheme.bits, block_size=scheme.block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    theirs = run_onnx([node], constants, {"ids": ids})
    assert torch.equal(QuantEmbedding(found)(torch.from_numpy(ids)), torch.from_numpy(theirs))
