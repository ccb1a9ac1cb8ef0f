"""Opening a graph in ONNX Runtime, and the errors that it raises."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.models.files import link_problem

DENORMAL_AS_ZERO = "session.set_denormal_as_zero"
"""Key of a session: numbers below 1e-38, which are slow and which attention's masked lanes are full of, are zero."""
_SMALLEST = (
    b'\x08\n:/\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0b\n\x01x\x12\x06\n\x04\x08\x01\x12\x00'
    b"b\x0b\n\x01y\x12\x06\n\x04\x08\x01\x12\x00B\x04\n\x00\x10\x15"
)
"""A model whose output is its input."""


def open_session(file: Path, threads: int, provider: str, *, alone: bool = False) -> Any:
    """An ONNX Runtime session of `file`. Raises CompressError where it is missing or refused.

    alone: nothing else computes in this process, so that the calling thread, and not ONNX Runtime's others alone, may
    take denormal numbers for zero from now on.
    """
    import onnxruntime

    if problem := link_problem(file.parent, [file.name]):
        raise CompressError(str(file.parent), *problem)
    if not file.is_file():
        raise CompressError(str(file.parent), f"has no {file.name}", "export the model, or name another folder")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry(DENORMAL_AS_ZERO, "1")
    if not alone:
        _spare_this_thread()
    try:
        return onnxruntime.InferenceSession(file, options, providers=[provider])
    except ort_errors() as error:
        fix = "it is damaged, incomplete or for another version; export it again"
        raise CompressError(str(file), f"ONNX Runtime can't open it: {first_line(error)}", fix) from error


@cache
def _spare_this_thread() -> None:
    """Open a session that keeps denormals: the first one of a process decides for the thread that opens it, for good.

    What torch computes there would depend on whether a session was opened before it.
    """
    import onnxruntime

    onnxruntime.InferenceSession(_SMALLEST, providers=["CPUExecutionProvider"])


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; it has no common class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail", "EngineError")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def first_line(error: Exception) -> str:
    """The first line of what ONNX Runtime says, which goes on for pages."""
    return str(error).strip().splitlines()[0][:300]
