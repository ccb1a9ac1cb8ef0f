"""onnxruntime-genai's own model builder and its folders: the peer that our exports are held against."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from compress.errors import CompressError
from compress.processes import run_program
from compress.runtime.session import GENAI, genai_config

_LIBRARY = "custom_ops_library"


def with_threads(folder: Path, threads: int, into: Path) -> Path:
    """A copy of `folder` in the new directory `into` whose decoder runs with `threads` threads.

    The files are links; only `genai_config.json` is another, because onnxruntime-genai takes one thread where it says
    nothing. Raises CompressError for a folder without one, and for one that names a library of its own to run.
    """
    source = folder / GENAI
    if not source.is_file():
        raise CompressError(
            str(folder), f"has no {GENAI}", "onnxruntime-genai needs one; measure it with --runtime ort"
        )
    config = genai_config(folder)
    if _LIBRARY in json.dumps(config):
        what = f"names a {_LIBRARY}: code that the folder brings, which is never run"
        raise CompressError(str(source), what, "measure a folder without one")
    into.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != GENAI:
            _link(file.resolve(), into / file.name)
    options = config["model"]["decoder"].setdefault("session_options", {})
    options |= {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    (into / GENAI).write_text(json.dumps(config, indent=1), "utf-8")
    return into


def build(
    source: Path, out: Path, precision: Literal["int4", "fp32"], cache: Path, extra_options: Sequence[str] = ()
) -> None:
    """Build `source` (a `save_pretrained` folder) for the CPU with onnxruntime-genai's builder, with its defaults.

    extra_options: what is not a default, `key=value` each. Raises CompressError, with the builder's last line, where
    it fails.
    """
    command = [
        sys.executable, "-P", "-m", "onnxruntime_genai.models.builder",
        "-m", str(source), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(cache),
        "--extra_options", "hf_remote=false", *extra_options,
    ]  # fmt: skip
    done = run_program(command)
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CompressError("onnxruntime-genai's builder", f"failed: {words[-1] if words else 'it said nothing'}")


def _link(file: Path, to: Path) -> None:
    """A hard link where the file system allows one (the runtime refuses weights behind a symbolic one), else a copy."""
    try:
        os.link(file, to)
    except OSError:
        import shutil

        shutil.copyfile(file, to)
