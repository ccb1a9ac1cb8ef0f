"""What is recorded of each stage: small uses of it that together go through its branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LLAMA: Mapping[str, str] = {"input": "llama", "teacher": "llama"}
OTHER: Mapping[str, str] = {"input": "llama", "teacher": "llama-other"}
_STEPS: dict[str, Any] = {
    "tokens": 3 * 4 * 16, "sequence_length": 16, "batch_size": 4, "learning_rate": 3e-3, "precision": "fp32",
}  # fmt: skip
_TRAINING: dict[str, Any] = {**_STEPS, "eval_tokens": 64, "eval_steps": 2}
_SCORING: dict[str, Any] = {"tokens": 256, "sequence_length": 32}
_ALIGN: dict[str, Any] = {**_STEPS, "batch_size": 2, "tokens": 3 * 2 * 16}
_CONVERT: dict[str, Any] = {"align": _ALIGN, "distill": None, "select_tokens": 64}
_QAT: dict[str, Any] = {
    **_TRAINING, "eval_tokens": 256, "calibration_tokens": 128, "scale_learning_rate": 0.2, "max_grad_norm": 1e-6,
}  # fmt: skip
"""Its gradients are so small that AdamW's steps are proportional to them, and not as long whatever their size: codes
that flip by a last bit do not turn a step round."""
_TIMED: dict[str, Any] = {"prompts": [8, 32], "new_tokens": 4, "repeats": 4}


@dataclass(frozen=True)
class Case:
    """One use of a stage. options: its YAML keys. models: the models that it is given, by role.

    figures: what earlier stages measured of what it is given, by role and subject.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=lambda: {"input": "llama"})
    figures: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


def _of(model: str, **options: Any) -> Case:
    return Case(options, {"input": model})


def _taught(models: Mapping[str, str], **options: Any) -> Case:
    return Case({**_TRAINING, **options}, models)


def _quality(**figures: float) -> dict[str, dict[str, float]]:
    result = figures | {f"{name}_se": 0.01 for name in figures}
    return {"result": result, "source": {"perplexity": 20.0, "perplexity_se": 0.1}}


CASES: Mapping[str, Mapping[str, Case]] = {
    "prune-layers": {
        "block-influence": _of("llama-deep", drop=2, **_SCORING),
        "angular": _of("llama-deep", keep=0.5, by="angular", **_SCORING),
        "leave-one-out": _of("llama-deep", drop=2, by="leave-one-out", **_SCORING),
        "uniform": _of("llama-deep", drop=2, by="uniform"),
        "random": _of("llama-deep", keep=2, by="random"),
        "listed-hybrid": _of("hybrid", drop=[0]),
        "encoder": _of("bert", drop=1, by="leave-one-out", **_SCORING),
    },
    "prune-groups": {
        "activation": _of("llama", keep={"intermediate": 48, "hidden": 48, "attention-heads": 2}, **_SCORING),
        "taylor": _of("llama-untied", keep={"intermediate": 48, "kv-groups": 1}, by="taylor", **_SCORING),
        "magnitude-encoder": _of("bert", keep={"hidden": 0.5, "attention-heads": 2}, by="magnitude"),
        "random": _of("gpt2", keep={"intermediate": 40}, by="random"),
        "mixers": _of("hybrid", keep={"ssm-channels": 8, "ssm-heads": 2}, **_SCORING),
        "global": _of("llama-deep", keep={"intermediate": 48}, allocate="global", multiple_of=8, **_SCORING),
        "budget": _of("llama-deep", cut=["intermediate", "hidden"], params=0.75, multiple_of=8, **_SCORING),
    },
    "reduce-vocab": {
        "keep": _of("llama", keep=400, tokens=4096),
        "coverage-untied": _of("llama-untied", coverage=0.9, tokens=4096),
        "encoder": _of("bert", keep=300, tokens=1024),
    },
    "convert-attention": {
        "linear": Case({"to": "linear", "convert": [1], "align": None, "distill": None}, LLAMA),
        "linear-chosen": Case({"to": "linear", "convert": 1, "window": 6, **_CONVERT}, LLAMA),
        "gated-linear": Case(
            {**_CONVERT, "to": "gated-linear", "feature_map": "softmax", "distill": _TRAINING}, OTHER
        ),
        "mamba2": Case({**_CONVERT, "to": "mamba2", "keep": 1, "select": "uniform", "distill": _TRAINING}, OTHER),
        "mamba2-from-linear": Case(
            {**_CONVERT, "to": "mamba2", "align": None}, {"input": "hybrid-linear", "teacher": "llama"}
        ),
        "gated-delta": Case({**_CONVERT, "to": "gated-delta", "init": "random"}, LLAMA),
        "sliding": Case({**_CONVERT, "to": "sliding", "convert": 1, "select": "random", "window": 6}, LLAMA),
        "encoder": Case({**_CONVERT, "to": "linear"}, {"input": "bert", "teacher": "bert"}),
    },
    "distill": {
        "kl": _taught(OTHER, loss={"kl": 1, "skew_kl": 0.5, "ce": 0.1}, temperature=2.0),
        "hidden": _taught(OTHER, loss={"kl": 0, "hidden": 1, "attention_map": 1, "attention_output": 1}),
        "generated": _taught(OTHER, data="generated", gradient_accumulation_steps=2, weight_decay=0.1),
        "fewer-tokens": _taught({"input": "llama-fewer-tokens", "teacher": "llama-other"}, loss={"kl": 1, "ce": 0.1}),
        "encoder": _taught({"input": "bert", "teacher": "bert-other"}, hidden_distance="mse", learning_rate=1e-3),
    },
    "quantize": {
        "gptq": _of("llama", **_SCORING),
        "act-order": _of("llama-untied", symmetric=False, act_order=True, embeddings="w8-block16", **_SCORING),
        "awq": _of("llama", scheme="w4-block64", method="search", scaling="awq", **_SCORING),
        "ternary": _of("gpt2", scheme="ternary", method="rtn"),
        "w8a8-dynamic": _of("llama", scheme="w8a8-dynamic", reduce_range=True, **_SCORING),
        "w8a8-static": _of(
            "llama-untied", scheme="w8a8-static", scaling="smoothquant", ranges="percentile", reduce_range=False,
            exceptions={"layers.0.*": "float32", "down_proj": "w8-block32"}, **_SCORING,
        ),
        "w8a8-entropy": _of(
            "bert", scheme="w8a8-static", method="rtn", ranges="entropy", reduce_range=True,
            exceptions={"layer.0.*": "float32"}, **_SCORING,
        ),
        "hybrid": _of("hybrid", scheme="w2-block32", **_SCORING),
    },
    "qat": {
        "lsq": _taught(OTHER, **_QAT),
        "warm-start": _taught(
            OTHER, **{**_QAT, "scale_learning_rate": 0.02}, symmetric=False, method="rtn", warm_start=["w8-block32"]
        ),
        "scales": _taught(LLAMA, **_QAT, learn="scales", method="search", scheme="ternary"),
        "w8a8-static": _taught(
            {"input": "bert", "teacher": "bert-other"}, **_QAT, scheme="w8a8-static",
            reduce_range=True, method="rtn",
        ),
    },
    "choose-format": {
        "both": Case(
            {**_TIMED, "schemes": ["fp32", "w8-block32", "w4-block32"]},
            {"input": "llama", "fp32": "llama-onnx", "w8-block32": "llama-onnx", "w4-block32": "llama-w4-onnx"},
            {
                "fp32 quality": _quality(perplexity=20.0, perplexity_ratio=1.0, kl=0.0, top1_agreement=1.0),
                "w8-block32 quality": _quality(perplexity=20.1, perplexity_ratio=1.005, kl=0.01, top1_agreement=0.99),
                "w4-block32 quality": _quality(perplexity=22.0, perplexity_ratio=1.1, kl=0.1, top1_agreement=0.9),
            },
        ),
    },
    "export-onnx": {
        "fp32": _of("llama", parity_tolerance=1),
        "fp32-unfused": _of("llama-untied", fused=False, parity_tolerance=1),
        "int4": _of("llama-w4"),
        "int4-unfused": _of("llama-w4", fused=False),
        "int8": _of("llama-w8a8"),
        "int8-cache": _of("llama", kv_cache="int8"),
        "hybrid": _of("hybrid"),
        "hybrid-int4-unfused": _of("hybrid-w4", fused=False),
        "gpt2": _of("gpt2"),
        "encoder": _of("bert"),
        "encoder-int8-unfused": _of("bert-w8a8", fused=False),
    },
    "evaluate": {
        "torch": Case({"tokens": 256, "sequence_length": 32}, {"input": "llama-w4", "source": "llama"}),
        "onnx-recall": Case(
            {"tokens": 64, "sequence_length": 32, "recall": {"contexts": [128], "samples": 2, "mqar_pairs": 4}},
            {"input": "llama-onnx", "source": "llama-other"},
        ),
        "encoder": Case({"tokens": 64, "sequence_length": 32}, {"input": "bert-w8a8", "source": "bert"}),
    },
    "latency": {
        "decoder": Case(
            {**_TIMED, "batch_sizes": [1, 2]},
            {"input": "llama-onnx", "source": "llama-onnx", "source-int4": "llama-w4-onnx"},
        ),
    },
}  # fmt: skip
"""By the stage's name and the case's own."""
