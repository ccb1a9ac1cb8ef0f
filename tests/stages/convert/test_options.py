"""What `convert-attention` lets a user ask for, and how it refuses the rest: before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))

from converting import convert

from compress.models.anatomy import ModelShape, shape_of
from compress.stages.convert.layers import kinds
from compress.stages.convert.stage import ConvertAttention

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 10, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


def problems(model: ModelShape, **options: Any) -> list[tuple[str, str]]:
    stage = ConvertAttention.model_validate({"to": "linear", **options})
    return [(problem.where, f"{problem.what}; {problem.fix}") for problem in stage.check(model)]


def converted(*stages: dict[str, Any], **config: Any) -> ModelShape:
    """The shape after these conversions."""
    model = shape_of({**CONFIG, **config})
    for options in stages:
        stage = ConvertAttention.model_validate({"to": "linear", **options})
        assert list(stage.check(model)) == []
        model = stage.shape(model)
    return model


@pytest.mark.parametrize(
    ("options", "num_softmax"),
    [
        ({}, 0), ({"keep": 0}, 0), ({"keep": 3}, 3), ({"keep": 0.2}, 2), ({"keep": [0, 9]}, 2), ({"convert": 4}, 6),
        ({"convert": 0.4}, 6), ({"convert": [1, 2]}, 8), ({"convert": 10}, 0), ({"keep": 2, "select": "uniform"}, 2),
    ],
)  # fmt: skip
def test_shape_follows_the_options(options: dict[str, Any], num_softmax: int) -> None:
    model = converted(options)
    assert kinds(model).count("full_attention") == num_softmax
    assert kinds(model).count("linear") == 10 - num_softmax
    assert model.model_type == "hybrid_llama"
    assert model.num_parameters > shape_of(CONFIG).num_parameters
    measured = ("keep" in options and options["keep"] in (3, 0.2)) or options.get("convert") in (4, 0.4)
    assert model.layers_guessed == (measured and "select" not in options)


def test_one_conversion_goes_on_from_another() -> None:
    stages = {"keep": 6, "window": 0}, {"keep": 2, "window": 0}, {"to": "mamba2"}, {"to": "sliding", "convert": 1}
    again = converted(*stages)
    assert sorted(kinds(again)) == ["full_attention"] + ["mamba2"] * 8 + ["sliding_attention"]
    assert kinds(converted({"keep": [0], "window": 0}, {"to": "mamba2", "convert": [3]}))[:4] == [
        "full_attention", "linear", "linear", "mamba2",
    ]  # fmt: skip
    assert kinds(converted({"keep": [0], "window": 0}, {"to": "mamba2", "keep": 1})).count("mamba2") == 9


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"keep": 40}, "keep", "40 of 10 layers.* choose 0 to 9"),
        ({"keep": 10}, "keep", "10 of 10 layers leaves none to convert; choose 0 to 9"),
        ({"convert": 11}, "convert", "11 of 10 layers.* choose 1 to 10"),
        ({"convert": 0.04}, "convert", "leaves none to convert"),
        ({"convert": [0, 10]}, "convert", "beyond the model's 10 layers; list different indices from 0 to 9"),
        ({"keep": [3, 3]}, "keep", "an index twice"),
        ({"keep": list(range(10))}, "keep", "leaves none to convert"),
        ({"keep": 5, "select_tokens": 100}, "select_tokens", "do not fill one block of 256; at least 256"),
        ({"align": {"sequence_length": 1024}}, "align.sequence_length", "1024 is more than the model's 512 positions"),
        ({"distill": {"sequence_length": 1024}}, "distill.sequence_length", "512 positions"),
        ({"distill": {"gradient_accumulation_steps": 3}}, "distill.gradient_accumulation_steps", "does not divide"),
    ],
)
def test_impossible_options_are_named_with_what_is_possible(options: Any, where: str, words: str) -> None:
    import re

    ((found, message),) = problems(shape_of(CONFIG), **options)
    assert found == where
    assert re.search(words, message), message


def test_all_problems_are_named_at_once() -> None:
    options = {"to": "sliding", "window": 600, "keep": 40, "distill": {"loss": {"kl": 0}}}
    found = [where for where, _ in problems(shape_of(CONFIG), **options)]
    assert found == ["keep", "distill.loss", "window", "window", "window"]


@pytest.mark.parametrize(
    ("window", "options", "what"),
    [
        (256, {}, "256 tokens are no fewer than align.sequence_length"),
        (300, {"align": None}, "no fewer than distill.sequence_length"),
        (512, {"align": None, "distill": None}, "no fewer than the model's positions, 512: .*; at most 511"),
    ],
)
def test_a_window_that_changes_nothing(window: int, options: Any, what: str) -> None:
    import re

    found = problems(shape_of(CONFIG), to="sliding", window=window, **options)
    assert found[0][0] == "window"
    assert re.search(what, found[0][1]), found
    assert problems(shape_of(CONFIG), to="sliding", window=255) == []


@pytest.mark.parametrize("to", ["linear", "gated-linear", "mamba2", "gated-delta", "sliding"])
def test_converting_twice(to: str) -> None:
    once = converted({"to": to, "keep": [0]})
    ((where, message),) = problems(once, to=to, convert=[3])
    assert where == "convert"
    name = "sliding_attention" if to == "sliding" else to
    assert f"layer 3 has {name}, and {to} is made from full_attention; choose from [0]" in message
    ((where, message),) = problems(converted({"to": to}), to=to)
    assert where == "to"
    assert f"no layer is left that could be converted: they have {name}" in message


def test_what_is_not_known_yet_is_not_refused() -> None:
    assert problems(converted({"keep": 5}), convert=[0]) == []
    assert [where for where, _ in problems(converted({"keep": 5}), keep=5)] == ["keep"]


def test_softmax_layers_are_not_what_mamba2_goes_on_from() -> None:
    ((where, message),) = problems(converted({"keep": 5, "window": 0}), to="mamba2", keep=4)
    assert where == "keep"
    assert "leave keep out" in message or "can be" in message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"num_attention_sinks": 4}, "num_attention_sinks 4"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096 in every layer"),
    ],
)
def test_attention_that_can_not_be_carried_over_is_named(config: Any, named: str) -> None:
    ((where, message),) = problems(shape_of({**CONFIG, **config}))
    assert where == "to"
    assert f"the model's attention has {named}, which can't be carried over" in message


def test_a_window_leaves_linear_attention_something_to_read() -> None:
    found = problems(shape_of(CONFIG), to="gated-linear", window=256)
    assert {where for where, _ in found} == {"window"}
    assert "nothing is left for the linear attention" in found[0][1]
    assert problems(shape_of(CONFIG), to="gated-linear", window=255) == []


def test_linear_attention_in_decoders_stands_behind_a_window() -> None:
    from compress.pipeline.matrix import sample_shape

    def window(model: ModelShape, **options: Any) -> set[int]:
        shape = ConvertAttention.model_validate({"to": "linear", **options}).shape(model)
        return {spec.window for spec in shape.mixers if spec}

    model = shape_of(CONFIG)
    assert window(model) == window(model, to="gated-linear") == {64}
    assert window(model, align={"sequence_length": 32}) == {16}
    assert window(model, window=0) == window(model, to="mamba2") == window(sample_shape("bert")) == {0}


def test_the_second_step_takes_no_window() -> None:
    ((where, message),) = problems(converted({"to": "linear", "keep": [0], "window": 8}), to="mamba2")
    assert where == "to"
    assert "mamba2 has no window, and the model's linear layers have one" in message


def test_the_second_step_keeps_the_feature_map() -> None:
    once = converted({"to": "linear", "keep": [0], "window": 0, "feature_map": "softmax"})
    assert {spec.feature_map for spec in once.mixers if spec} == {"softmax"}
    twice = ConvertAttention.model_validate({"to": "mamba2"}).shape(once)
    assert {(spec.type, spec.feature_map) for spec in twice.mixers if spec} == {("mamba2", "softmax")}


@pytest.mark.parametrize("config", [{"sliding_window": None}, {"sliding_window": 64, "use_sliding_window": False}])
def test_a_window_that_is_not_in_use_is_no_feature(config: Any) -> None:
    assert problems(shape_of({**CONFIG, "model_type": "qwen2", **config})) == []


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_fused_attention_is_refused_by_name(model_type: str) -> None:
    from compress.pipeline.matrix import sample_shape

    ((where, message),) = problems(sample_shape(model_type))
    assert where == "to"
    assert f"{model_type} keeps q, k and v in one fused matrix" in message


def test_encoders_take_linear_alone() -> None:
    from compress.pipeline.matrix import sample_shape

    bert = sample_shape("bert")
    assert problems(bert) == []
    assert [where for where, _ in problems(bert, feature_map="softmax")] == ["feature_map"]
    for to in ("mamba2", "gated-linear", "gated-delta", "sliding"):
        assert (problems(bert, to=to)[0][0], "encoders take to: linear" in problems(bert, to=to)[0][1]) == ("to", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Field required"),
        ({"to": "mamba"}, "mamba2"),
        ({"to": "linear", "keep": 3, "convert": 3}, "give either keep or convert"),
        ({"to": "linear", "keep": -1}, "number of layers from 0"),
        ({"to": "linear", "convert": 0}, "number of layers from 1"),
        ({"to": "linear", "convert": []}, "number of layers from 1"),
        ({"to": "mamba2", "window": 8}, "window is for sliding, linear and gated-linear, and mamba2 has none"),
        ({"to": "linear", "window": -1}, "greater than or equal to 0"),
        ({"to": "sliding", "window": 0}, "a window of 0 tokens shows a sliding layer nothing"),
        ({"to": "mamba2", "feature_map": "softmax"}, "feature_map is for linear and gated-linear, and mamba2 has none"),
        ({"to": "linear", "select": "explicit"}, "needs a list"),
        ({"to": "linear", "select": "explicit", "keep": 3}, "needs a list"),
        ({"to": "linear", "select": "kl", "convert": [3]}, "select has no say"),
        ({"to": "linear", "align": {"token": 3}}, "Extra inputs"),
        ({"to": "linear", "distill": {"mixer_learning_rate": 0}}, "greater than 0"),
    ],
)
def test_wrong_options_are_refused_in_one_message(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        ConvertAttention.model_validate(options)
    assert error.value.error_count() == 1
    ConvertAttention.model_validate({"to": "linear", "select": "explicit", "convert": [3]})


def test_its_cost_grows_with_what_it_does() -> None:
    model = shape_of(CONFIG)

    def cost(**options: Any) -> float:
        return ConvertAttention.model_validate({"to": "linear", "keep": 2, **options}).forward_tokens(model)

    assert cost(align=None, distill=None, select="uniform") == 0
    assert cost(select="uniform") < cost() < cost(select="kl")


def test_twins_run(pico: Callable[[str], Path], tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"keep": 6, "window": 0}, {"to": "sliding", "keep": 20, "window": 128}, {"to": "mamba2", "distill": None},
        {"align": None},
    ]  # fmt: skip
    model = pico("llama")
    for number, each in enumerate(options):
        twin = ConvertAttention.model_validate({"to": "linear", **each}).twin()
        asked = json.loads(twin.model_dump_json(exclude={"teacher"}))
        convert(tmp_path / str(number), model, pico("llama"), **asked)
        model = tmp_path / str(number) / "out"
        config = json.loads((model / "config.json").read_text())
    assert [mixer and mixer["type"] for mixer in config["mixers"]].count("mamba2") == 1


def test_the_stage_class_needs_no_torch() -> None:
    code = "import sys, compress.stages.convert.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
