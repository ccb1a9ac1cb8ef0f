"""The models that records are of: small, drawn by numpy name by name, the same with every library and interpreter.

Each has channels with outliers, rows and a block of zeros, and rows of text that are padded, so that every branch of a
stage counts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from exporting import export, quantised
from numpy.typing import NDArray

from compress.quant.schemes import SCHEMES
from pico import VOCAB_SIZE, make_pico, mixer_spec

LENGTH = 24
PADDING = (0, 9, 17)
"""Tokens of padding in each row of `padded_batch`."""
_OUTLIER, _FACTOR = 5, 8.0
_YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}


class Workshop:
    """Folders of models by their names, each made once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        """The folder of the model called `name`; nobody writes to it."""
        made = self._folder / name
        if not made.is_dir():
            _MODELS[name](self, made)
        return made


class Text:
    """Stands for a pipeline's text: random tokens, others for each split, and sentences of a made-up language."""

    def blocks(self, split: str, tokenizer: object, length: int, max_tokens: int | None = None) -> NDArray[np.int64]:
        num_blocks = min(max_tokens or 4096, 4096) // length
        return _generator(split).integers(1, VOCAB_SIZE, (num_blocks, length))

    def texts(self, split: str) -> list[str]:
        return [sentences(split, 300)]

    def digest(self, split: str) -> str:
        return split


def sentences(name: str, number: int) -> str:
    """Sentences of words of two syllables: text that no release of an interpreter changes, as its own pages are."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(_generator("words").permutation(syllables)[at : at + 2]) for at in range(len(syllables) - 1)]
    drawn = _generator(name)
    return " ".join("the " + " ".join(drawn.choice(words, 7)) + "." for _ in range(number))


def padded_batch(side: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask (rows, LENGTH) of rows padded on one `side`, each by another of PADDING."""
    ids = _generator("batch").integers(1, VOCAB_SIZE, (len(PADDING), LENGTH))
    places = np.arange(LENGTH)[None] if side == "left" else np.arange(LENGTH)[None, ::-1]
    mask = (places >= np.array(PADDING)[:, None]).astype(np.int64)
    return ids * mask, mask


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _pico(model_type: str, seed: int = 0, **options: Any) -> Callable[[Workshop, Path], None]:
    def make(_: Workshop, folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        make_pico(model_type, folder, **options)
        file = folder / "model.safetensors"
        tensors = {name: _drawn(name, tensor, seed) for name, tensor in load_file(file).items()}
        _put_outliers(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        _write_tokenizer(folder)

    return make


def _drawn(name: str, like: NDArray[Any], seed: int) -> NDArray[np.float32]:
    """Values for a tensor of that name: those of norms lie around 1."""
    values = _generator(f"{seed} {name}").normal(size=like.shape).astype(np.float32)
    if like.ndim == 1:
        return 0.3 * values if name.endswith("bias") else 1 + 0.1 * values
    if "mlp.up" in name or "intermediate" in name:
        values[:2], values[2, :32] = 0, 0  # two channels that say nothing, and a block of a third
    return 0.15 * values


def _put_outliers(tensors: dict[str, NDArray[Any]]) -> None:
    """One channel that norms make large and the matrices behind make small again, more so in later layers."""
    for name in tensors:
        before, _, leaf = name.rpartition("layernorm.weight")
        if not before or leaf:
            continue
        layer, readers = name.rsplit(".", 2)[0], ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate", "up")
        factor = _FACTOR * (1 + int(layer.rpartition(".")[2]))
        tensors[name][_OUTLIER] *= factor
        for reader in tensors:
            if reader.startswith(f"{layer}.") and any(leaf in reader for leaf in readers):
                tensors[reader][:, _OUTLIER] /= factor


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    text = sentences("tokenizer", 400)
    bpe.train_from_iterator([text], vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], show_progress=False)
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end).save_pretrained(folder)


def _hybrid(*mixers: str | None, source: str = "llama") -> Callable[[Workshop, Path], None]:
    """`source` with these mixers, whose own parts are moved away from the identity that they start as."""

    def make(workshop: Workshop, folder: Path) -> None:
        import torch

        from compress.models.convert import to_hybrid
        from compress.models.load import load_model, save_model

        softmax = load_model(workshop(source))
        hybrid = to_hybrid(softmax, [name and mixer_spec(name) for name in mixers])
        inherited = set(softmax.state_dict())
        with torch.no_grad():
            for name, parameter in hybrid.named_parameters():
                if name not in inherited:
                    parameter.add_(torch.from_numpy(_generator(name).uniform(0, 0.2, tuple(parameter.shape))))
        save_model(hybrid, workshop(source), folder)

    return make


def _rounded(scheme: str, *, source: str = "llama") -> Callable[[Workshop, Path], None]:
    def make(workshop: Workshop, folder: Path) -> None:
        quantised(workshop(source), folder, SCHEMES[scheme], reduce_range=True)

    return make


def _exported(source: str, kind: str = "torch") -> Callable[[Workshop, Path], None]:
    def make(workshop: Workshop, folder: Path) -> None:
        export(workshop(source), folder, kind)

    return make


def _with_fewer_tokens(workshop: Workshop, folder: Path) -> None:
    from compress.artifact import Artifact
    from compress.stage import StageContext, Target
    from compress.stages.vocab.stage import ReduceVocab

    folder.mkdir()
    inputs, text = {"input": Artifact(workshop("llama"), "torch", "source", "key")}, cast(Any, Text())
    ReduceVocab(keep=320, tokens=2048).run(StageContext(folder, folder, inputs, text, 0, Target()))


_MODELS: Mapping[str, Callable[[Workshop, Path], None]] = {
    "llama": _pico("llama", num_hidden_layers=2),
    "llama-other": _pico("llama", 1, num_hidden_layers=2),
    "llama-deep": _pico("llama", num_hidden_layers=4),
    "llama-untied": _pico("llama", num_hidden_layers=2, tie_word_embeddings=False, rope_parameters=_YARN),
    "gpt2": _pico("gpt2", num_hidden_layers=1),
    "bert": _pico("bert", num_hidden_layers=2),
    "bert-other": _pico("bert", 1, num_hidden_layers=2),
    "llama-fewer-tokens": _with_fewer_tokens,
    "hybrid": _hybrid("gated-linear@6", "mamba2"),
    "hybrid-linear": _hybrid("linear", "linear"),
    "llama-w4": _rounded("w4-block32"),
    "llama-w8a8": _rounded("w8a8-dynamic"),
    "bert-w8a8": _rounded("w8a8-static", source="bert"),
    "hybrid-w4": _rounded("w4-block32", source="hybrid"),
    "llama-onnx": _exported("llama"),
    "llama-w4-onnx": _exported("llama-w4", "quantized"),
}
