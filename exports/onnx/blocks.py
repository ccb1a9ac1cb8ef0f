"""The parts of a transformer as ONNX nodes: matrices by the kind of their tensor, norms, activations, embeddings.

A `Blocks` with `fused` uses ONNX Runtime's own operators, one without it standard ones only. Values are `(B, T, …)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.exports.onnx.graph import MICROSOFT, Graph
from compress.exports.onnx.matrices import Matrix
from compress.exports.onnx.weights import Model, array, stack_rows, stackable
from compress.quant.qtensor import QTensor


@dataclass(frozen=True)
class Stream:
    """The residual stream: `value`, to which `addend` (`""`: nothing) is still to be added by the next norm."""

    value: str
    addend: str = ""


@dataclass(frozen=True)
class Blocks:
    """Emits the parts of `model` into `graph`.

    reads: for the prompts of a model that reads them by other weights than it writes by.
    """

    graph: Graph
    model: Model
    fused: bool
    reads: bool = False

    def linear(
        self, x: str, *paths: str, name: str = "", rows: NDArray[np.int64] | None = None, constant: float = 0.0
    ) -> str:
        """`x Wᵀ + b` of the module at each path, side by side along the last axis, its channels reordered by `rows`.

        name: what the stacked weight is called. constant: what a channel −1 of `rows` is, whatever x.
        """
        name = name or paths[0]
        weight = stack_rows([self.model.matrix(path) for path in paths], rows)
        bias = self._bias(name, paths, rows, constant)
        if isinstance(weight, QTensor):
            name = f"{name}.prompt" if self.reads and weight.scheme.dynamic else name
            return Matrix(self.graph, name, weight, self.fused).project(x, bias)
        product = self.graph.op("MatMul", x, self.graph.weight(f"{name}.weight", array(weight).T))
        return self.graph.op("Add", product, bias) if bias else product

    def linears(self, x: str, *paths: str, name: str) -> tuple[str, ...]:
        """`linear` of each path: by one operator, which reads and rounds x once, where one can hold them all.

        name: what the stacked weight is called. Of a prompt, splitting what comes out costs more than it saves.
        """
        if self.reads or not self.can_stack(*paths):
            return tuple(self.linear(x, path) for path in paths)
        whole, widths = self.linear(x, *paths, name=name), [self.model.matrix(path).shape[0] for path in paths]
        return self.graph.split(whole, *widths)

    def can_stack(self, *paths: str) -> bool:
        """Whether one operator can hold the modules at `paths`."""
        return stackable([self.model.matrix(path) for path in paths])

    def tied(self, x: str, table: str) -> str:
        """`x Wᵀ` with the embedding table at `table`, which is stored already."""
        weight = self.model.matrix(table)
        if isinstance(weight, QTensor):
            return Matrix(self.graph, table, weight, self.fused, is_table=True).project(x)
        if self.fused:
            return self.graph.fused("FusedMatMul", x, f"{table}.weight", transA=0, transB=1, alpha=1.0)
        return self.graph.op("MatMul", x, self.graph.op("Transpose", f"{table}.weight", perm=(1, 0)))

    def embed(self, ids: str, path: str) -> str:
        """Rows of the embedding at `path` by `ids`."""
        weight = self.model.matrix(path)
        if isinstance(weight, QTensor):
            return Matrix(self.graph, path, weight, self.fused, is_table=True).gather(ids)
        return self.graph.op("Gather", self.graph.weight(f"{path}.weight", array(weight)), ids, axis=0)

    def norm(self, x: str, path: str) -> str:
        """The model's norm at `path` of `x`."""
        weight, bias = self._norm_weights(path)
        if self.model.shape.family.norm == "layer":
            return self.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.epsilon)
        return self.rms_norm(x, weight)

    def rms_norm(self, x: str, weight: str, epsilon: float | None = None) -> str:
        """`x·weight` over the root mean square of x along its last axis."""
        epsilon, graph = self.epsilon if epsilon is None else epsilon, self.graph
        if self.fused:
            return graph.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)
        square = graph.op("Mul", x, x)
        mean = graph.op("ReduceMean", square, graph.ints(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.scalar(epsilon)))
        return graph.op("Mul", graph.op("Div", x, root), weight)

    def skip_norm(self, stream: Stream, path: str) -> tuple[str, Stream]:
        """The norm at `path` of the stream, and the stream with its addend added."""
        if stream.addend and self.fused:
            normed, total = self._fused_skip_norm(stream, path, (True, False, False, True))
            return normed, Stream(total)
        total = self.graph.op("Add", stream.value, stream.addend) if stream.addend else stream.value
        return self.norm(total, path), Stream(total)

    def last_norm(self, stream: Stream, path: str) -> str:
        """The norm at `path` of the stream, which nobody reads any more."""
        if stream.addend and self.fused:
            return self._fused_skip_norm(stream, path, (True,))[0]
        return self.skip_norm(stream, path)[0]

    @property
    def epsilon(self) -> float:
        """What the norms add to the variance."""
        return float(self.model.key("norm_eps"))

    def activation(self, x: str) -> str:
        """The model's activation function of `x`; ONNX Runtime fuses its nodes when it loads them."""
        kind = self.model.key("hidden_act")
        graph = self.graph
        if kind in ("silu", "swish"):
            return graph.op("Mul", x, graph.op("Sigmoid", x))
        if kind == "gelu":
            return graph.op("Gelu", x, approximate="none")
        if kind in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
            return graph.op("Gelu", x, approximate="tanh")
        return graph.op({"relu": "Relu", "tanh": "Tanh"}[kind], x)

    def _bias(self, name: str, paths: Sequence[str], rows: NDArray[np.int64] | None, constant: float) -> str:
        """The stacked biases and `constant`, zeros where a module has none; `""` where none has."""
        biases = [self.model.bias(path) for path in paths]
        if not constant and all(bias is None for bias in biases):
            return ""
        widths = [self.model.matrix(path).shape[0] for path in paths]
        filled = [np.zeros(n, np.float32) if b is None else b for b, n in zip(biases, widths, strict=True)]
        stacked = np.append(np.concatenate(filled), np.float32(constant)) if constant else np.concatenate(filled)
        return self.graph.weight(f"{name}.bias", stacked if rows is None else stacked[rows])

    def _fused_skip_norm(self, stream: Stream, path: str, wanted: Sequence[bool]) -> tuple[str, str]:
        kind = "LayerNormalization" if self.model.shape.family.norm == "layer" else "SimplifiedLayerNormalization"
        inputs = [stream.value, stream.addend, *filter(None, self._norm_weights(path))]
        attributes = {"epsilon": self.epsilon}
        outputs = self.graph.ops(f"Skip{kind}", inputs, wanted, domain=MICROSOFT, attributes=attributes)
        return outputs[0], outputs[-1]

    def _norm_weights(self, path: str) -> tuple[str, str]:
        names = []
        for leaf in ("weight", "bias"):
            name = f"{path}.{leaf}"
            if name not in self.model.tensors:
                names.append("")
                continue
            names.append(name if self.graph.has_weight(name) else self.graph.weight(name, self.model.vector(name)))
        weight, bias = names
        return weight, bias
