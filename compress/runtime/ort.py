"""Opening a graph in ONNX Runtime, and the errors that it raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import CompressError


def open_session(file: Path, threads: int, provider: str) -> Any:
    """An ONNX Runtime session of `file`. Raises CompressError where it is missing or refused."""
    import onnxruntime

    if not file.is_file():
        raise CompressError(str(file.parent), f"has no {file.name}", "export the model, or name another folder")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(file, options, providers=[provider])
    except ort_errors() as error:
        fix = "it is damaged, incomplete or for another version; export it again"
        raise CompressError(str(file), f"ONNX Runtime can't open it: {first_line(error)}", fix) from error


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; it has no common class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail", "EngineError")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def first_line(error: Exception) -> str:
    """The first line of what ONNX Runtime says, which goes on for pages."""
    return str(error).strip().splitlines()[0][:300]
