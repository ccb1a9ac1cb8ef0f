"""Pico models of every supported family and a small tokenizer, built from configs: no download, no hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from compress.mixers.spec import SPECS, MixerSpec

VOCAB_SIZE = 512
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "bert")

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4, "n_positions": 256},
    "bert": {},
}


@cache
def _tokenizer(masks: bool = False) -> Any:
    """masks: one of its tokens is the mask token."""
    import pydoc_data.topics as topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [text for _, text in sorted(topics.topics.items())][:20]
    named = {"mask_token": "[MASK]"} if masks else {}
    special = ["<|end|>", *named.values()]
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    named |= {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **named)


def make_pico(model_type: str, folder: Path, *, num_hidden_layers: int = 4, seed: int = 0, **overrides: Any) -> Path:
    """Write a pico model of `model_type` (random weights, well-scaled logits) and its tokenizer to `folder`.

    `architecture=` names another head than the family's usual one (`BertForSequenceClassification`).
    """
    import torch
    import transformers

    architecture = overrides.pop("architecture", None)
    options = {**_COMMON, **_OWN[model_type], "num_hidden_layers": num_hidden_layers, **overrides}
    if model_type == "gpt2":
        options["n_layer"] = options.pop("num_hidden_layers")
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
            options.pop(key)
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(seed)
    if architecture:
        model = getattr(transformers, architecture)(config)
    elif model_type == "bert":
        model = transformers.AutoModel.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "bias" in name:  # the default zeros would hide a forgotten bias
                parameter.normal_(0.0, 0.05)
            else:  # a norm's weight: the default ones would hide a forgotten one
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder)
    _tokenizer(masks=(architecture or "").endswith("ForMaskedLM")).save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("# a pico model\n")
    return folder


def mixer_spec(name: str) -> MixerSpec:
    """`gated-linear`; `gated-linear@8` with a window of 8 tokens; `gated-linear/softmax@8` with that feature map."""
    kind, _, window = name.partition("@")
    kind, _, feature_map = kind.partition("/")
    spec = replace(SPECS[kind], window=int(window or 0))  # type: ignore[index]
    return replace(spec, feature_map=feature_map) if feature_map else spec  # type: ignore[arg-type]


def make_hybrid(
    model_type: str, folder: Path, mixers: Sequence[str | None] = ("mamba2", None, "gated-delta", "linear"),
    *, layer_types: Sequence[str] | None = None, sliding_window: int | None = None, **overrides: Any,
) -> Path:  # fmt: skip
    """Write a pico model of `model_type` whose layers have these mixers, with random weights in all of their parts.

    They are named as `mixer_spec` has it.
    """
    import tempfile

    import torch

    from compress.models.convert import to_hybrid
    from compress.models.load import load_model, save_model

    specs = [mixer_spec(name) if name else None for name in mixers]
    with tempfile.TemporaryDirectory() as temporary:
        source = make_pico(model_type, Path(temporary), num_hidden_layers=len(specs), **overrides)
        softmax = load_model(source)
        model = to_hybrid(softmax, specs, layer_types, sliding_window)
        inherited = set(softmax.state_dict())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in inherited:  # the identity that a mixer starts as would hide a forgotten part
                    parameter.add_(torch.rand_like(parameter), alpha=0.2)
        save_model(model, source, folder)
    return folder
