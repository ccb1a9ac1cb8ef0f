"""What of a model's folder is read, what travels with its weights, and whether it can be used. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from compress import artifact
from compress.errors import CompressError
from compress.fetch import cache
from compress.fetch.cache import recall
from compress.models.anatomy import FAMILIES, kind_of
from compress.models.companions import companion_fault
from compress.models.files import adapter_problem, link_problem, stays_inside
from compress.models.heads import BACKBONE, architecture_of, misfit, named_head
from compress.models.pooling import MODULES, read_pooling
from compress.models.stored import names_in, stored_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")
"""Each of them makes a tokenizer: `tokenizer.model`, `spiece.model`, `sentencepiece.bpe.model` and so on."""
LICENCES = ("[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "COPYING*", "NOTICE*", "USE_POLICY*")
GENERATION = "generation_config.json"
VOCABULARY = "vocabulary.json"
"""Which tokens of its source a model with a smaller vocabulary has: `reduce-vocab` writes it."""
CARDS = (*LICENCES, "README.md")
"""The source's licence and card: they travel along without being part of the model's key."""
COMPANIONS = (
    *VOCABULARIES, "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    GENERATION, VOCABULARY, MODULES, "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
"""What transformers and sentence-transformers read beside config.json and the weights. It travels with every artifact,
as does what `modules.json` names."""
CONTENT = ("*.json", "*.txt", "*.jinja", *COMPANIONS)
"""What is read of a model's folder beside its weights: never a pickle, never code."""
_OWN_WEIGHTS = "transformers_weights"
"""A key of config.json by which transformers reads other weights than those that lie where they always do."""
NO_MASK_TOKEN = (
    "has no mask token among the model's, and a masked language model learns what stands in its place",
    "name it as mask_token in tokenizer_config.json",
)
"""What is wrong with a tokenizer, and what to do."""
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""transformers' names of the class of tokenizers that has no special tokens but those that its files name."""
TIED_HEADS = ("lm_head.weight", "embed_out.weight")
"""A decoder's head, which may be tied to the token embeddings, by its ending."""
_TABLES = tuple(f"{family.token_embedding}.weight" for family in FAMILIES)
_MODULE_FILES = ("config.json", "*.safetensors")


def folder_problem(folder: Path, readable: Collection[str] = ()) -> tuple[str, str] | None:
    """(what is wrong with a model's folder, what to do), or None where it can be read.

    readable: the methods of quantisation (`bitsandbytes`) whose weights the reader can do with.
    """
    if problem := files_problem(folder):
        return problem
    config = recall(folder / "config.json")
    if not isinstance(config, dict):
        return "has no readable config.json", "name the folder that save_pretrained wrote"
    named = weight_names(folder)
    if not named:
        if any(folder.glob("*.bin")):
            return "holds its weights as pickles only, which can run code", "save it as safetensors where you trust it"
        what = f"has no .safetensors weights: neither {WEIGHTS} nor {INDEX}"
        return what, "name the folder that save_pretrained wrote"
    quantization = config.get("quantization_config") or {"quant_method": None}
    unknown = "an unknown method"
    method = quantization.get("quant_method", unknown) if isinstance(quantization, dict) else unknown
    if method not in (None, *readable):
        return f"is quantised already ({method})", "name the model that it was made from"
    kind = kind_of(config)
    try:
        model_files(folder, CONTENT + CARDS)
        if kind == "encoder" and named_head(architecture_of(config)) is BACKBONE:
            read_pooling(folder)
    except CompressError as error:
        return error.problem.what, error.problem.fix
    if fault := companion_fault(folder):
        return f"has a {fault}", "correct it, or get the file again"
    return misfit(config, kind, tensor_names(folder)) if kind else None


def files_problem(folder: Path) -> tuple[str, str] | None:
    """As `folder_problem`, of the files alone: of a folder of ours, whatever its format, too."""
    shards = indexed(folder)
    inside = [name for name in shards if stays_inside(name)]
    modules = module_folders(folder) or ["1_Pooling"]
    parts = [f"{module}/{name}" for module in modules for name in _MODULE_FILES]
    read = (*CONTENT, *CARDS, WEIGHTS, *inside, "additional_chat_templates", *modules, *parts)
    if problem := adapter_problem(folder) or link_problem(folder, read):
        return problem
    if fault := _index_fault(folder):
        return fault, "copy or fetch it again"
    if named := (config_of(folder) or {}).get(_OWN_WEIGHTS):
        return f"has weights that config.json names ({_OWN_WEIGHTS}: {named!r})", f"call them {WEIGHTS}, and remove it"
    if outside := sorted({*shards} - {*inside}):
        return f"has weights outside of it: {outside[0]} ({INDEX})", "name a file in the folder, and put it there"
    missing = [name for name in shards if not os.path.isfile(folder / name)]  # os.path: no OSError for a name too long
    if missing:
        return f"lacks {missing[0]}, one of its {len(shards)} weight files", "copy or fetch it again"
    return None


def lacks_mask_token(folder: Path) -> bool:
    """Whether a folder's own files say that its tokenizer has no mask token; classes of one family have it unsaid."""
    files = [recall(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    said = [file for file in files if isinstance(file, dict)]
    return any(file.get("tokenizer_class") in _GENERIC for file in said) and not any(
        file.get("mask_token") for file in said
    )


def weight_names(folder: Path) -> list[str]:
    """The files of weights that transformers reads, sorted: `model.safetensors`, or else those that the index names."""
    return [WEIGHTS] if (folder / WEIGHTS).is_file() else indexed(folder)


def indexed(folder: Path) -> list[str]:
    """The files that `model.safetensors.index.json` names, sorted; none where there is no such index."""
    index = recall(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    return sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []


def _index_fault(folder: Path) -> str:
    """What is wrong with the index, where there is one and it is what is read; "" where nothing is."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return ""
    index = recall(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    whole = isinstance(named, dict) and bool(named) and all(isinstance(name, str) for name in named.values())
    return "" if whole else f"has an {INDEX} without a weight_map from tensors to files"


def tensor_names(folder: Path) -> set[str]:
    """The names of a model's weights; none where a file of them can't be read."""
    return names_in(folder / name for name in weight_names(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that are read: the model's, and those of the modules that `modules.json` puts after it."""
    modules = [file for file in _of_modules(folder) if file.suffix == ".safetensors"]
    return [*(folder / name for name in weight_names(folder)), *modules]


def model_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a model's folder that match `patterns`, sorted, without our own manifests.

    Where the patterns have `modules.json`, also those of the modules that it names. Raises CompressError for a
    link that leads out of the folder: what it names, a private key perhaps, would travel with every artifact.
    """
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    if MODULES in patterns:
        found |= set(_of_modules(folder))
    for file in sorted(found):
        if not _is_own(file, folder):
            what = f"has a file that is a link to another folder: {file.relative_to(folder)} → {file.resolve()}"
            raise CompressError(str(folder), what, "put a copy in its place, or take it away")
    return sorted(file for file in found if file.name not in (cache.MANIFEST, artifact.MANIFEST))


def module_folders(folder: Path) -> list[str]:
    """The folders beside the backbone that sentence-transformers' `modules.json` names: `1_Pooling`, `2_Dense`."""
    modules = recall(folder / MODULES)
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    inside = {PurePosixPath(path) for path in named if stays_inside(path)}
    return sorted(str(path) for path in inside - {PurePosixPath()})


def config_of(folder: Path) -> dict[str, Any] | None:
    """The parsed `config.json` of a folder; None where there is none that can be read.

    Of a head that is tied by what it says, and by the weights has others than the embeddings (a trainer untied it, or
    merged an adapter into it), the weights are believed, as transformers does: `tie_word_embeddings` is False. Of
    BERT's head it goes on tying the bias by that, and leaves the weights apart all the same.
    """
    config = recall(folder / "config.json")
    if not isinstance(config, dict):
        return None
    if config.get("tie_word_embeddings") is not False and _has_own_head(folder):
        return {**config, "tie_word_embeddings": False}
    return config


def _has_own_head(folder: Path) -> bool:
    """Whether the weights have a head of text that is not the table of the embeddings again."""
    try:
        files = [folder / name for name in weight_names(folder)]
        return _stands_apart(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    except (CompressError, OSError, ValueError):  # told where they are loaded
        return False


@lru_cache
def _stands_apart(files: tuple[tuple[str, int, int], ...]) -> bool:
    """As `_has_own_head`, of files of that name, size and time."""
    tensors = [tensor for name, *_ in files for tensor in stored_tensors(Path(name))]
    heads = [tensor for tensor in tensors if tensor.name.endswith(TIED_HEADS)]
    tables = [tensor for tensor in tensors if tensor.name.endswith(_TABLES)]
    return bool(heads and tables) and not any(head.equals(table) for head in heads for table in tables)


def _of_modules(folder: Path) -> list[Path]:
    places = [folder / name for name in module_folders(folder)] or [folder / "1_Pooling"]
    return sorted(file for place in places if os.path.isdir(place)
                  for name in _MODULE_FILES for file in place.glob(name) if file.is_file())  # fmt: skip


def _is_own(file: Path, folder: Path) -> bool:
    """Whether a file's content lies in the folder, or in the store that the hub's cache links its snapshots to."""
    root = folder.resolve()
    places = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    return any(file.resolve().is_relative_to(place) for place in places)
