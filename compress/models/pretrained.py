"""The one place where transformers reads a folder: from the disk alone, and never by code that the folder brings.

`config.json` and `tokenizer_config.json` may name Python files beside them (`auto_map`). transformers runs those where
it is told to, and where it is told nothing it asks on the terminal. Here it is always told not to: what it has a class
of its own for is read by that class, anything else is refused. A test looks for calls that go past this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

_OFFERS_CODE = "trust_remote_code=True"
"""In transformers' message where only a folder's own code could read it."""


def from_pretrained(reader: Any, folder: Path, **options: Any) -> Any:
    """What `reader.from_pretrained` makes of `folder`. reader: one of transformers' auto classes."""
    return reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


def read_folder(reader: Any, folder: Path, fix: str, **options: Any) -> Any:
    """As `from_pretrained`. Raises CompressError, with `fix`, where the folder can't be read.

    It says so where only code of its own could read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError)
    try:
        return from_pretrained(reader, folder, **options)
    except (*kinds, StrictDataclassError, SafetensorError) as error:
        if _OFFERS_CODE in str(error):
            what, fix = "can be read only by Python code that it brings, which is never run", "name another model"
        else:
            first = str(error).strip().partition("\n")[0]
            what = f"can't be loaded ({first})"
        raise CompressError(str(folder), what, fix) from error


def new_model(auto: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """A model with new weights, of the class that `auto`, an auto class, has for `config`."""
    return auto.from_config(config, trust_remote_code=False, **options)


def with_weights(model_class: Any, config: PreTrainedConfig, weights: Mapping[str, Tensor], **options: Any) -> Any:
    """A `model_class` of `config` with `weights` by name: what `from_pretrained` makes of them without a folder."""
    return model_class.from_pretrained(None, config=config, state_dict=dict(weights), **options)
