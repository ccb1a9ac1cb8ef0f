"""What a `config.json` may say, and what transformers takes where it says nothing. Imports no torch.

Both are told once, for the keys that are read here: a test holds them against transformers' own config classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from compress.mixers.spec import FULL, LINEAR, SLIDING

HYBRID = "hybrid_"
"""What the `model_type` of a converted model starts with; the rest is that of the model that was converted."""
_QWEN = {
    "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "intermediate_size": 11008, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gpt_neox": {
        "intermediate_size": 24576, "max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    },
    "gpt2": {
        "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "bert": {
        "intermediate_size": 3072, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""What the classes have of each model type for a key that is left out, where that is neither null nor false."""
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
"""The rotary embeddings of these families' classes, with the keys that each can't do without."""
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
"""What transformers has activations for."""
_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_NEVER_NULL = {("mistral", "num_key_value_heads"), ("qwen2", "head_dim"), ("qwen3", "head_dim")}
"""Where a class takes no null for what others work out themselves."""
_MAY_BE_NULL = ("n_inner",)
"""Where one takes null for what in others is a number."""


class Rule(NamedTuple):
    """What a value must be, in words, and whether one is. null: whether null stands for what is left out."""

    words: str
    holds: Callable[[Any], bool]
    null: bool = False


def _is_whole(value: object, least: int = 1, most: int = _LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object) -> bool:
    """NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_list(value: object, kind: type, values: tuple[str, ...] = ()) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) and (each in values or not values) for each in value)


_COUNT = Rule("a whole number from 1", _is_whole)
_OWN_COUNT = _COUNT._replace(null=True)
FROM_ZERO = Rule("a whole number from 0", lambda value: _is_whole(value, 0))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
WORD = Rule("a word in quotes", lambda value: isinstance(value, str))
_FRACTION = Rule(
    "a number above 0 with a point in it", lambda value: _is_number(value) and isinstance(value, float) and value > 0
)
_ABOVE_ZERO = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_SHARE = Rule("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_LABELS = Rule(
    "a mapping of one number or more to labels",
    lambda value: isinstance(value, dict) and bool(value) and all(str(key).isdecimal() for key in value), null=True,
)  # fmt: skip
NUMBER = Rule("a number", _is_number, null=True)
MAPPING = Rule("a mapping", lambda value: isinstance(value, dict), null=True)
ID = Rule("a token's number", lambda value: _is_whole(value, -1), null=True)  # -1 stands for none
IDS = Rule(
    "a token's number or a list of them",
    lambda value: _is_whole(value, -1) or (isinstance(value, list) and all(_is_whole(each, -1) for each in value)),
    null=True,
)  # fmt: skip
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_LAYER_TYPES = (FULL, SLIDING, LINEAR)

RULES: Mapping[str, Rule] = {
    "num_hidden_layers": Rule(
        f"a whole number from 1 to {_MOST_LAYERS}", lambda value: _is_whole(value, most=_MOST_LAYERS)
    ),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"), _COUNT),
    "intermediate_size": _COUNT,
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "num_labels"), _OWN_COUNT),
    "max_window_layers": FROM_ZERO,
    "num_attention_sinks": FROM_ZERO._replace(null=True),
    **dict.fromkeys(
        ("tie_word_embeddings", "use_parallel_residual", "use_sliding_window", "is_decoder", "scale_attn_weights",
         "scale_attn_by_inverse_layer_idx"), FLAG,
    ),
    "alibi": FLAG._replace(null=True),
    "hidden_act": Rule("the name of an activation in transformers", lambda value: value in ACTIVATIONS),
    "position_embedding_type": WORD._replace(null=True),
    "norm_eps": _FRACTION,
    "rope_theta": _ABOVE_ZERO,
    "rotary_emb_base": _ABOVE_ZERO,
    **dict.fromkeys(("attn_logit_softcapping", "attention_logit_softcapping"), NUMBER),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _SHARE),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), MAPPING),
    "id2label": _LABELS,
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ID),
    "eos_token_id": IDS,
    "problem_type": Rule(f"one of {', '.join(_PROBLEMS)}", lambda value: value in _PROBLEMS, null=True),
    "architectures": Rule("a list of names in quotes", lambda value: _is_list(value, str), null=True),
    "layer_types": Rule(
        f"a list of {', '.join(_LAYER_TYPES)}", lambda value: _is_list(value, str, _LAYER_TYPES), null=True
    ),
}  # fmt: skip
"""By Hugging Face's common key."""
_ROPE_RULES: Mapping[str, Rule] = {
    "rope_type": WORD, "type": WORD, **{key: RULES[key] for key in ("rope_theta", "partial_rotary_factor")},
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _ABOVE_ZERO),
    **dict.fromkeys(("short_factor", "long_factor"), Rule(
        "a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))),
    "original_max_position_embeddings": _OWN_COUNT,
}  # fmt: skip


def with_defaults(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """`config` of a known model type with what transformers' class takes for keys of `DEFAULTS` that it leaves out."""
    defaults = dict(DEFAULTS[model_type.removeprefix(HYBRID)])
    if model_type.startswith(HYBRID):  # the file of a converted model says what slides
        defaults.pop("sliding_window", None)
    return {**defaults, **config}


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_type` and `partial_rotary_factor` of a valid `config.json`, with what else its rotary embeddings are.

    In this version's words, or in those of older ones.
    """
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    key, default = ("rotary_pct", 0.25) if config["model_type"].endswith("gpt_neox") else ("partial_rotary_factor", 1.0)
    kind = said.get("rope_type", said.get("type", "default"))
    return {"partial_rotary_factor": config.get(key, default), **said, "rope_type": kind}


def value_fault(config: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """What is wrong with the first value of a parsed `config.json` that no such model can have; "" where none is.

    keys: the family's word for a common key where it has another.
    """
    model_type = config["model_type"].removeprefix(HYBRID)
    for common, rule in RULES.items():
        key = keys.get(common, common)
        null = (rule.null or key in _MAY_BE_NULL) and (model_type, key) not in _NEVER_NULL
        if key in config and (fault := fault_of(key, config[key], rule, null=null)):
            return fault
    faults = (_rope_fault(key, config.get(key) or {}) for key in ("rope_scaling", "rope_parameters"))
    return next(filter(None, faults), "")


def _rope_fault(key: str, rope: Mapping[str, Any]) -> str:
    if nested := [name for name in rope if name in _LAYER_TYPES]:
        return f"{key} has a {nested[0]}, and all layers of this model turn alike"
    for name, rule in _ROPE_RULES.items():
        if name in rope and (fault := fault_of(f"{key}.{name}", rope[name], rule)):
            return fault
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        return f"{key}.rope_type is {kind!r}, not one of {', '.join(ROPE_TYPES)}"
    missing = [name for name in ROPE_TYPES[kind] if name not in rope]
    return f"{key} has no {missing[0]!r}, which {kind} needs" if missing else ""


def fault_of(key: str, value: object, rule: Rule, *, null: bool | None = None) -> str:
    """What is wrong with a value by its rule; "" where nothing is. null: whether it may be null, if not by the rule."""
    if rule.holds(value) if value is not None else (rule.null if null is None else null):
        return ""
    shown = repr(value)
    return f"{key} is {shown if len(shown) <= 60 else f'{shown[:57]}...'}, not {rule.words}"
