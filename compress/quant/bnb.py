"""bitsandbytes' weights, 4-bit NF4 and 8-bit: folders that `from_pretrained` loads, for PyTorch only.

What computes with them is bitsandbytes itself: NF4 weights are dequantised for each product, 8-bit ones are multiplied
by activations rounded to int8 per token, outliers apart (LLM.int8, arXiv:2208.07339; NF4: QLoRA, arXiv:2305.14314).
Imports no torch unless asked for a model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.artifact import Metrics
from compress.errors import CompressError, Problem
from compress.models.anatomy import ModelShape
from compress.quant.choice import projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BnbScheme = Literal["bnb-nf4", "bnb-int8"]
BITS: Mapping[str, Literal[4, 8]] = {"bnb-nf4": 4, "bnb-int8": 8}
METHOD = "bitsandbytes"
BLOCK_SIZE = 64
"""Weights of a row that share an NF4 scale. Rows that are no whole number of blocks are quantised wrongly on CPUs."""
PYTORCH_ONLY = "bitsandbytes weights run in PyTorch only"


def misfits(option: str, bits: int, model: ModelShape) -> Iterator[Problem]:
    """What is wrong with so many bits for that model; `option` is where they were asked for."""
    if bits == 4 and (sizes := sorted({k for _, _, k in projections(model) if k % BLOCK_SIZE})):
        what = f"bitsandbytes' 4 bits take rows of whole blocks of {BLOCK_SIZE}, not {', '.join(map(str, sizes))}"
        yield Problem(option, what, "take 8 bits")


def stored_bytes(bits: int, model: ModelShape) -> float:
    """Estimated bytes: codes and scales of the projections, float32 of all else."""
    rows = list(projections(model))
    weights = sum(n * k for _, n, k in rows)
    scales = weights / BLOCK_SIZE if bits == 4 else sum(n for _, n, _ in rows)
    return weights * bits / 8 + 4.0 * (scales + model.num_parameters - weights)


def load_in_bits(folder: Path, bits: int) -> PreTrainedModel:
    """The model of floats in `folder`, its projections in 4 (NF4) or 8 bits, in eval mode, on `device()`.

    Raises CompressError for a model that is quantised already.
    """
    import torch
    import transformers

    from compress.models.folder import config_of, tensor_names
    from compress.models.load import auto_class, left_out, untied
    from compress.models.pretrained import read_folder

    config = config_of(folder) or {}
    if config.get("quantization_config"):
        raise CompressError(str(folder), "is quantised already", "take it as it is, or the model that it was made from")
    be_quiet()
    library: Any = transformers
    quantization = library.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: PreTrainedModel = read_folder(
        auto_class(config), folder, "are config.json and the weights complete?", dtype=torch.float32,
        use_safetensors=True, quantization_config=quantization, device_map={"": device()},
        **left_out(config, tensor_names(folder)), **untied(config),
    )  # fmt: skip
    model.train(False)
    return model


def device() -> str | int:
    """Where bitsandbytes computes fastest."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"


def quantize_folder(origin: Path, bits: int, out: Path) -> Metrics:
    """Write the model in `origin` with its projections in so many bits to `out`; the figures of the result."""
    from compress.models.load import save_model

    model = load_in_bits(origin, bits)  # before bitsandbytes is imported: it logs when it is
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    save_model(model, origin, out)
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    num_bytes = sum(
        part.nbytes for module in quantised for name, part in module.state_dict().items() if name != "bias"
    )
    num_weights = sum(module.in_features * module.out_features for module in quantised)
    return {"result": {"bits_per_weight": 8 * num_bytes / num_weights}}


def be_quiet() -> None:
    """Keep off the screen what bitsandbytes says of every product in 8 bits and of kernels that it can't download."""
    for name in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
