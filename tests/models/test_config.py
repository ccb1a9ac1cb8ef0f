"""What a `config.json` may hold: what transformers takes, told in a sentence where it is none of that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import InvalidInput
from compress.models.anatomy import FAMILIES, family_of, shape_of
from compress.models.config import DEFAULTS, ROPE_TYPES, RULES
from compress.pipeline.check import check_file
from pico import MODEL_TYPES

Pico = Callable[[str], Path]
NAN, HUGE = float("nan"), 10**12
BAD = (None, True, 0, -1, 1.5, 7, "8", "", [], ["x"], {}, {"x": 1}, NAN, float("inf"), HUGE, 10**400)
CORE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def keys_of(config: Mapping[str, Any]) -> set[str]:
    """Every key of a `config.json` that is checked or read."""
    return {*map(family_of(config["model_type"]).key, RULES), "model_type", *config}


def loads(config: Mapping[str, Any]) -> bool:
    """Whether transformers makes a config of it."""
    try:
        CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(config)))
    except Exception:  # whatever kind: only whether
        return False
    return True


@pytest.fixture
def config(model_type: str, pico: Pico) -> dict[str, Any]:
    """A pico model's whole `config.json`."""
    parsed: dict[str, Any] = json.loads((pico(model_type) / "config.json").read_text("utf-8"))
    return parsed


def test_every_model_type_has_its_defaults() -> None:
    assert set(DEFAULTS) == {model_type for family in FAMILIES for model_type in family.model_types}
    assert set(ROPE_TYPES) - {"default"} <= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_left_out_is_what_transformers_class_has(model_type: str) -> None:
    own = {field.name: field.default for field in fields(CONFIG_MAPPING[model_type])}
    read = {family_of(model_type).key(common) for common in RULES.keys() - set(CORE)} & own.keys()
    true = {"scale_attn_weights", "use_parallel_residual"}  # read as such where they are not there
    said = {key: own[key] for key in read - true if own[key] or key in DEFAULTS[model_type]}
    assert said == DEFAULTS[model_type]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_shape_is_the_configs_whatever_key_is_left_out(model_type: str, config: dict[str, Any]) -> None:
    family = family_of(model_type)
    config |= {"use_sliding_window": False, "max_window_layers": 2} if model_type.startswith("qwen") else {}
    for key in config.keys() - {"model_type"}:
        left = {name: value for name, value in config.items() if name != key}
        if key in map(family.key, CORE):
            with pytest.raises(InvalidInput, match=f"no whole number {key!r}; is it complete"):
                shape_of(left)
            continue
        whole = CONFIG_MAPPING[model_type](**left)
        heads = config[family.key("num_attention_heads")]
        expected = {
            "hidden_size": whole.hidden_size, "num_hidden_layers": whole.num_hidden_layers,
            "num_key_value_heads": getattr(whole, "num_key_value_heads", heads),
            "head_dim": getattr(whole, "head_dim", whole.hidden_size // heads),
            "max_position_embeddings": whole.max_position_embeddings, "num_labels": whole.num_labels,
            "tie_word_embeddings": whole.tie_word_embeddings,
            "layer_types": tuple(getattr(whole, "layer_types", None) or ()),
        }  # fmt: skip
        try:
            found = shape_of(left)
        except InvalidInput as error:
            assert key == "num_key_value_heads", error  # 4 heads, and by default 8 or 32 groups
            assert "num_attention_heads 4 is no multiple of num_key_value_heads" in str(error)
            assert whole.num_attention_heads % whole.num_key_value_heads
            continue
        assert {name: getattr(found, name) for name in expected} == expected, key
        said = shape_of(whole.to_dict())
        assert replace(found, head=said.head) == said, key


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_value_of_a_wrong_kind_is_one_sentence_at_checking(
    model_type: str, config: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico(model_type), tmp_path / "model"))
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"name: x\nmodel: {folder}\nstages: [export-onnx]\n", "utf-8")
    refused = set()
    for key in sorted(keys_of(config)):
        for value in BAD:
            (folder / "config.json").write_text(json.dumps({**config, key: value}), "utf-8")
            found = check_file(file).problems
            assert len(found) <= 1, (key, value, found)
            for problem in found:
                refused.add(key)
                assert "pipeline.yaml:2 model" in str(problem) or "export-onnx" in str(problem), (key, value)
                assert len(str(problem)) < 300 + len(str(folder)), str(problem)
                assert "\n" not in str(problem)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert not check_file(file).problems
    assert refused >= {"model_type", "architectures", *map(family_of(model_type).key, (*CORE, "hidden_act"))}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_transformers_does_not_take_is_refused_and_little_else(model_type: str, config: dict[str, Any]) -> None:
    own = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    keys = set(map(family_of(model_type).key, RULES)) & own
    for key in sorted(keys):
        for value in BAD:
            changed = {**config, key: value}
            try:
                shape_of(changed)
            except InvalidInput:
                continue
            assert loads(changed), (key, value)
