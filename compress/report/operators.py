"""Which operator each layer's matrices run as in the graph that is deployed, read from that graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from compress.report.tables import Table, number
from compress.runner.record import RunRecord
from compress.runtime.graphs import Use, operators_of

_NOTES = {
    "accuracy 4": "Accuracy 4: activations are rounded to int8 in blocks.",
    "DequantizeLinear": "DequantizeLinear before a product is how the file says it; ONNX Runtime takes both into one "
    "operator where it has one.",
    "prompt": "Prompt: the body that reads many new tokens at once; token: the one that reads few.",
}
"""What is explained where a table has it."""


def operators_table(run_dir: Path, record: RunRecord) -> Table | None:
    """The operators of the exported model, a row for all layers and matrices that run alike; None where there is none.

    MB are 1e6 bytes of weights as they are stored; those that two rows share are counted in both.
    """
    if not (uses := deployed_operators(run_dir, record)):
        return None
    said = " ".join(f"{use.body} {use.weights} {use.operator}" for use in uses)
    note = " ".join(["Read from the graph that is deployed.", *(_NOTES[word] for word in _NOTES if word in said)])
    columns = ("where", "matrices", "weights", "operator", "MB")
    return Table("operators of the exported model", columns, tuple(_rows(uses)), note, 4)


def deployed_operators(run_dir: Path, record: RunRecord) -> Sequence[Use]:
    """The same one by one; none where no graph is deployed, or it is not there."""
    deploy = record.deploy
    file = run_dir / deploy.directory / "model.onnx" if deploy and deploy.returns == "onnx" else None
    return operators_of(file) if file and file.is_file() else ()


def _rows(uses: Sequence[Use]) -> Iterable[tuple[str, ...]]:
    layers: dict[tuple[str, str, str, str], set[int]] = {}
    for use in uses:
        layers.setdefault(_kind(use), set()).update(() if use.layer is None else {use.layer})
    alike: dict[tuple[str, ...], dict[str, int]] = {}
    for use in uses:
        where = _where(layers[_kind(use)]) if use.layer is not None else "outside the layers"
        where += f", {use.body}" if use.body else ""
        paths = alike.setdefault((where, use.weights, use.operator), {})
        paths[use.path] = paths.get(use.path, 0) + use.num_bytes
    for (where, weights, operator), paths in alike.items():
        num_bytes = sum(paths.values())
        yield where, ", ".join(paths), weights, operator, number(num_bytes / 1e6) if num_bytes else ""


def _kind(use: Use) -> tuple[str, str, str, str]:
    return use.body, use.path, use.weights, use.operator


def _where(layers: Iterable[int]) -> str:
    """`layers 0–3, 5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = ", ".join(f"{first}–{last}" if last > first else f"{first}" for first, last in runs)
    return f"layer{'s' if ' ' in words or '–' in words else ''} {words}"
