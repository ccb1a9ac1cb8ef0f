"""Loading and saving `save_pretrained` folders: safetensors only, strictly, with what must travel with the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact import write_json
from compress.errors import CompressError
from compress.fetch.cache import recall
from compress.models.anatomy import is_buffer
from compress.models.config import HYBRID
from compress.models.dtypes import as_stored, declare_dtype, half_types
from compress.models.folder import CARDS, COMPANIONS, VOCABULARIES, config_of, model_files, tensor_names
from compress.models.heads import BACKBONE, architecture_of, lacks_pooler, named_head
from compress.models.pretrained import read_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_ENDS = ("bos_token", "eos_token", "unk_token")
"""What GPT-2's class takes one token for where nothing is said."""


def load_model(folder: Path) -> PreTrainedModel:
    """The model in `folder` in float32 on the CPU, in eval mode, of the class that `config.json` names.

    Every weight must be found and every one found must be used: raises CompressError otherwise, and for a folder of
    quantised weights.
    """
    if (config_of(folder) or {}).get("quantization_config"):
        raise CompressError(str(folder), "is quantised already", "name the model that it was made from")
    return read_model(folder)


def read_model(folder: Path, *, device: str | int | None = None) -> PreTrainedModel:
    """As `load_model`, also of weights in a form that transformers itself knows (bitsandbytes'), put on `device`."""
    import torch

    config = config_of(folder) or {}
    head = named_head(architecture_of(config))
    left_over = head.left_over if head else ()
    model, report = read_folder(
        auto_class(config), folder, "are config.json and the weights complete?", dtype=torch.float32,
        use_safetensors=True, output_loading_info=True, device_map=None if device is None else {"": device},
        **left_out(config, tensor_names(folder)), **untied(config),
    )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        misfits = [str(name) for name in report.get(kind) or () if not is_buffer(str(name))]
        if kind == "unexpected_keys":
            misfits = [name for name in misfits if not name.startswith(left_over)]
        if misfits:
            names = ", ".join(sorted(misfits)[:3])
            raise CompressError(str(folder), f"the weights do not fit config.json: {kind} {names}", "is it complete?")
    check_finite(model.named_parameters(), folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_finite(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Raise CompressError where a weight is NaN or infinite: every stage would blame something else."""
    import torch

    broken = []
    for name, weight in weights:
        if not weight.is_floating_point() or weight.detach().sum().isfinite():
            continue
        if num := int((~torch.isfinite(weight)).sum()):  # 0 where only the sum overflows
            broken.append((name, num))
    if broken:
        name, num = broken[0]
        others = f", and there are more in {len(broken) - 1} other" if len(broken) > 1 else ""
        what = f"{name} holds {num} NaN or infinite values{others}"
        raise CompressError(str(folder), what, "get the weights again, or go back to an earlier checkpoint")


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's files."""
    return any(file.is_file() for pattern in VOCABULARIES for file in folder.glob(pattern))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises CompressError where there is none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise CompressError(str(folder), "has no tokenizer", "add tokenizer.json and tokenizer_config.json")
    know_classes(config_of(folder) or {})  # whose config.json AutoTokenizer reads too
    fix = "are its files those of the model's tokenizer, and complete?"
    tokenizer: PreTrainedTokenizerBase = read_folder(AutoTokenizer, folder, fix)
    if end := _own_end(tokenizer, folder):
        tokenizer = read_folder(AutoTokenizer, folder, fix, **dict.fromkeys(_ENDS, end))
    return tokenizer


def _own_end(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """The end token that `config.json` names where a vocabulary alone says none, and its class adds one of its own.

    `""` where the tokenizer's is one of the model's, or config.json does not help.
    """
    config = config_of(folder) or {}
    size, end, own = config.get("vocab_size"), config.get("eos_token_id"), tokenizer.eos_token_id
    says = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if says or not (isinstance(size, int) and isinstance(end, int) and isinstance(own, int)) or not end < size <= own:
        return ""
    return str(tokenizer.convert_ids_to_tokens(end))


def save_model(model: PreTrainedModel, origin: Path, out: Path) -> None:
    """Write `model` as safetensors to `out`, with the tokenizer, licence and card of `origin`.

    A weight has the type of `origin`'s where that holds it exactly: see `compress.models.dtypes`.
    """
    vars(model.config).pop("auto_map", None)  # of code that is not copied; a hybrid's class writes its own again
    types = () if getattr(model, "hf_quantizer", None) else half_types(origin)
    tensors = as_stored(model.state_dict(), types) if types else None
    model.save_pretrained(out, state_dict=tensors)
    if tensors is not None:
        config = json.loads((out / "config.json").read_text("utf-8"))
        declare_dtype(config, tensors.values())
        write_json(out / "config.json", config)
    keep_rope_theta(out / "config.json")
    carry(origin, out)


def carry(origin: Path, out: Path) -> None:
    """Copy the tokenizer, licence and card of `origin` into `out`, leaving what is there already.

    Raises CompressError for a link that leads out of `origin`.
    """
    for file in model_files(origin, COMPANIONS + CARDS):
        destination = out / file.relative_to(origin)
        if not destination.exists():
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, destination)
            if destination.suffix == ".json":
                _leave_code_unnamed(destination)


def _leave_code_unnamed(file: Path) -> None:
    """Take the `auto_map` out of a copied config: the code that it names was not copied."""
    config = recall(file)
    if isinstance(config, dict) and config.pop("auto_map", None) is not None:
        write_json(file, config)


def auto_class(config: Mapping[str, Any]) -> Any:
    """The transformers auto class that builds the architecture of a parsed `config.json`, hybrid ones included."""
    import transformers

    know_classes(config)
    return getattr(transformers, (named_head(architecture_of(config)) or BACKBONE).auto)


def left_out(config: Mapping[str, Any], names: Collection[str]) -> dict[str, bool]:
    """Options of the class of a parsed `config.json`: weights of these `names` lack a part that it can do without."""
    return {"add_pooling_layer": False} if lacks_pooler(config, names) else {}


def untied(config: Mapping[str, Any]) -> dict[str, bool]:
    """Options of the class of `config_of`'s config: `config.json` itself may say that the head is tied, wrongly."""
    return {"tie_word_embeddings": False} if config.get("tie_word_embeddings") is False else {}


def know_classes(config: Mapping[str, Any]) -> None:
    """Make transformers' auto classes know the hybrid models where a parsed `config.json` is of one.

    A folder's own copy of their code is never run.
    """
    if not str(config.get("model_type")).startswith(HYBRID):
        return
    import transformers

    from compress.mixers import hybrid, hybrid_bert, hybrid_gpt

    for module in (hybrid, hybrid_bert, hybrid_gpt):
        for model_class, auto in module.AUTO_CLASSES.items():
            config_class: Any = model_class.config_class
            transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)


def keep_rope_theta(config_file: Path) -> None:
    """transformers 4 reads `rope_theta` at the top level only, and silently takes 10000 where it is missing."""
    config = json.loads(config_file.read_text("utf-8"))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
