"""`prune-layers` as a stage: its options, what it writes, and that the smaller model is the full one with gaps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.artifact import Artifact
from compress.errors import StageFailed
from compress.mixers.cache_name import CACHE
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stage import StageContext, Target
from compress.stages.prune.layers import PruneLayers
from compress.stages.prune.surgery import drop_layers
from pico import MODEL_TYPES, VOCAB_SIZE, make_pico

Pico = Callable[[str], Path]


@dataclass
class RandomTokens:
    """Stands for a pipeline's text: the same random token ids each time."""

    num_tokens: int = 4096

    def blocks(self, split: str, tokenizer: Any, sequence_length: int, max_tokens: int | None = None) -> Any:
        assert split == "train"
        num_blocks = min(self.num_tokens, max_tokens or self.num_tokens) // sequence_length
        return np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_blocks, sequence_length))


def context(source: Path, out: Path, *, seed: int = 0, num_tokens: int = 4096) -> Any:
    artifact = Artifact(source, "torch", "source", "key")
    return StageContext(out, out, {"input": artifact}, RandomTokens(num_tokens), seed, Target())  # type: ignore


def prune(source: Path, out: Path, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    stage = PruneLayers.model_validate({"tokens": 128, "sequence_length": 32, **options})
    return {**stage.run(context(source, out, seed=seed))["result"]}


def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


class Skip(nn.Module):
    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_and_reloaded_equals_the_full_model_without_those_layers(
    model_type: str, pico: Pico, tmp_path: Path
) -> None:
    figures = prune(pico(model_type), tmp_path, drop=[1, 2])
    full, pruned = load_model(pico(model_type)), load_model(tmp_path)
    ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
    unpruned = outputs(full, ids)
    masked = Parts(full)
    masked.replace_layers([Skip() if i in (1, 2) else layer for i, layer in enumerate(masked.layers)])
    torch.testing.assert_close(outputs(pruned, ids), outputs(full, ids), rtol=1e-5, atol=1e-5)
    assert (outputs(pruned, ids) - unpruned).abs().max() > 0.1
    assert figures["num_hidden_layers"] == len(Parts(pruned).layers) == 2
    assert figures["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert type(pruned) is type(full)
    assert (tmp_path / "LICENSE").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "bert"])
@pytest.mark.parametrize("reloaded", [True, False])
def test_key_value_cache_after_pruning(model_type: str, reloaded: bool, pico: Pico, tmp_path: Path) -> None:
    model = load_model(pico(model_type))
    drop_layers(model, [0, 2])
    if reloaded:
        model.save_pretrained(tmp_path)
        model = load_model(tmp_path)
    ids = torch.randint(1, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(2))
    whole = outputs(model, ids)
    cache, steps = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            result = model(token, use_cache=True, **{CACHE: cache})
            cache = getattr(result, CACHE)
            steps.append(result.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generate: Any = model.generate
    assert torch.equal(generate(ids, use_cache=True, **options), generate(ids, use_cache=False, **options))


def test_layer_types_and_the_sliding_window_stay_with_their_layers(tmp_path: Path) -> None:
    source = make_pico(
        "qwen2", tmp_path / "source", use_sliding_window=True, sliding_window=8, max_window_layers=2
    )  # layers 2 and 3 slide
    (tmp_path / "out").mkdir()
    prune(source, tmp_path / "out", drop=[1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (config["num_hidden_layers"], config["max_window_layers"]) == (3, 1)
    full, pruned = load_model(source), load_model(tmp_path / "out")
    kept = Parts(full)
    kept.replace_layers([Skip() if i == 1 else layer for i, layer in enumerate(kept.layers)])
    ids = torch.randint(0, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(outputs(pruned, ids), outputs(full, ids), rtol=1e-5, atol=1e-5)


def test_attention_scaled_by_the_layers_number_is_refused(tmp_path: Path) -> None:
    source = make_pico("gpt2", tmp_path / "source", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(StageFailed, match="scale_attn_by_inverse_layer_idx"):
        prune(source, tmp_path, drop=1, by="uniform")


@pytest.mark.parametrize(
    ("by", "num_rounds", "num_scores"), [("block-influence", 1, 4), ("angular", 1, 3), ("leave-one-out", 2, 4)]
)
def test_scores_are_written_and_plotted(
    by: str, num_rounds: int, num_scores: int, pico: Pico, tmp_path: Path
) -> None:
    prune(pico("llama"), tmp_path, keep=2, by=by)
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["options"] == {"keep": 2, "by": by, "tokens": 128, "sequence_length": 32}
    assert len(record["dropped"]) == 2
    assert len(record["rounds"]) == num_rounds
    assert len(record["rounds"][0]) == num_scores
    assert record["num_tokens"] == 128
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_controls_read_no_text_and_follow_the_seed(pico: Pico, tmp_path: Path) -> None:
    def dropped(by: str, seed: int) -> list[int]:
        out = tmp_path / f"{by}-{seed}"
        out.mkdir(exist_ok=True)
        PruneLayers.model_validate({"drop": 2, "by": by}).run(context(pico("llama"), out, seed=seed, num_tokens=0))
        assert not (out / "scores.png").exists()
        return json.loads((out / "scores.json").read_text())["dropped"]  # type: ignore[no-any-return]

    assert dropped("uniform", 0) == dropped("uniform", 1) == [1, 2]
    assert dropped("random", 0) == dropped("random", 0)
    assert len({tuple(dropped("random", seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("options", "num_kept"),
    [({"keep": 3}, 3), ({"drop": 3}, 7), ({"keep": 0.75}, 8), ({"drop": 0.3}, 7), ({"keep": [0, 4]}, 2)],
)
def test_shape_follows_the_options(options: dict[str, Any], num_kept: int) -> None:
    stage = PruneLayers(**options)
    model = shape_of(LLAMA_OF_TEN)
    assert list(stage.check(model)) == []
    assert stage.shape(model).num_hidden_layers == num_kept
    assert stage.weight_bytes(stage.shape(model), 1.0) == 4 * stage.shape(model).num_parameters


LLAMA_OF_TEN = {"model_type": "llama", "num_hidden_layers": 10, "hidden_size": 64, "num_attention_heads": 4,
                "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "where", "what", "fix"),
    [
        ({"keep": 40}, "keep", "40 of 10", "1 to 9"),
        ({"keep": 10}, "keep", "drops 0", "1 to 9"),
        ({"drop": 10}, "drop", "leaves 0", "1 to 9"),
        ({"drop": 0.04}, "drop", "drops 0", "0.10 to 0.90"),
        ({"keep": [0, 10]}, "keep", "beyond", "0 to 9"),
        ({"drop": [3, 3]}, "drop", "twice", "0 to 9"),
        ({"drop": list(range(10))}, "drop", "leaves 0", "1 to 9"),
        ({"drop": 2, "sequence_length": 512}, "sequence_length", "256 positions", "at most 256"),
        ({"drop": 2, "tokens": 100}, "tokens", "do not fill", "at least 256"),
    ],
)
def test_impossible_options_are_named_with_their_range(options: Any, where: str, what: str, fix: str) -> None:
    (problem,) = PruneLayers(**options).check(shape_of(LLAMA_OF_TEN))
    assert problem.where == where
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either keep or drop"),
        ({"keep": 3, "drop": 3}, "either keep or drop"),
        ({"keep": 0}, "number of layers from 1"),
        ({"keep": -2}, "number of layers from 1"),
        ({"keep": 1.5}, "number of layers from 1"),
        ({"keep": True}, "number of layers from 1"),
        ({"keep": "many"}, "number of layers from 1"),
        ({"drop": []}, "number of layers from 1"),
        ({"drop": [-1]}, "number of layers from 1"),
        ({"drop": [1], "by": "random"}, "by has no say"),
        ({"drop": 1, "by": "magnitude"}, "block-influence"),
        ({"drop": 1, "tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_options_are_refused_in_one_message(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        PruneLayers.model_validate(options)
    assert error.value.error_count() == 1


def test_a_two_layer_twin_runs(tmp_path: Path) -> None:
    source = make_pico("llama", tmp_path / "source", num_hidden_layers=2)
    for number, by in enumerate(("block-influence", "angular", "leave-one-out", "uniform", "random")):
        (tmp_path / str(number)).mkdir()
        twin = PruneLayers(keep=24, by=by).twin()
        assert twin.run(context(source, tmp_path / str(number)))["result"]["num_hidden_layers"] == 1
    again = twin.run(context(tmp_path / "0", tmp_path / "1"))  # a second prune-layers in the same pipeline
    assert again["result"]["num_hidden_layers"] == 1


def test_the_stage_class_needs_no_torch() -> None:
    code = "import sys, compress.stages.prune.layers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
