"""What of a model's folder is read, and whether it can be used. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compress import artifact
from compress.fetch import cache
from compress.fetch.cache import recall

CONTENT = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "1_Pooling/config.json")
"""What we read of a model's folder: never a pickle, never code."""
CARDS = ("LICENSE*", "NOTICE*", "README.md")
"""What travels along without being part of the model's key."""


def folder_problem(folder: Path, readable: Collection[str] = ()) -> tuple[str, str] | None:
    """(what is wrong with a model's folder, what to do), or None where it can be read.

    readable: the methods of quantisation (`bitsandbytes`) whose weights the reader can do with.
    """
    config = recall(folder / "config.json")
    if not isinstance(config, dict):
        return "has no readable config.json", "name the folder that save_pretrained wrote"
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            return "holds its weights as pickles only, which can run code", "save it as safetensors where you trust it"
        return "has no .safetensors weights", "name the folder that save_pretrained wrote"
    missing = [name for name in sorted(_shards(folder)) if not (folder / name).is_file()]
    if missing:
        return f"lacks {missing[0]}, one of its {len(_shards(folder))} weight files", "copy or fetch it again"
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method", "an unknown method") if quantization else None
    if method not in (None, *readable):
        return f"is quantised already ({method})", "name the model that it was made from"
    return None


def model_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a model's folder that match `patterns`, sorted, without our own manifests."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in (cache.MANIFEST, artifact.MANIFEST))


def config_of(folder: Path) -> dict[str, Any] | None:
    """The parsed `config.json` of a folder; None where there is none that can be read."""
    config = recall(folder / "config.json")
    return config if isinstance(config, dict) else None


def _shards(folder: Path) -> set[str]:
    index = recall(folder / "model.safetensors.index.json") or {}
    return set(index.get("weight_map", {}).values())
