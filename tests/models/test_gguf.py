"""What a GGUF file says is what its model's folder says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_gguf

from compress.errors import CompressError
from compress.models.gguf import convert
from compress.models.load import load_model, load_tokenizer
from pico import VOCAB_SIZE, make_pico

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def divisors(rope: dict[str, Any], head_dim: int) -> list[float]:
    """What llama.cpp's converter stores for rope type llama3."""
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    found = []
    for index in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def converted(model: Path, tmp_path: Path, **options: Any) -> Path:
    convert(write_gguf(model, tmp_path / "tiny.gguf", **options), tmp_path / "out")
    return tmp_path / "out"


def logits(folder: Path) -> Any:
    with torch.no_grad():
        return load_model(folder)(torch.arange(200).reshape(1, 200)).logits


@pytest.mark.parametrize(("model_type", "options", "said"), [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}, {}),
    ("llama", {"head_dim": 32, "tie_word_embeddings": False, "max_position_embeddings": 300}, {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, {}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}, {}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}}, {}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
     {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    ("qwen2", {"rope_parameters": YARN},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    ("qwen2", {"tie_word_embeddings": False}, {}),
    ("qwen3", {"head_dim": 32}, {}),
    ("qwen3", {"attention_bias": True}, {}),
])  # fmt: skip
def test_a_gguf_is_the_model_that_it_was_written_from(
    model_type: str, options: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    model = make_pico(model_type, tmp_path / "model", num_hidden_layers=2, **options)
    rope = options.get("rope_parameters", {})
    factors = divisors(rope, options.get("head_dim", 16)) if rope.get("rope_type") == "llama3" else None
    folder = converted(model, tmp_path, said=said, rope_freqs=factors)
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (folder, model))
    assert ours.pop("rope_theta") == theirs["rope_parameters"]["rope_theta"]  # for transformers 4
    assert ours == theirs
    assert (logits(folder) == logits(model)).all()


def test_other_factors_than_llama3_has_are_refused(tmp_path: Path) -> None:
    model = make_pico("llama", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(CompressError, match=r"rope_freqs\.weight, whose factors are not those of rope type llama3"):
        converted(model, tmp_path, rope_freqs=[1, 1, 2, 3, 5, 8, 8, 8])


@pytest.mark.parametrize(("said", "expected"), [
    ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "by longrope"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 0.1},
     "rope.scaling.yarn_log_multiplier"),
    ({"rope.dimension_count": 8}, "rope.dimension_count 8 where a head is 16 wide"),
])  # fmt: skip
def test_what_a_gguf_says_and_can_not_be_read_is_named(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model = make_pico("llama", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(CompressError, match=f"tiny.gguf: .*{expected}"):
        converted(model, tmp_path, said=said)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_vocabulary_without_endoftext_stays_as_it_is(model_type: str, tmp_path: Path) -> None:
    model = make_pico(model_type, tmp_path / "model", num_hidden_layers=1)
    ours, theirs = load_tokenizer(converted(model, tmp_path)), load_tokenizer(model)
    assert len(ours) == VOCAB_SIZE
    text = "The if statement<|end|> is used for ünconditional execution"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
