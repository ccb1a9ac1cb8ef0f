"""The step of a width at which this machine's matrix products get faster: measured once, kept in the user's cache.

Imports no numpy before it measures.

A kernel works in panels of columns and blocks of rows: some neurons less than a panel save nothing, or cost time where
rows are no longer aligned. An MLP of I neurons is two products with I columns and one with I rows, in each of the
formats that are exported, for prompts and token by token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from compress.fetch.cache import ensure, entry_path, finished
from compress.hardware import minor_version, this_machine
from compress.runtime.ort import open_session

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

UNMEASURED = 32
"""The step where nothing was measured: the block of the quantised formats."""
STEPS = (8, 16, 32, 64)
_WIDTH, _HIDDEN = 1024, 512
_OPERATORS = ("MatMul", "DynamicQuantizeMatMul", "MatMulNBits")
_ROUNDS = {1: 300, 64: 20}
"""By the tokens of a call. Calls of one token take some 50 µs, those of 64 a millisecond."""
_REPEATS = 3
"""Times that weights are laid into memory anew: how they lie there costs or saves a few percent."""
_ENOUGH = 0.5
"""Of the share of the width that goes, the share of the time that has to go with it."""
_KIND = "width-steps"


def known_step() -> int:
    """What `measured_step` found on this machine; UNMEASURED before it did."""
    facts = finished(entry_path(_KIND, _identity()))
    return UNMEASURED if facts is None else int(facts["step"])


def measured_step() -> int:
    """The smallest of STEPS whose neurons save time, in the mean of formats, prompts and tokens; 64 where none does.

    Takes some 4 seconds the first time. Raises CompressError where the cache can't be written.
    """
    ensure(_KIND, _identity(), _measure)
    return known_step()


def _identity() -> str:
    return json.dumps([this_machine().fingerprint(), minor_version("onnxruntime")])


def _measure(folder: Path) -> dict[str, Any]:
    """Facts: the step, and by format and tokens of a call what each step saved, as a share of the MLP's time."""
    saved = {
        f"{operator}, {tokens} token{'s' if tokens > 1 else ''}": _saved(operator, tokens, folder)
        for operator in _OPERATORS
        for tokens in _ROUNDS
    }
    mean = {step: sum(each[step] for each in saved.values()) / len(saved) for step in STEPS}
    paying = (step for step in STEPS if mean[step] >= _ENOUGH * step / _WIDTH)
    return {"step": next(paying, STEPS[-1]), "mean": mean, "saved": saved}


def _saved(operator: str, tokens: int, folder: Path) -> dict[int, float]:
    """What a cut by each of STEPS saves of an MLP's time: medians over rounds in which all widths take turns."""
    import numpy as np

    widths = [_WIDTH, *(_WIDTH - step for step in STEPS)]

    def once() -> NDArray[np.float64]:
        up_RW = _seconds(operator, tokens, [(_HIDDEN, width) for width in widths], folder)
        down_RW = _seconds(operator, tokens, [(width, _HIDDEN) for width in widths], folder)
        mlp_RW = 2 * up_RW + down_RW
        return np.asarray(np.median(1 - mlp_RW / mlp_RW[:, :1], axis=0))

    saved_W = np.median([once() for _ in range(_REPEATS)], axis=0)
    return {step: round(float(saved), 4) for step, saved in zip(STEPS, saved_W[1:], strict=True)}


def _seconds(operator: str, tokens: int, sizes: Sequence[tuple[int, int]], folder: Path) -> NDArray[np.float64]:
    """(rounds, sizes): of one call of products of `tokens` × K with K × N, by (K, N), on one thread."""
    import numpy as np
    import onnx

    sessions = []
    for rows, columns in sizes:
        file = folder / "product.onnx"
        onnx.save(_product(operator, rows, columns), file)
        sessions.append(open_session(file, 1, "CPUExecutionProvider"))
        file.unlink()
    feeds = [{"x": np.linspace(-1, 1, tokens * rows, dtype=np.float32).reshape(tokens, rows)} for rows, _ in sizes]
    warm_up = 3
    seconds_RW = np.empty((warm_up + _ROUNDS[tokens], len(sizes)))
    for number in range(len(seconds_RW)):
        for at in np.roll(np.arange(len(sizes)), number):
            began = perf_counter()
            sessions[at].run(None, feeds[at])
            seconds_RW[number, at] = perf_counter() - began
    return seconds_RW[warm_up:]


def _product(operator: str, rows: int, columns: int) -> onnx.ModelProto:
    """A graph of one product with a weight of `rows` × `columns`, as the exporter makes it."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    blocks = -(-rows // UNMEASURED)
    scales = np.full(columns, 0.01, np.float32)
    operators: dict[str, tuple[list[NDArray[Any]], dict[str, Any]]] = {
        "MatMul": ([np.full((rows, columns), 0.01, np.float32)], {}),
        "DynamicQuantizeMatMul": ([np.full((rows, columns), 3, np.int8), scales], {}),
        "MatMulNBits": (
            [np.full((columns, blocks, UNMEASURED // 2), 0x79, np.uint8), np.repeat(scales, blocks)],
            {"K": rows, "N": columns, "bits": 4, "block_size": UNMEASURED, "accuracy_level": 4},
        ),
    }
    weights, options = operators[operator]
    domain = "" if operator == "MatMul" else "com.microsoft"
    names = [f"weight{number}" for number in range(len(weights))]
    node = helper.make_node(operator, ["x", *names], ["y"], domain=domain, **options)
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", columns])],
        [numpy_helper.from_array(weight, name) for weight, name in zip(weights, names, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
