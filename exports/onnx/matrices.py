"""A quantised weight as ONNX nodes: its codes lie in the file as they were found, whatever computes with them.

Shapes: x `(…, K)` → `(…, N)`; G blocks of a row of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.exports.onnx.graph import Graph
from compress.quant.qtensor import QTensor
from compress.quant.schemes import ACCURACY_LEVEL


@dataclass(frozen=True)
class Matrix:
    """The weight `(N, K)` called `name` in `graph`, stored when it is first used.

    fused: by `MatMulNBits`, `GatherBlockQuantized` and `DynamicQuantizeMatMul`; else by standard operators. is_table:
    it is an embedding, and perhaps the head too: its rows lie in the order in which they are gathered.
    """

    graph: Graph
    name: str
    tensor: QTensor
    fused: bool
    is_table: bool = False

    def project(self, x: str, bias: str = "") -> str:
        """`x Wᵀ + bias`, the activations rounded as the scheme says."""
        scheme = self.tensor.scheme
        if self.fused and scheme.blockwise:
            return self._n_bits(x, bias)
        if self.fused and scheme.dynamic:
            rest = ["", bias] if bias else []
            return self.graph.fused("DynamicQuantizeMatMul", x, *self._channels(), *rest)
        if scheme.dynamic:
            product = self._integers(x)
        else:
            product = self.graph.op("MatMul", self._rounded(x) if scheme.static else x, self._floats_KN())
        return self.graph.op("Add", product, bias) if bias else product

    def gather(self, ids: str) -> str:
        """The rows of `ids`, of a block-wise scheme."""
        scheme, graph = self.tensor.scheme, self.graph
        if not self.fused:
            return graph.op("Gather", self._floats_NK(), ids, axis=0)
        codes, scales, zeros = self._blocks()
        flat = graph.op("Reshape", codes, graph.ints(self.tensor.shape[0], -1))
        options = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
        rows = graph.fused("GatherBlockQuantized", flat, ids, scales, *([zeros] if zeros else []), **options)
        k = self.tensor.shape[1]
        return graph.op("Slice", rows, graph.ints(0), graph.ints(k), graph.ints(-1)) if k % scheme.block_size else rows

    def _n_bits(self, x: str, bias: str) -> str:
        (n, k), scheme = self.tensor.shape, self.tensor.scheme
        inputs = [x, *self._blocks(), "", bias]
        while not inputs[-1]:
            inputs.pop()
        options = {"K": k, "N": n, "bits": scheme.bits, "block_size": scheme.block_size}
        return self.graph.fused("MatMulNBits", *inputs, **options, accuracy_level=ACCURACY_LEVEL)

    def _integers(self, x: str) -> str:
        graph, (codes, scales) = self.graph, self._channels()
        x_codes, x_scale, x_zero = graph.ops("DynamicQuantizeLinear", [x], 3)
        whole = graph.op("Cast", graph.op("MatMulInteger", x_codes, codes, x_zero), to=1)
        return graph.op("Mul", whole, graph.op("Mul", x_scale, scales))

    def _rounded(self, x: str) -> str:
        """x through its codes; ONNX Runtime takes them, and the weight's, into `MatMulIntegerToFloat`."""
        assert self.tensor.input_range
        scale, zero = self.tensor.input_range
        range_ = self.graph.scalar(scale.item()), self.graph.scalar(int(zero), np.uint8)
        return self.graph.op("DequantizeLinear", self.graph.op("QuantizeLinear", x, *range_), *range_)

    def _floats_KN(self) -> str:
        """The weight transposed: the form in which ONNX Runtime takes a block-wise one into `MatMulNBits`."""
        graph, block_size = self.graph, self.tensor.scheme.block_size
        if not self.tensor.scheme.blockwise:
            return graph.op("DequantizeLinear", *self._channels(), axis=1)
        if self.is_table:
            return graph.op("Transpose", self._floats_NK(), perm=(1, 0))
        return graph.op("DequantizeLinear", *self._plain(transposed=True), axis=0, block_size=block_size)

    def _floats_NK(self) -> str:
        block_size = self.tensor.scheme.block_size
        return self.graph.op("DequantizeLinear", *self._plain(transposed=False), axis=1, block_size=block_size)

    def _blocks(self) -> tuple[str, str, str]:
        """Codes, scales and zero points (`""`: none) as `MatMulNBits` wants them, which is how they are stored."""
        codes, scales, zeros = (f"{self.name}.weight.{part}" for part in ("codes", "scales", "zero_points"))
        if not self.graph.has_weight(codes):
            for part, packed in self.tensor.pack().items():
                self.graph.weight(f"{self.name}.weight.{part}", packed.numpy())
        return codes, scales, "" if self.tensor.zero_point is None else zeros

    def _channels(self) -> tuple[str, str]:
        """Codes `(K, N)` and the scales of N."""
        tensor = self.tensor
        return self._weight("codes", tensor.codes.T.numpy()), self._weight("scales", tensor.scale[:, 0].numpy())

    def _plain(self, *, transposed: bool) -> tuple[str, str, str]:
        """Codes `(N, K)` of 4 bits or 8, scales and zero points `(N, G)` as `DequantizeLinear` wants them."""
        tensor, nibbles = self.tensor, self.tensor.scheme.bits == 4
        zeros = tensor.codes.new_full(tensor.scale.shape, tensor.scheme.midpoint)
        zeros = zeros if tensor.zero_point is None else tensor.zero_point
        codes, scales, zeros = (part.T if transposed else part for part in (tensor.codes, tensor.scale, zeros))
        return (
            self._weight("codes", codes.numpy(), nibbles=nibbles), self._weight("scales", scales.numpy()),
            self._weight("zero_points", zeros.numpy(), nibbles=nibbles),
        )  # fmt: skip

    def _weight(self, part: str, array: NDArray[np.generic], *, nibbles: bool = False) -> str:
        name = f"{self.name}.weight.{part}"
        return name if self.graph.has_weight(name) else self.graph.weight(name, array, nibbles=nibbles)
