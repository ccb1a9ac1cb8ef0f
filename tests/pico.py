"""Pico models of every supported family and a small tokenizer, built from configs: no download, no hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

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
def _tokenizer() -> Any:
    import pydoc_data.topics as topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [text for _, text in sorted(topics.topics.items())][:20]
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=["<|end|>"], show_progress=False)
    end = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end)


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
    _tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("# a pico model\n")
    return folder
