"""A torch model from a folder, whatever its weights are stored as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.folder import config_of
from compress.models.load import load_model, read_model
from compress.quant import bnb
from compress.quant.store import KEY, METHOD, load_quantized_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_any(folder: Path, *, accuracy_level: int = 0, device: str | int = "cpu") -> PreTrainedModel:
    """The model in `folder` in eval mode: of floats, of our codes or of bitsandbytes'.

    accuracy_level: of our codes, as `MatMulNBits` has it. device: of bitsandbytes' weights, which can't be moved later.
    Raises CompressError for what can't be read.
    """
    method = ((config_of(folder) or {}).get(KEY) or {}).get("quant_method")
    if method == METHOD:
        return load_quantized_model(folder, accuracy_level=accuracy_level)
    if method == bnb.METHOD:
        bnb.be_quiet()
        return read_model(folder, device=device)
    return load_model(folder)
