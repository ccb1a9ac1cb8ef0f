"""A small builder of ONNX graphs whose weights go to the external data file the moment they are known."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from compress.runtime.graphs import with_subgraphs

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
MICROSOFT = "com.microsoft"
_ALIGNMENT = 64  # bytes: a cache line, so that a mapped weight needs no copy
_VERSIONS, _NEWER_VERSIONS = (21, 10), (23, 11)  # an opset, and the IR that came with it
_NEWER = {"Attention"}  # what the older one lacks

Attribute = int | float | str | Sequence[int] | onnx.GraphProto
Dimension = int | str


class Graph:
    """Collects nodes and inputs; `weight` streams to `model.onnx.data`, so no weight stays in memory.

    Values are known by their names. Use as a context manager; `save` writes `model.onnx`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._data = (folder / DATA_FILE).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._scope: list[str] = []
        self._taken: dict[str, Iterator[int]] = {}
        self._made: dict[bytes, tuple[str, ...]] = {}
        self._is_branch = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._data.close()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named `/…/name/Op`."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> str:
        """Declare a graph input."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def default_input(self, name: str, default: NDArray[Any]) -> str:
        """Declare a graph input that may be left out."""
        self._initializers[name] = onnx.numpy_helper.from_array(default, name)
        return self.input(name, default.dtype.type, default.shape)

    def output(self, value: str, name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> None:
        """Declare `value` a graph output called `name`."""
        if value != name:
            self._rename(value, name)
        self._outputs.append(_value(name, dtype, shape))

    def has_weight(self, name: str) -> bool:
        """Whether a weight of that name is stored already."""
        return name in self._initializers

    def weight(self, name: str, array: NDArray[Any], *, nibbles: bool = False) -> str:
        """Store `array` in the data file under `name`. nibbles: as uint4, two a byte, the first in the low bits.

        In a branch, a weight that is stored already is the other branch's, and serves.
        """
        if name in self._initializers:
            if self._is_branch:
                return name
            raise ValueError(f"weight {name} is stored already")
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        dtype = TensorProto.UINT4 if nibbles else helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, dims=array.shape, data_type=dtype)
        array = _two_a_byte(array) if nibbles else array
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", self._data.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        np.ascontiguousarray(array).tofile(self._data)
        self._data.flush()
        self._initializers[name] = tensor
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector, kept once."""
        return self.constant(f"ints.{'_'.join(map(str, values))}", np.array(values, np.int64))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A small constant that every caller calls by the same name, kept once."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def scalar(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        """A constant of no dimensions, kept once."""
        return self.constant(f"{np.dtype(dtype).name}.{value}", np.array(value, dtype))

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Attribute) -> str:
        """Add a node with one output; an input `""` is left out."""
        return self.ops(kind, inputs, 1, domain=domain, attributes=attributes)[0]

    def fused(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """Add one of ONNX Runtime's own operators with one output."""
        return self.ops(kind, inputs, 1, domain=MICROSOFT, attributes=attributes)[0]

    def split(self, x: str, *widths: int) -> tuple[str, ...]:
        """Parts of so many channels of the last axis of `x`."""
        if len(widths) == 1:
            return (x,)
        return self.ops("Split", [x, self.ints(*widths)], len(widths), attributes={"axis": -1})

    def ops(self, kind: str, inputs: Sequence[str], outputs: int | Sequence[bool], *, domain: str = "",
            attributes: Mapping[str, Attribute] | None = None) -> tuple[str, ...]:  # fmt: skip
        """Add a node with several outputs: how many, or for each whether it is wanted (`""` where not).

        A node that would be the copy of an earlier one is not added: the earlier one's outputs serve.
        """
        wanted = [True] * outputs if isinstance(outputs, int) else outputs
        node = helper.make_node(kind, inputs, [str(want) for want in wanted], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes or {}).items())
        what = node.SerializeToString(deterministic=True)
        if what not in self._made:
            node.name = self._unique("/".join(["", *self._scope, kind]))
            values = tuple(f"{node.name}.{index}" if want else "" for index, want in enumerate(wanted))
            node.output[:] = values
            self._nodes.append(node)
            self._made[what] = values
        return self._made[what]

    def either(
        self, condition: str, branches: Mapping[str, Callable[[], Sequence[str]]], dtypes: Sequence[type[np.generic]]
    ) -> tuple[str, ...]:
        """The values that the first of two `branches` makes where `condition`, a scalar, is true, else the second's.

        Both see what was made before, and share the graph's weights; what they make is named by their scopes.
        """
        then, otherwise = (self._branch(name, make, dtypes) for name, make in branches.items())
        return self.ops(
            "If", [condition], len(dtypes), attributes={"then_branch": then, "else_branch": otherwise}
        )

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write `model.onnx`."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, [*self._initializers.values()])
        model = as_model(graph)
        helper.set_model_props(model, dict(metadata))
        onnx.save(model, self._folder / MODEL_FILE)

    def _branch(
        self, name: str, make: Callable[[], Sequence[str]], dtypes: Sequence[type[np.generic]]
    ) -> onnx.GraphProto:
        outside = self._nodes, self._made, self._is_branch
        self._nodes, self._made, self._is_branch = [], dict(self._made), True
        with self.scope(name):
            values = make()
        nodes, (self._nodes, self._made, self._is_branch) = self._nodes, outside
        outputs = [_value(value, dtype, None) for value, dtype in zip(values, dtypes, strict=True)]
        return helper.make_graph(nodes, name, [], outputs)

    def _unique(self, name: str) -> str:
        count = next(self._taken.setdefault(name, itertools.count()))
        return f"{name}_{count}" if count else name

    def _rename(self, value: str, name: str) -> None:
        for what, values in self._made.items():
            if value in values:
                self._made[what] = tuple(name if old == value else old for old in values)
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, old in enumerate(names):
                    if old == value:
                        names[index] = name


def as_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """The graph with the lowest opset, of those that we write, that has all of its operators."""
    nodes = [node for each in with_subgraphs(graph) for node in each.node]
    is_newer = any(node.op_type in _NEWER and not node.domain for node in nodes)
    opset, ir_version = _NEWER_VERSIONS if is_newer else _VERSIONS
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="compress")


def _two_a_byte(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    return flat[::2] | np.left_shift(flat[1::2], 4, dtype=np.uint8)


def _value(name: str, dtype: type[np.generic], shape: Sequence[Dimension] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
