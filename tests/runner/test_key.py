"""What a key means: options that change what is computed change it, whatever means the same does not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import fakes
import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save_file

from compress import hardware
from compress.hardware import Machine
from compress.models.anatomy import shape_of
from compress.pipeline.file import Entry, load_pipeline
from compress.pipeline.graph import build_graph
from compress.pipeline.wording import validate
from compress.registry import stage_class, stage_names
from compress.runner.plan import Plan, Step, make_plan
from compress.runner.prepare import prepare
from compress.stage import SOURCE, Reporter, Target

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 256,
    "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
NOWHERE = Path("no/run")
BERT = {**LLAMA, "model_type": "bert", "architectures": ["BertModel"]}
OUT = object()
"""An option that is left out."""
Stages = list[str | dict[str, dict[str, Any]]]


def planned(stages: Stages, config: Mapping[str, Any] = LLAMA, seed: int = 0, threads: int = 2, text: str = "") -> Plan:
    """The plan of these stages, each called by its name or `id`."""
    entries = []
    for item in stages:
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        own = dict(options)
        id = own.pop("id", name)
        stage, faults = validate(stage_class(name), own)
        assert stage is not None, (item, faults)
        entries.append(Entry(id, stage, f"stages[{len(entries)}]"))
    graph, problems = build_graph(entries, shape_of(config))
    assert problems == [], [str(problem) for problem in problems]
    data: Any = SimpleNamespace(digest=lambda split: f"{split} {text}")
    sources = {id: hashlib.sha256(id.encode()).hexdigest() for id in (SOURCE, *graph.models)}
    return make_plan(graph, sources=sources, data=data, seed=seed, target=Target(threads=threads), run_dir=NOWHERE)


def last(stages: Stages, config: Mapping[str, Any] = LLAMA, **changes: Any) -> Step:
    return planned(stages, config, **changes).steps[-1]


STEPS: dict[str, list[Any]] = {
    "data": ["text", "generated"], "tokens": [50_000, 200_000], "sequence_length": [128, 512], "batch_size": [2, 8],
    "learning_rate": [1e-4, 1e-3], "warmup_ratio": [0, 0.1, 0.2],
    "lr_scheduler_type": ["cosine", "linear", "constant_with_warmup"], "weight_decay": [0, 0.1],
    "max_grad_norm": [1.0, 2.0], "optim": ["adamw", "adamw_8bit"], "precision": ["fp32", "bf16"],
}  # fmt: skip
LOSSES = {
    "kl": [1.0, 2.0],
    **{name: [0, 1.0, 2.0] for name in ("ce", "hidden", "skew_kl", "attention_map", "attention_output")},
}
TRAINING: dict[str, list[Any]] = {
    **STEPS, **{f"loss.{name}": values for name, values in LOSSES.items()}, "temperature": [1.0, 2.0],
    "hidden_distance": ["cosine", "mse"], "gradient_accumulation_steps": [1, 2],
    "gradient_checkpointing": [False, True], "eval_tokens": [2048, 4096], "eval_steps": [OUT, 3, 7],
    "early_stopping_patience": [OUT, 1, 2],
}  # fmt: skip
TAUGHT: dict[str, list[Any]] = {
    **TRAINING, "teacher": [SOURCE, "prune-layers"], "teacher_model": [OUT, "org/a", "org/b"],
    "teacher_bits": [OUT, 4, 8],
}  # fmt: skip
QUANTISING: dict[str, list[Any]] = {
    "scheme": ["w4-block32", "w8-block32", "ternary", "w8a8-dynamic", "w8a8-static"], "symmetric": [True, False],
    "method": ["rtn", "search", "gptq"], "act_order": [False, True], "scaling": ["none", "awq"],
    "smoothing": [0, 0.5, 1.0], "exceptions": ["auto", {"down_proj": "w8-block32"}, {"down_proj": "float32"}, {}],
    "embeddings": ["float32", "w8-block32", "w4-block64"], "head": ["float32", "w8-block32", "w4-block64"],
    "reduce_range": [False, True], "ranges": ["minmax", "percentile", "entropy"],
}  # fmt: skip
PRUNED = {"prune-layers": {"keep": 7}}
DIFFERENT: dict[str, dict[str, list[Any]]] = {
    "prune-layers": {
        "keep": [2, 3, [0, 1], [0, 2]], "drop": [2, 3, [0, 1], [0, 2]], "tokens": [OUT, 4096, 8192],
        "by": ["block-influence", "angular", "leave-one-out", "uniform", "random"], "sequence_length": [128, 256],
    },
    "prune-groups": {
        "keep": [{"hidden": 128}, {"hidden": 192}, {"intermediate": 128}, {"hidden": 128, "intermediate": 128}],
        "cut": [("hidden",), ("intermediate",), ("hidden", "intermediate")], "params": [0.6, 0.75, 3_000_000],
        "size_mb": [12.0, 16.0], "by": ["activation", "taylor", "magnitude", "random"],
        "allocate": ["uniform", "global"], "multiple_of": [16, 32], "tokens": [4096, 8192],
        "sequence_length": [128, 256],
    },
    "convert-attention": {
        "to": ["linear", "gated-linear", "mamba2", "gated-delta", "sliding"], "keep": [OUT, 2, 3, [0], [1, 2]],
        "convert": [OUT, 2, 3, [0], [1, 2]], "select": ["kl-proxy", "kl", "uniform", "random"],
        "window": [0, 1, 32, 64], "feature_map": ["hedgehog", "softmax"], "init": ["attention", "random"],
        "teacher": [SOURCE, "prune-layers"], "select_tokens": [2048, 4096], "kl_tokens": [8192, 16_384],
        "align": [None, {}], "distill": [None, {}],
        **{f"align.{name}": values for name, values in STEPS.items()},
        **{f"distill.{name}": values for name, values in TRAINING.items()}, "distill.mixer_learning_rate": [1e-3, 2e-3],
    },
    "reduce-vocab": {"keep": [300, 400], "coverage": [0.9, 0.99, 1.0], "tokens": [4096, 8192]},
    "distill": TAUGHT,
    "quantize": {**QUANTISING, "tokens": [4096, 8192], "sequence_length": [128, 256]},
    "qat": {
        **TAUGHT, **QUANTISING, "learn": ["weights", "scales", "both"], "scale_learning_rate": [1e-3, 2e-3],
        "warm_start": [[], ["w8-block32"], ["w8-block64"]], "accuracy_level": [0, 4],
        "calibration_tokens": [4096, 8192],
    },
    "choose-format": {
        "quantize": [{}, {"method": "rtn"}], "export": [{}, {"fused": False}], "max_size_mb": [OUT, 10.0, 20.0],
        "schemes": [["fp32", "w4-block32"], ["w4-block32", "fp32"], ["w4-block32"],
                    ["fp32", {"w4-block32": {"method": "rtn"}}]],
        "budget": [OUT, {}, {"perplexity": 1.1}, {"kl": 0.1}, {"top1_agreement": 0.9}],
        "against": [SOURCE, "prune-layers"], "tokens": [4096, 8192], "sequence_length": [128, 256],
        "prefer": ["both", "prefill", "decode", {"prefill": 1, "decode": 7}], "prompts": [[64], [128], [64, 128]],
        "new_tokens": [16, 32], "repeats": [5, 10], "max_seconds": [60, 300],
    },
    "export-onnx": {
        "format": ["fp32", "int8", "int4"], "fused": [False, True], "kv_cache": ["float32", "int8"],
        "parity_tolerance": [1e-3, 1e-2], "chunk_size": [None, 128, 256], "prompt": [None, "int8"],
        "prompt_exceptions": ["auto", (), ("down_proj",)], "max_length": [None, 64, 128], "logits": ["last", "all"],
    },
    "evaluate": {
        "tokens": [4096, 8192], "sequence_length": [128, 256], "against": [SOURCE, "prune-layers"], "recall": [OUT, {}],
        "recall.contexts": [[256], [512], [256, 512]], "recall.mqar_pairs": [4, 8],
        "recall.needle_depths": [[0], [0.5], [0, 0.5]], "recall.samples": [4, 8],
    },
    "latency": {
        "chunk_sizes": [[], [32], [32, 48]], "prompts": [[64], [128]],
        "batch_sizes": [[1], [2], [1, 2]], "new_tokens": [16, 32], "repeats": [5, 10],
        "max_seconds": [60, 300], "baselines": [[], ["source"], ["source-int4"], ["source", "source-int4"]],
    },
}  # fmt: skip
"""By stage and option: values of which any two make another artifact."""
BASE: dict[str, dict[str, Any]] = {
    "prune-groups": {"keep": {"intermediate": 0.5}}, "reduce-vocab": {"keep": 400},
    "prune-layers": {"keep": 4}, "convert-attention": {"to": "gated-linear", "convert": 4},
    "choose-format": {"schemes": ["fp32", "w4-block32"], "prompts": [64]}, "latency": {"prompts": [64]},
}  # fmt: skip
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("prune-groups", "cut"): {"keep": OUT, "params": 0.6}, ("prune-groups", "params"): {"keep": OUT, "cut": ["hidden"]},
    ("prune-groups", "size_mb"): {"keep": OUT, "cut": ["hidden"]},
    ("prune-groups", "multiple_of"): {"allocate": "global"}, ("reduce-vocab", "coverage"): {"keep": OUT},
    ("prune-layers", "drop"): {"keep": OUT}, ("convert-attention", "keep"): {"convert": OUT},
    ("convert-attention", "kl_tokens"): {"select": "kl"},
    ("quantize", "smoothing"): {"scheme": "w8a8-dynamic", "scaling": "smoothquant"},
    ("quantize", "exceptions"): {"scheme": "w8a8-dynamic"}, ("quantize", "reduce_range"): {"scheme": "w8a8-dynamic"},
    ("quantize", "ranges"): {"scheme": "w8a8-static"}, ("export-onnx", "prompt_exceptions"): {"prompt": "int8"},
}
"""What else has to be said for an option to have a say."""
AFTER: dict[str, Stages] = {"latency": ["export-onnx"], "export-onnx.prompt": [{"quantize": {"method": "rtn"}}]}


def with_option(stage: str, option: str, value: Any) -> Stages:
    """A pipeline whose last stage has this option, `group.option` within a group."""
    options = dict(BASE.get(stage, {}))
    options |= NEEDED.get((stage, option), NEEDED.get(("quantize", option), {}) if stage == "qat" else {})
    if option.endswith("hidden_distance"):
        loss = {"loss": {"hidden": 1.0}}
        options |= loss if option == "hidden_distance" else {"distill": loss}
    *groups, name = option.split(".")
    inner = options
    for group in groups:
        inner[group] = inner = dict(inner.get(group, {}))
    inner[name] = value
    options = {key: each for key, each in options.items() if each is not OUT}
    if inner.get(name) is OUT:
        del inner[name]
    before = next((AFTER[name] for name in AFTER if f"{stage}.{option}".startswith(name)), [])
    return [PRUNED, *before, {stage: options}]


def options_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The names of all options, dotted within groups that have no name of their own to be on or off by."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        groups = [kind for kind in kinds if issubclass(kind, BaseModel) and kind.__name__ not in ("Budget", "Weights")]
        if not groups or type(None) in get_args(field.annotation):
            yield f"{above}{name}"
        for group in groups:
            yield from options_of(group, f"{above}{name}.")


CASES = [(stage, option) for stage, options in DIFFERENT.items() for option in options]


def test_every_option_of_every_stage_is_among_the_cases() -> None:
    assert {stage: set(options) for stage, options in DIFFERENT.items()} == {
        name: set(options_of(stage_class(name))) for name in stage_names()
    }


@pytest.mark.parametrize(("stage", "option"), CASES, ids=[f"{stage}.{option}" for stage, option in CASES])
def test_what_changes_the_result_changes_the_key(stage: str, option: str) -> None:
    steps = [last(with_option(stage, option, value)) for value in DIFFERENT[stage][option]]
    for one, other in combinations(steps, 2):
        assert one.key != other.key, (one.ingredients, other.ingredients)


SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prune-layers", {"keep": 4}, {"keep": 4, "tokens": 16_384}),
    ("prune-layers", {"keep": 4, "by": "leave-one-out"}, {"keep": 4, "by": "leave-one-out", "tokens": 2048}),
    ("prune-layers", {"keep": 6}, {"drop": 2}),
    ("prune-layers", {"keep": 6}, {"keep": 0.75}),
    ("prune-layers", {"keep": [0, 2, 1, 3]}, {"drop": [7, 6, 5, 4]}),
    ("prune-layers", {"keep": [0]}, {"keep": [0], "tokens": 999, "sequence_length": 64}),
    ("prune-layers", {"keep": 4, "by": "random"}, {"keep": 4, "by": "random", "tokens": 999, "sequence_length": 64}),
    ("prune-groups", {"keep": {"intermediate": 384}}, {"keep": {"intermediate": 0.75}}),
    ("prune-groups", {"keep": {"hidden": 128, "intermediate": 0.5}}, {"keep": {"intermediate": 256, "hidden": 0.5}}),
    ("prune-groups", {"keep": {"hidden": 128}, "by": "magnitude"},
     {"keep": {"hidden": 128}, "by": "magnitude", "tokens": 999, "multiple_of": 8}),
    ("prune-groups", {"cut": ["hidden", "intermediate"], "params": 0.6},
     {"cut": ["intermediate", "hidden"], "params": 0.6}),
    ("reduce-vocab", {"keep": 400}, {"keep": 400, "tokens": 2_000_000}),
    ("convert-attention", {"to": "linear"}, {"to": "linear", "window": 64}),
    ("convert-attention", {"to": "linear"}, {"to": "linear", "keep": 0}),
    ("convert-attention", {"to": "linear"}, {"to": "linear", "feature_map": "hedgehog"}),
    ("convert-attention", {"to": "sliding"}, {"to": "sliding", "window": 128}),
    ("convert-attention", {"to": "mamba2", "keep": 2}, {"to": "mamba2", "keep": 0.25}),
    ("convert-attention", {"to": "mamba2", "convert": 8}, {"to": "mamba2", "convert": 8, "select": "uniform"}),
    ("convert-attention", {"to": "mamba2", "convert": [2, 1]},
     {"to": "mamba2", "convert": [1, 2], "select": "explicit", "select_tokens": 999, "kl_tokens": 9}),
    ("convert-attention", {"to": "mamba2"}, {"to": "mamba2", "distill": {"eval_steps": 25, "loss": {"kl": 1.0}}}),
    ("convert-attention", {"to": "linear", "align": {"sequence_length": 64}, "distill": None},
     {"to": "linear", "align": {"sequence_length": 64}, "distill": None, "window": 32}),
    ("distill", {}, {"eval_steps": 25}),
    ("distill", {}, {"loss": {}}),
    ("distill", {}, {"loss": {"kl": 1.0, "ce": 0}, "hidden_distance": "mse"}),
    ("distill", {"loss": {"kl": 0, "ce": 1.0}}, {"loss": {"kl": 0, "ce": 1.0}, "temperature": 3.0, "teacher_bits": 8}),
    ("quantize", {}, {"embeddings": "w4-block32", "head": "w4-block32"}),
    ("quantize", {}, {"exceptions": {}}),
    ("quantize", {}, {"method": "gptq", "tokens": 8192}),
    ("quantize", {"scheme": "w2-block32", "symmetric": False},
     {"scheme": "w2-block32", "symmetric": False, "embeddings": "w4-block32"}),
    ("quantize", {"scheme": "w8a8-dynamic"}, {"scheme": "w8a8-dynamic", "reduce_range": not hardware.this_machine()
     .flags or {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(hardware.this_machine().flags)}),
    ("qat", {}, {"eval_steps": 25, "embeddings": "w4-block32"}),
    ("qat", {"learn": "weights", "method": "rtn"}, {"learn": "weights", "method": "rtn"}),
    ("choose-format", {"prompts": [64]}, {"prompts": [64], "budget": {"perplexity": 1.05}}),
    ("choose-format", {"prompts": [64]}, {"prompts": [64], "prefer": {"prefill": 1, "decode": 32}}),
    ("choose-format", {"prompts": [64]}, {"prompts": [64], "quantize": {"method": "gptq"}, "export": {"fused": True}}),
    ("export-onnx", {}, {"format": "fp32"}),
    ("export-onnx", {}, {"chunk_size": 256, "max_length": 2048}),
    ("export-onnx", {"fused": False}, {"fused": False, "chunk_size": 64}),
    ("evaluate", {}, {"tokens": 8192}),
    ("evaluate", {"recall": {}}, {"recall": {"samples": 8, "contexts": [256, 1024]}}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "one", "other"), SAME, ids=[f"{s}-{i}" for i, (s, _, _) in enumerate(SAME)])
def test_what_means_the_same_has_the_same_key(stage: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (last([{stage: options}]) for options in (one, other))
    assert first.ingredients == second.ingredients
    assert first.key == second.key


def test_a_model_without_a_head_is_taught_by_its_layers() -> None:
    default, explicit, other = (
        last([{"distill": {"sequence_length": 128, **loss}}], BERT)
        for loss in ({}, {"loss": {"kl": 0, "hidden": 1}}, {"loss": {"kl": 0, "hidden": 2}})
    )
    assert default.key == explicit.key != other.key


@pytest.mark.parametrize("stage", ["distill", "qat"])
def test_a_teacher_is_known_by_its_content(stage: str, tmp_path: Path) -> None:
    teacher = fakes.make_model(tmp_path / "teacher")
    options = {"teacher_model": str(teacher), "sequence_length": 32}
    stages = [{"evaluate": {"sequence_length": 32}}, {stage: options}]
    file = fakes.make_pipeline(tmp_path, fakes.make_model(tmp_path / "model"), stages=stages)

    def keys() -> dict[str, str]:
        steps = prepare(load_pipeline(file), tmp_path / "run", Reporter()).plan.steps
        return {step.id: step.key for step in steps}

    before = keys()
    save_file({"a.weight": np.zeros((8, 8), np.float32)}, teacher / "model.safetensors")
    after = keys()
    assert before["evaluate"] == after["evaluate"]
    assert before[stage] != after[stage]
    (teacher / "README.md").write_text("a card")
    assert keys() == after


def test_what_a_stage_is_called_teaches_nothing() -> None:
    one, other = (
        last([{"prune-layers": {"keep": 7, "id": id}}, {"distill": {"teacher": id}}]) for id in ("small", "smaller")
    )
    assert one.key == other.key


def test_a_window_is_no_more_than_half_a_text() -> None:
    half = {"to": "linear", "distill": None, "align": {"sequence_length": 64}}
    assert last([{"convert-attention": half}]).ingredients["options"]["window"] == 32


def test_what_is_off_is_left_out_and_what_is_on_counts() -> None:
    options = last([{"quantize": {}}]).ingredients["options"]
    assert options == {
        "scheme": "w4-block32", "symmetric": True, "method": "gptq", "scaling": "none", "embeddings": "w4-block32",
        "head": "w4-block32", "tokens": 8192, "sequence_length": 256,
    }  # fmt: skip


NO_TRAINING = {"align": None, "distill": None}


@pytest.mark.parametrize(
    ("stage", "counts"),
    [
        ({"prune-layers": {"keep": 4}}, False), ({"prune-layers": {"keep": [0]}}, False),
        ({"prune-layers": {"keep": 4, "by": "uniform"}}, False), ({"prune-layers": {"keep": 4, "by": "random"}}, True),
        ({"prune-groups": {"keep": {"hidden": 128}}}, False),
        ({"prune-groups": {"keep": {"hidden": 128}, "by": "random"}}, True),
        ({"distill": {}}, True), ({"qat": {}}, True), ({"quantize": {}}, False), ("export-onnx", False),
        ("evaluate", False), ({"convert-attention": {"to": "linear"}}, True),
        ({"convert-attention": {"to": "linear", **NO_TRAINING}}, False),
        ({"convert-attention": {"to": "linear", **NO_TRAINING, "init": "random"}}, True),
        ({"convert-attention": {"to": "linear", **NO_TRAINING, "keep": 2}}, False),
        ({"convert-attention": {"to": "linear", **NO_TRAINING, "keep": 2, "select": "random"}}, True),
        ({"convert-attention": {"to": "linear", **NO_TRAINING, "keep": 2, "select": "kl"}}, True),
    ],
)  # fmt: skip
def test_a_seed_counts_where_it_is_used(stage: Any, counts: bool) -> None:
    assert (last([stage]).key != last([stage], seed=1).key) is counts


@pytest.mark.parametrize(
    ("stage", "counts"),
    [
        ({"prune-layers": {"keep": 4}}, True), ({"prune-layers": {"keep": [0]}}, False),
        ({"prune-layers": {"drop": 4, "by": "uniform"}}, False), ({"prune-layers": {"keep": 4, "by": "random"}}, False),
        ({"prune-groups": {"keep": {"hidden": 128}}}, True),
        ({"prune-groups": {"keep": {"hidden": 128}, "by": "magnitude"}}, False),
        ({"distill": {}}, True), ({"quantize": {}}, True), ({"quantize": {"method": "rtn"}}, False),
        ({"export-onnx": {}}, False), ({"export-onnx": {"kv_cache": "int8"}}, True), ("evaluate", True),
        ({"export-onnx": {"chunk_size": None}}, False),
        ({"convert-attention": {"to": "linear", **NO_TRAINING}}, False),
        ({"convert-attention": {"to": "linear", **NO_TRAINING, "keep": 2}}, True),
    ],
)  # fmt: skip
def test_text_counts_where_it_is_read(stage: Any, counts: bool) -> None:
    assert (last([stage]).key != last([stage], text="another").key) is counts


TORCH = {"torch", "transformers"}
ONNX = {"onnx", "onnxruntime", "optimum", "python"}
TRAINS = {*TORCH, "accelerate", "numpy"}


@pytest.mark.parametrize(
    ("stages", "libraries"),
    [
        ([PRUNED], TORCH), ([{"quantize": {}}], TORCH),
        ([{"quantize": {"scheme": "bnb-nf4"}}], {*TORCH, "bitsandbytes"}),
        ([{"distill": {}}], TRAINS), ([{"qat": {}}], TRAINS), ([{"convert-attention": {"to": "linear"}}], TRAINS),
        ([{"convert-attention": {"to": "linear", **NO_TRAINING}}], TORCH),
        ([{"distill": {"optim": "adamw_8bit"}}], {*TRAINS, "bitsandbytes"}),
        ([{"qat": {"teacher_bits": 8}}], {*TRAINS, "bitsandbytes"}), ([{"export-onnx": {}}], TORCH | ONNX),
        (["evaluate"], TORCH), (["export-onnx", "evaluate"], {*TORCH, "onnxruntime"}),
        (["export-onnx", {"evaluate": {"against": "export-onnx"}}], {"transformers", "onnxruntime"}),
        (["export-onnx", "latency"], {"onnxruntime"}), (["choose-format"], {"onnxruntime"}),
    ],
)  # fmt: skip
def test_the_libraries_that_compute_it_count_by_their_minor_versions(
    stages: Stages, libraries: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "version", lambda package: "5.23.0")
    monkeypatch.setattr("platform.python_version", lambda: "5.23.0")
    before = last(stages)
    assert before.ingredients["libraries"] == dict.fromkeys(libraries, "5.23")
    monkeypatch.setattr(hardware, "version", lambda package: "5.23.1+cpu")
    assert last(stages).key == before.key
    for library in libraries - {"python"}:
        monkeypatch.setattr(hardware, "version", lambda package, new=library: "5.24" if package == new else "5.23.0")
        assert last(stages).key != before.key


@pytest.mark.parametrize(
    ("installed", "minor"),
    [("5.23.0", "5.23"), ("2.13.0+cu128", "2.13"), ("1.30", "1.30"), ("1.30.post1", "1.30"),
     ("2.14.0.dev20261101",) * 2, ("5.24.0rc1",) * 2],
)  # fmt: skip
def test_a_minor_version(installed: str, minor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "version", lambda package: installed)
    assert hardware.minor_version("torch") == minor


def on_machine(monkeypatch: pytest.MonkeyPatch, *flags: str, cpu: str = "a CPU") -> None:
    machine = Machine(cpu, flags, 2, 8.0, "Linux x86_64")
    for module in ("hardware", "runner.key", "quant.options"):
        monkeypatch.setattr(f"compress.{module}.this_machine", lambda: machine)


@pytest.mark.parametrize(
    ("stages", "counts"),
    [
        ([{"export-onnx": {"format": "fp32"}}], False), ([{"export-onnx": {"format": "fp32"}}, "evaluate"], False),
        ([{"export-onnx": {"format": "int4"}}], True), ([{"export-onnx": {"format": "int4"}}, "evaluate"], True),
        ([{"export-onnx": {"kv_cache": "int8"}}, "evaluate"], True), (["quantize", "evaluate"], False),
        ([{"quantize": {"scheme": "w8a8-dynamic", "reduce_range": True}}], False),
        ([{"quantize": {"scheme": "w8a8-dynamic"}}], True), ([{"distill": {"precision": "fp32"}}], False),
    ],
)  # fmt: skip
def test_vector_instructions_count_where_activations_are_rounded(
    stages: Stages, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for flags in (("avx2", "fma"), ("avx2", "fma", "avx512_vnni")):
        on_machine(monkeypatch, *flags, "aes", cpu=f"CPU {len(flags)}")
        keys.append(last(stages).key)
    assert (keys[0] != keys[1]) is counts
    on_machine(monkeypatch, "avx2", "fma", "avx512_vnni", "sse4a", cpu="another one with the same of them")
    assert last(stages).key == keys[1]


@pytest.mark.parametrize("stage", ["distill", "qat", "convert-attention"])
@pytest.mark.parametrize(("flag", "precision"), [("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_is_what_this_machine_trains_in(
    stage: str, flag: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_may_have_gpu", lambda: False)
    on_machine(monkeypatch, flag)
    groups = {"to": "linear", "align": {}, "distill": {}} if stage == "convert-attention" else {}
    chosen = {"to": "linear", "align": {"precision": precision}, "distill": {"precision": precision}}
    explicit = chosen if stage == "convert-attention" else {"precision": precision}
    assert last([{stage: groups}]).key == last([{stage: explicit}]).key
    own = {"to": "linear", "keep": 2, **NO_TRAINING}
    keys = [last([{"convert-attention": own}]).key]
    on_machine(monkeypatch, "avx2" if flag == "amx_bf16" else "amx_bf16")
    assert last([{"convert-attention": own}]).key not in keys, "layers are judged in it, too"


def test_threads_count_where_onnx_runtime_runs() -> None:
    for stages, counts in (([PRUNED], False), (["export-onnx"], True), (["evaluate"], True)):
        assert (last(stages).key != last(stages, threads=3).key) is counts


def test_two_nodes_of_one_key_share_a_directory() -> None:
    plan = planned(["export-onnx", {"latency": {"prompts": [64], "baselines": ["source"]}}])
    exports = [step for step in plan.steps if step.stage.name == "export-onnx"]
    assert len(exports) == 2
    assert len({step.directory for step in exports}) == 1
