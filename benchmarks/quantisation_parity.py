"""The proof on a real model: what ONNX Runtime computes of each scheme is what torch computes, codes equal to the bit.

    python -m compress.benchmarks.quantisation_parity MODEL_FOLDER --out DIR --arms '*-rtn'

Arms are those of `compress.benchmarks.quantisation`, each run with an export behind it (in the same DIR, what is made
already is not made again). Codes, scales, zero points and ranges of activations: every row of every weight in the
artifact must be a row of the graph. Outputs at identical call shapes: with activations unrounded in both, as shipped,
and of the graph against itself, whole against token by token, which is the runtime's own rounding. Greedy tokens: of a
decoder that is fed torch's. Prints a table in Markdown, and keeps it as DIR/parity.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from compress.artifact import open_artifact
from compress.benchmarks.quantisation import Settings, common_parser, run
from compress.benchmarks.quantisation_arms import select
from compress.benchmarks.text import OneText
from compress.data.config import PYTHON_DOCS
from compress.exports.onnx.describe import load
from compress.exports.onnx.exact import EXACT_FILE, write_exact
from compress.exports.onnx.graph import MODEL_FILE
from compress.mixers.cache_name import CACHE
from compress.models.load import load_tokenizer
from compress.quant.qtensor import QTensor
from compress.quant.schemes import ACCURACY_LEVEL
from compress.quant.store import load_quantized_model, read_quantized
from compress.report.tables import Table, as_markdown
from compress.runtime.session import OnnxModel

Rows = Counter[bytes]
Array = NDArray[Any]
_BY_ROW, _SHARED = ("codes", "scales", "zero_points"), ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class Greedy:
    """How many next tokens agree, of how many; the widest gap between torch's two best logits where they do not."""

    same: int
    num: int
    gap: float

    def __str__(self) -> str:
        return f"{self.same}/{self.num}" + (f" (gaps ≤ {self.gap:.2g})" if self.same < self.num else "")


def stored_rows(folder: Path) -> Rows:
    """Each output channel of each quantised weight of an artifact as bytes: its codes, scales and zero points, and the
    range of static activations that it is multiplied with.
    """
    rows: Rows = Counter()
    for tensor in read_quantized(folder)[1].values():
        if isinstance(tensor, QTensor):
            packed = {part: value.numpy() for part, value in tensor.pack().items()}
            rows.update(_rows(*([packed[part] for part in parts if part in packed] for parts in (_BY_ROW, _SHARED))))
    return rows


def graph_rows(folder: Path) -> Rows:
    """The same of an exported graph, whatever weights were stacked; weights for MatMulInteger are transposed in it."""
    graph = onnx.load(folder / MODEL_FILE).graph
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ranges = _ranges(graph.node)
    rows: Rows = Counter()
    for name in named:
        base, _, part = name.rpartition(".")
        if part == "codes":
            codes, scales, *zeros = (named[f"{base}.{part}"] for part in _BY_ROW if f"{base}.{part}" in named)
            shared = [named[constant] for constant in ranges.get(name, ())]
            rows.update(_rows([codes.T if scales.ndim == 1 else codes, scales, *zeros], shared))
    return rows


def _ranges(nodes: Sequence[onnx.NodeProto]) -> dict[str, list[str]]:
    """By the codes of a weight, the scale and the zero point that its activations go through as integers."""
    dequantised = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    found: dict[str, list[str]] = {}
    for node in nodes:
        if node.op_type == "MatMul" and all(name in dequantised for name in node.input):
            x, weight = (dequantised[name] for name in node.input)
            found[weight.input[0]] = list(x.input[1:])
    return found


def _rows(by_row: Sequence[Array], shared: Sequence[Array]) -> Iterator[bytes]:
    num, end = len(by_row[0]), b"".join(part.tobytes() for part in shared)
    flat = [np.ascontiguousarray(part).reshape(num, -1) for part in by_row]
    return (b"".join(part[row].tobytes() for part in flat) + end for row in range(num))


@dataclass(frozen=True, order=True)
class Error:
    """The largest difference over the largest output, and their root mean squares alike."""

    largest: float
    rms: float

    @classmethod
    def of(cls, actual: Array, expected: Array) -> Error:
        """Of outputs of any shape."""
        difference = actual - expected
        return cls(
            float(np.abs(difference).max() / np.abs(expected).max()),
            float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        )

    def __str__(self) -> str:
        return f"{self.largest:.1e} ({self.rms:.1e})"


def torch_outputs(model: Any, ids_1T: Array) -> Array:
    """Logits of a model with a head, the last hidden states (1, T, hidden) of a bare encoder."""
    with torch.inference_mode():
        answer: Array = model(input_ids=torch.from_numpy(ids_1T))[0].numpy()
    return answer


def onnx_outputs(model: OnnxModel, ids_1T: Array) -> Array:
    """The same of a graph."""
    return model.forward(ids_1T)[0] if model.is_decoder else model.encode(ids_1T)[model.outputs[0]]


def own_error(model: OnnxModel, ids_1T: Array) -> Error:
    """Of a decoder's logits, whole against token by token."""
    decoder = model.decoder(ids_1T.shape[1])
    steps_TV = np.stack([decoder.step(token)[0] for token in ids_1T[0]])
    return Error.of(steps_TV, onnx_outputs(model, ids_1T)[0])


def greedy(ours: Any, graph: OnnxModel, ids_1T: Array, num_new: int) -> Greedy:
    """Both go on from `ids_1T`, each token being torch's, so that one flip does not hide what follows."""
    decoder = graph.decoder(ids_1T.shape[1] + num_new)
    given, past, same, gap = ids_1T, None, 0, 0.0
    for _ in range(num_new):
        with torch.inference_mode():
            output = ours(input_ids=torch.from_numpy(given), use_cache=True, **{CACHE: past})
        past, logits_V = getattr(output, CACHE), output.logits[0, -1].numpy()
        theirs_V = (decoder.prefill(given) if given is ids_1T else decoder.step(int(given[0, 0])))[0]
        agrees = theirs_V.argmax() == logits_V.argmax()
        same += int(agrees)
        second, first = np.sort(logits_V)[-2:]
        gap = gap if agrees else max(gap, float(first - second))
        given = logits_V.argmax(keepdims=True)[None]
    return Greedy(same, num_new, gap)


def prove(quantised: Path, exported: Path, ids_NT: Array, num_new: int, threads: int) -> tuple[str, ...]:
    """The cells of one arm: rows that are equal, of all; errors; greedy tokens."""
    stored, found = stored_rows(quantised), graph_rows(exported)
    equal = f"{(stored & found).total()}/{max(stored.total(), found.total())}"
    graph = OnnxModel(exported, threads=threads)
    plain = graph
    if write_exact(exported):
        plain = OnnxModel(exported, threads=threads, file=EXACT_FILE)
        (exported / EXACT_FILE).unlink()
    floats = load(open_artifact(quantised))[0]
    exact = max(Error.of(onnx_outputs(plain, ids_T), torch_outputs(floats, ids_T)) for ids_T in ids_NT[:, None])
    del plain, floats
    ours = load_quantized_model(quantised, accuracy_level=ACCURACY_LEVEL)
    shipped = max(Error.of(onnx_outputs(graph, ids_T), torch_outputs(ours, ids_T)) for ids_T in ids_NT[:, None])
    cells = equal, str(exact), str(shipped)
    if not graph.is_decoder:
        return (*cells, "", "")
    return (*cells, str(own_error(graph, ids_NT[:1])), str(greedy(ours, graph, ids_NT[:1], num_new)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, prove every arm, and write the table."""
    parser = common_parser(__doc__)
    parser.set_defaults(arms=["*-rtn"])
    parser.add_argument("--text", default=PYTHON_DOCS, help="what the models read: a spec")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (128)")
    parser.add_argument("--new-tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        str(given.model.resolve()), given.train, {}, given.tune, calibration=given.calibrate, training=given.training,
        max_overlap=given.max_overlap, onnx=True,
    )  # fmt: skip
    num_tokens = given.windows * given.length
    ids_NT = OneText(given.text).blocks("eval", load_tokenizer(given.model), given.length, num_tokens)
    columns = ("arm", "rows equal to the bit", "unrounded", "as shipped", "own rounding", "greedy tokens")
    rows = []
    for arm in select(given.arms):
        pipeline = settings.pipeline(arm, 0, given.threads)
        try:
            _, folders, _ = run(pipeline, given.out)
        except CalledProcessError:
            proof: tuple[str, ...] = (f"not exported: see runs/{pipeline['name']}/run.log", *[""] * (len(columns) - 2))
        else:
            proof = prove(folders["quantized"], folders["onnx"], ids_NT, given.new_tokens, given.threads)
        rows.append((arm.name, *proof))
        print(*rows[-1], flush=True)
        note = (
            "Errors: the largest difference over the largest output (and root mean squares), worst of "
            f"{given.windows} windows of {given.length} tokens."
        )
        (given.out / "parity.md").write_text(f"{as_markdown(Table('', columns, tuple(rows), note))}\n", "utf-8")


if __name__ == "__main__":
    main()
