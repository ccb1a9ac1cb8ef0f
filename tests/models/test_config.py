"""What a `config.json` may hold: what transformers takes, told in a sentence where it is none of that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import InvalidInput
from compress.models.anatomy import FAMILIES, family_of, shape_of
from compress.models.config import ACTIVATIONS, DEFAULTS, ROPE_TYPES, RULES
from compress.pipeline.check import check_file
from pico import MODEL_TYPES

Pico = Callable[[str], Path]
NAN, HUGE = float("nan"), 10**12
BAD = (None, True, 0, -1, 1.5, 7, "8", "", [], ["x"], {}, {"x": 1}, NAN, float("inf"), HUGE, 10**400)
SOME = (None, True, 0, "8", [], {"x": 1}, NAN, HUGE)
CORE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def keys_of(config: Mapping[str, Any]) -> set[str]:
    """Every key of a `config.json` that is checked or read."""
    return {*map(family_of(config["model_type"]).key, RULES), "model_type", *config}


def loads(config: Mapping[str, Any]) -> bool:
    """Whether transformers makes a config of it."""
    try:
        CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(config)))
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
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
    assert set(ACTIVATIONS) == set(ACT2CLS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_left_out_is_what_transformers_class_has(model_type: str) -> None:
    own = {field.name: field.default for field in fields(CONFIG_MAPPING[model_type])}
    read = {family_of(model_type).key(common) for common in RULES.keys() - set(CORE)} & own.keys()
    read = {key for key in read if not key.endswith("_token_id")}
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
        if heads % expected["num_key_value_heads"]:  # 4 heads, and by default 8 or 32 groups
            with pytest.raises(InvalidInput, match="num_attention_heads 4 is no multiple of num_key_value_heads"):
                shape_of(left)
            continue
        found = shape_of(left)
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
        for value in SOME:
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


CHANGES: Mapping[str, tuple[str, dict[str, Any], str, str]] = {
    # model type, what is changed in config.json, the stage, and what check says of it
    "activation": ("llama", {"hidden_act": "mish"}, "export-onnx", "activation 'mish' has no ONNX operators here"),
    "no activation": ("bert", {"hidden_act": "gleu"}, "evaluate", "hidden_act is 'gleu', not the name of an"),
    "rotation": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "export-onnx",
        "rotary embeddings of type 'dynamic' depend on the text's length",
    ),
    "older words": (
        "qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "export-onnx",
        "rotary embeddings of type 'dynamic'",
    ),
    "no rotation": ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "evaluate", "rope_type is 'spiral', not"),
    "half a rotation": ("llama", {"rope_scaling": {"type": "linear"}}, "evaluate", "has no 'factor', which linear"),
    "a list": ("mistral", {"rope_parameters": [1]}, "evaluate", "rope_parameters is [1], not a mapping"),
    "one of each kind": (
        "qwen3", {"rope_parameters": {"full_attention": {}}}, "evaluate", "all layers of this model turn alike",
    ),
    "lanes": ("qwen3", {"head_dim": 24}, "export-onnx", "GroupQueryAttention can't rotate 24 of 24 lanes"),
    "lanes apart": (
        "qwen3", {"head_dim": 48, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "export-onnx", "can't rotate heads of this width where q and k stand apart",
    ),
    "odd lanes": ("llama", {"head_dim": 17}, "evaluate", "heads of 17 lanes can't be turned by halves"),
    "groups": ("llama", {"num_key_value_heads": 3}, "evaluate", "4 is no multiple of num_key_value_heads 3"),
    "heads": ("gpt2", {"n_head": 5}, "evaluate", "n_embd 64 is no multiple of 5 heads"),
    "layers": ("qwen2", {"layer_types": ["full_attention"]}, "evaluate", "layer_types has 1 entries for 4 layers"),
    "window": (
        "qwen3", {"layer_types": ["sliding_attention"] * 4}, "evaluate",
        "layer_types has sliding_attention, and there is no sliding_window",
    ),
    "scaled": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True}, "prune-layers: {keep: 3}", "would change their scale",
    ),
    "quantised": ("llama", {"quantization_config": 4}, "evaluate", "is quantised already (an unknown method)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_follows_from_the_config_alone_is_told_at_checking(name: str, pico: Pico, tmp_path: Path) -> None:
    model_type, changes, stage, words = CHANGES[name]
    folder = tmp_path / "model"
    shutil.copytree(pico(model_type), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")
    assert words in _checked(folder, stage)


FILES: Mapping[str, tuple[str, bytes, str]] = {
    # the file, what it holds, and what check says of it
    "a list": ("config.json", b"[]", "has no readable config.json"),
    "nothing": ("config.json", b"", "has no readable config.json"),
    "a mark before it": ("config.json", b'\xef\xbb\xbf{"model_type": "bert"}', "has no readable config.json"),
    "not UTF-8": ("config.json", b'{"model_type": "b\xe9rt"}', "has no readable config.json"),
    "a very long number": ("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "has no readable config.json"),
    "very deep": ("config.json", b"[" * 100_000, "has no readable config.json"),
    "no type": ("config.json", b'{"model_type": ["bert"]}', "has no model_type"),
    "cut tokenizer": ("tokenizer.json", b'{"version": "1.0", "model": {"ty', "has a tokenizer.json that can't be read"),
    "tokenizer of numbers": ("tokenizer.json", b'{"model": 4}', "has a tokenizer.json that can't be read"),
    "deep tokenizer": ("tokenizer.json", b'{"model":' + b"[" * 100_000, "has a tokenizer.json that can't be read"),
    "settings": ("tokenizer_config.json", b"[]", "has a tokenizer_config.json that is no mapping in JSON"),
    "token": ("tokenizer_config.json", b'{"eos_token": 4}', "tokenizer_config.json whose eos_token is 4, not a token"),
    "tokens": (
        "tokenizer_config.json", b'{"added_tokens_decoder": {"a": "b"}}', "whose added_tokens_decoder is {'a': 'b'}",
    ),
    "length": ("tokenizer_config.json", b'{"model_max_length": "long"}', "whose model_max_length is 'long'"),
    "template": ("tokenizer_config.json", b'{"chat_template": [1]}', "whose chat_template is [1], not a template"),
    "generation": ("generation_config.json", b'{"eos_token_id": "<s>"}', "whose eos_token_id is '<s>', not a token's"),
    "temperature": ("generation_config.json", b'{"temperature": "hot"}', "whose temperature is 'hot', not a number"),
    "cut generation": ("generation_config.json", b'{"eos', "has a generation_config.json that is no mapping in JSON"),
    "a token that is not there": (
        "generation_config.json", b'{"eos_token_id": [0, 512]}', "says eos_token_id 512 of a model of 512 embeddings",
    ),
    "a switch": (
        "1_Pooling/config.json", b'{"pooling_mode_mean_tokens": "false"}',
        "has a 1_Pooling/config.json whose pooling_mode_mean_tokens is 'false', not true or false",
    ),
    "a mode": ("1_Pooling/config.json", b'{"pooling_mode": {"a": 1}}', "which is not supported"),
    "pooling": ("1_Pooling/config.json", b"[", "has no readable 1_Pooling/config.json"),
    "modules": ("modules.json", b"7", "has a module None (modules.json), which is not supported"),
    "a module": ("modules.json", b'[{"type": "x.Pooling", "path": 5}]', "has a module at 5 (modules.json)"),
    "a module far": ("modules.json", b'[{"type": "x.Pooling", "path": "' + b"x" * 300 + b'"}]', "has no readable x"),
    "a module of NUL": ("modules.json", rb'[{"type": "x.Pooling", "path": "\u0000"}]', "has a module at"),
    "an index": ("model.safetensors.index.json", b"[1]", "without a weight_map from tensors to files"),
    "an empty index": ("model.safetensors.index.json", b'{"weight_map": {}}', "without a weight_map"),
    "numbers of files": ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "without a weight_map"),
    "a long name": (
        "model.safetensors.index.json", b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}', "one of its 1 weight files",
    ),
    "a name of NUL": (
        "model.safetensors.index.json", rb'{"weight_map": {"a": "\u0000"}}', "has weights outside of it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_says_nothing_sensible_is_named_at_checking(name: str, pico: Pico, tmp_path: Path) -> None:
    file, content, words = FILES[name]
    folder = tmp_path / "model"
    shutil.copytree(pico("bert"), folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', "utf-8")
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    found = _checked(folder, "evaluate")
    assert words in found
    assert "\n" not in found
    assert len(found) < 700


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "line"}, "a mixer whose type is 'line', not one of linear"),
        ({"type": "linear", "window": "8"}, "a mixer whose window is '8', not a whole number from 0"),
        ({"type": "linear", "gate": 1}, "a mixer whose gate is 1, not true or false"),
        ({"type": "linear", "feature_map": []}, "a mixer whose feature_map is [], not one of hedgehog"),
        ({"kind": "linear"}, "a mixer that can't be read"),
        (7, "a mixer that can't be read"),
    ],
)
def test_a_mixer_of_no_kind_is_refused(entry: object, words: str, pico: Pico) -> None:
    config = json.loads((pico("llama") / "config.json").read_text("utf-8"))
    hybrid = config | {"model_type": "hybrid_llama", "mixers": [entry, None, None, None]}
    with pytest.raises(InvalidInput, match=re.escape(words)):
        shape_of(hybrid)


def _checked(folder: Path, stage: str) -> str:
    """The one thing that is wrong with a pipeline of one stage."""
    file = folder.parent / "pipeline.yaml"
    file.write_text(f"name: x\nmodel: {folder}\nstages: [{stage}]\n", "utf-8")
    problem, *others = check_file(file).problems
    assert not others
    return str(problem)
