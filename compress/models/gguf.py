"""GGUF to `save_pretrained`: the weights dequantised to float32, the tokenizer rebuilt from the same file."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import CompressError
from compress.hardware import minor_version
from compress.models.pretrained import from_pretrained

CONVERSION = 2
"""Raised when the same GGUF, package or repository becomes another folder."""


def conversion() -> str:
    """What the folder that a GGUF file converts to depends on: our version, and those of the libraries that read it."""
    return " ".join([str(CONVERSION), *(f"{name} {minor_version(name)}" for name in ("transformers", "gguf"))])


def convert(gguf: Path, out: Path) -> None:
    """Write the model and tokenizer in `gguf` to `out`. What lies beside the file counts for nothing.

    Raises CompressError for a file that is damaged or of an architecture that transformers can't read.
    """
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CompressError(str(gguf), "is not a GGUF file", "check the path, or download it again")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.models.load import keep_rope_theta

    try:
        with TemporaryDirectory(prefix="compress-") as name:
            alone = Path(name)
            (alone / gguf.name).symlink_to(gguf.absolute())
            model = from_pretrained(AutoModelForCausalLM, alone, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = from_pretrained(AutoTokenizer, alone, gguf_file=gguf.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        fix = "is it complete, and of a known architecture?"
        raise CompressError(str(gguf), f"can't be read ({error})", fix) from error
    model.hf_quantizer = None  # the weights are plain float32 now: save them as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    keep_rope_theta(out / "config.json")
    tokenizer.save_pretrained(out)
