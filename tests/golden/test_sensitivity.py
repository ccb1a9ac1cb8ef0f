"""Records see what they are for: a change of a stage's behaviour, of each kind that has happened, fails one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

import compress.exports.onnx.attention as attention
import compress.exports.onnx.describe as describe
import compress.quant.apply as apply
import compress.quant.fake as fake
import compress.quant.search as search
import compress.stages.convert.stage as convert
import compress.stages.prune.importance as importance
import compress.stages.prune.scores as scores
import compress.train.objective as objective
from compress.registry import stage_class
from golden.cases import CASES
from golden.comparing import differences
from golden.models import Workshop
from golden.recording import array_record, as_json, case_record, defaults, groups, packed
from golden.write import own_stages

Written = Callable[[str], dict[str, Any]]


def _squared(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args) ** 2


def _scaled(by: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(*args: Any) -> Any:
        found = function(*args)
        return tuple(by * each for each in found) if isinstance(found, tuple) else by * found

    return scaled


def _powered(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: {name: value**2 for name, value in function(*args).items()}


_ROUNDS = "json.scores.json.rounds"
CHANGES: dict[str, tuple[str, Any, str, Any, str]] = {
    "the window of linear": ("convert-attention/linear", convert, "NEAR", 32, "config.mixers[1].window"),
    "OUTLIER_ERROR": ("quantize/w8a8-dynamic", apply, "OUTLIER_ERROR", 0.01, "json.errors.json.spared"),
    "GPTQ's damping": ("quantize/gptq", search, "DAMPING", 1e-2, "codes."),
    "skew-KL's α": ("distill/kl", objective, "skew_kl", partial(objective.skew_kl, alpha=0.2), "json.history.json"),
    "LSQ's gradient scale": ("qat/lsq", fake, "_greatest_level", _scaled(4, fake._greatest_level), "tensors."),
    "block influence": ("prune-layers/block-influence", scores, "cosine", _squared(scores.cosine), _ROUNDS),
    "the angular score": ("prune-layers/angular", scores, "cosine", _squared(scores.cosine), _ROUNDS),
    "leave-one-out": ("prune-layers/leave-one-out", scores, "distance", _scaled(2, scores.distance), _ROUNDS),
    "the importance of groups": (
        "prune-groups/activation", importance, "_squares", _powered(importance._squares), "json.groups.json.shares",
    ),
    "the rotary scale": (
        "export-onnx/fp32", describe, "rotary_tables", _scaled(1.01, describe.rotary_tables), "tensors.cos",
    ),
    "the scale of q·k": ("export-onnx/fp32", attention, "scale", _scaled(1.01, attention.scale), "graph.nodes"),
    "the local window": ("export-onnx/fp32", attention, "window", lambda *_: 255, "graph.nodes"),
}  # fmt: skip
"""By what is changed: the case, where it is, the new value, and where the record sees it."""


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_fails_the_record(
    what: str, written: Written, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, module, name, value, seen = CHANGES[what]
    stage, _, own = case.partition("/")
    monkeypatch.setattr(module, name, value)
    now = as_json(case_record(stage, CASES[stage][own], workshop))
    found = list(differences(written(stage)["cases"][own], now))
    assert [each for each in found if each.startswith(seen)], found


def _fields(cls: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[type[BaseModel], str]]:
    """Every option with a default, of a stage and of the groups that its options open."""
    seen.add(cls)
    for name, field in cls.model_fields.items():
        if not field.is_required():
            yield cls, name
        for group in groups(field.annotation):
            if group not in seen:
                yield from _fields(group, seen)


@pytest.mark.parametrize("stage", own_stages())
def test_a_change_of_any_default_fails_the_record(
    stage: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, record = stage_class(stage), written(stage)["defaults"]
    options = list(_fields(cls, set()))
    assert len(options) >= 3
    for owner, name in options:
        with monkeypatch.context() as patch:
            patch.setattr(owner.model_fields[name], "default", "another")
            assert defaults(cls) != record, (owner, name)
    assert defaults(cls) == record


def test_every_default_of_a_training_is_among_them(written: Written) -> None:
    steps = {
        "data", "tokens", "sequence_length", "batch_size", "learning_rate", "warmup_ratio", "lr_scheduler_type",
        "weight_decay", "max_grad_norm", "optim", "precision",
    }  # fmt: skip
    training = steps | {
        "loss", "temperature", "hidden_distance", "gradient_accumulation_steps", "gradient_checkpointing",
        "eval_tokens", "eval_steps", "early_stopping_patience",
    }  # fmt: skip
    assert training <= written("distill")["defaults"].keys()
    assert training | {"learn", "scale_learning_rate", "method"} <= written("qat")["defaults"].keys()
    conversion = written("convert-attention")["defaults"]
    assert steps <= conversion["align"].keys()
    assert training | {"mixer_learning_rate"} <= conversion["distill"].keys()


def test_what_cpus_differ_by_passes_and_what_is_more_does_not() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    codes = np.random.default_rng(0).integers(0, 16, 1000).astype(np.uint8)
    flipped = codes.copy()
    flipped[::100] ^= 1

    def record(floats: Any, ints: Any, figure: float) -> dict[str, Any]:
        tensors = {"floats": array_record(floats), "codes": array_record(ints)}
        return as_json({"tensors": tensors, "codes": {"codes": packed(ints)}, "figures": {"kl": figure, "n": 3}})

    was = record(values, codes, 1.0)
    assert not list(differences(was, record(values + np.float32(5e-4), flipped, 1.0005)))
    flipped[50::100] ^= 1
    places = {each.split(":")[0] for each in differences(was, record(values + np.float32(2e-3), flipped, 1.002))}
    assert places >= {"tensors.floats.samples", "codes.codes", "figures.kl"}
    for change in ({"dtype": "float16"}, {"shape": [2, 500]}, {"rms": float("nan")}):
        other = deepcopy(was)
        other["tensors"]["floats"] |= change
        assert list(differences(was, other)), change
    other = deepcopy(was)
    other["tensors"]["new"] = other["tensors"].pop("floats")
    other["figures"]["n"] = 4
    assert sorted(each.split(":")[0] for each in differences(was, other)) == [
        "figures.n", "tensors.floats is missing", "tensors.new is new",
    ]  # fmt: skip
