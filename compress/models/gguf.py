"""GGUF to `save_pretrained`: the weights dequantised to float32, the tokenizer rebuilt from the same file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import CompressError
from compress.hardware import minor_version
from compress.models.pretrained import from_pretrained

CONVERSION = 3
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

    try:
        with TemporaryDirectory(prefix="compress-") as name:
            alone = Path(name)
            (alone / gguf.name).symlink_to(gguf.absolute())
            _convert(alone, gguf.name, out)
    except CompressError as error:
        raise CompressError(str(gguf), error.problem.what, error.problem.fix) from error
    except (ValueError, LookupError, TypeError, NotImplementedError, RuntimeError, struct.error) as error:
        first = str(error).strip().partition("\n")[0]
        fix = "is it complete, and of a known architecture?"
        raise CompressError(str(gguf), f"can't be read ({first})", fix) from error


def _convert(alone: Path, name: str, out: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from compress.models.gguf_config import check_tensors, said_config  # numpy, which `check` does without
    from compress.models.load import keep_rope_theta

    config = from_pretrained(AutoConfig, alone, gguf_file=name)
    reader = GGUFReader(alone / name)
    config = type(config).from_dict(said_config(reader, config.to_dict()))
    model, report = from_pretrained(
        AutoModelForCausalLM, alone, gguf_file=name, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise CompressError(name, f"lacks weights: {', '.join(missing[:3])}", "is it complete?")
    check_tensors(reader, model.state_dict(), config.num_hidden_layers)
    tokenizer = from_pretrained(AutoTokenizer, alone, gguf_file=name)
    model.hf_quantizer = None  # the weights are plain float32 now: save them as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    keep_rope_theta(out / "config.json")
    tokenizer.save_pretrained(out)
    _forget_tokens_from(len(reader.fields["tokenizer.ggml.tokens"].data), out / "tokenizer.json")


def _forget_tokens_from(end: int, file: Path) -> None:
    """Take those that the class for byte-level vocabularies brings itself, `<|endoftext|>`, out of `tokenizer.json`."""
    tokenizer = json.loads(file.read_text("utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < end]
    file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), "utf-8")
