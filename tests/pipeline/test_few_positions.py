"""A model of few positions: defaults that it can't read become what it reads, and what is given is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exporting import export

from compress.cli.bench import bench
from compress.cli.eval import evaluate
from compress.errors import InvalidInput
from compress.models.anatomy import shape_of
from compress.pipeline.file import load_pipeline
from compress.pipeline.graph import Graph, resolve
from compress.registry import stage_class
from compress.runner.run import run_pipeline
from compress.stage import Reporter
from pico import make_pico


def text(seed: int) -> str:
    """Words of a seed's own, so that no text overlaps another."""
    return " ".join(f"{seed}word{number % 7} is not {seed}word{number % 11};" for number in range(1500))


OPTIONS: Mapping[str, dict[str, Any]] = {
    "prune-layers": {"keep": 1}, "prune-groups": {"keep": {"intermediate": 0.5}}, "quantize": {"scheme": "w8a8-static"},
    "qat": {"scheme": "w4-block32"}, "distill": {}, "choose-format": {"schemes": ["fp32"]}, "evaluate": {},
}  # fmt: skip
"""Stages that read text, and what they can't do without."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 32 tokens, in a folder with a text."""
    folder = tmp_path_factory.mktemp("short")
    make_pico("gpt2", folder / "model", num_hidden_layers=2, n_positions=32)
    make_pico("llama", folder / "llama", num_hidden_layers=2, max_position_embeddings=32)
    for name in ("text", "other"):
        (folder / f"{name}.txt").write_text(text(len(name)))
    return folder


def graph(folder: Path, stages: str, model: str = "model") -> Graph:
    file = folder / "pipeline.yaml"
    data = f"{{train: {folder}/text.txt, eval: {folder}/other.txt}}"
    file.write_text(f"name: short\nmodel: {folder / model}\ndata: {data}\nstages: {stages}\n")
    config = json.loads((folder / model / "config.json").read_text())
    return resolve(load_pipeline(file), shape_of(config))


@pytest.mark.parametrize("name", OPTIONS)
def test_text_is_read_as_far_as_the_model_does_unless_a_length_is_given(name: str, short: Path) -> None:
    node = graph(short, json.dumps([{name: OPTIONS[name]}])).nodes[-1]
    assert (node.stage.model_dump()["sequence_length"], "sequence_length" in node.stage.model_fields_set) == (32, False)
    assert graph(short, json.dumps([{name: {**OPTIONS[name], "sequence_length": 16}}]))
    with pytest.raises(InvalidInput, match=r"sequence_length: 64 .*(beyond|more than|reads at most)"):
        graph(short, json.dumps([{name: {**OPTIONS[name], "sequence_length": 64}}]))


def test_so_is_that_of_groups(short: Path) -> None:
    stage = {"convert-attention": {"to": "linear", "distill": {"tokens": 1000}}}
    (node,) = graph(short, json.dumps([stage]), "llama").nodes
    found = node.stage.model_dump()
    assert (found["align"]["sequence_length"], found["distill"]["sequence_length"]) == (32, 32)
    assert node.stage.model_fields_set == {"to", "distill"}
    stage["convert-attention"]["align"] = {"sequence_length": 64}
    with pytest.raises(InvalidInput, match=r"align\.sequence_length: 64 is more than the model's 32 positions"):
        graph(short, json.dumps([stage]), "llama")


def test_so_are_blocks_that_layers_are_judged_on_where_nothing_is_aligned(short: Path) -> None:
    shape = replace(shape_of(json.loads((short / "llama/config.json").read_text())), max_position_embeddings=32)
    options = {"to": "linear", "align": None, "distill": {"tokens": 1000}, "keep": 1, "select": "kl-proxy"}
    stage: Any = stage_class("convert-attention").model_validate({**options, "select_tokens": 64}).fitted(shape)
    assert stage.align_options(shape).sequence_length == 32
    assert list(stage.check(shape)) == []


def test_a_model_of_many_positions_is_read_as_before(short: Path) -> None:
    make_pico("gpt2", short / "long", num_hidden_layers=2, n_positions=2048)
    for name, options in OPTIONS.items():
        stage = stage_class(name).model_validate(options)
        assert graph(short, json.dumps([{name: options}]), "long").nodes[-1].stage == stage
    timed = graph(short, "[export-onnx, latency]", "long").nodes[-1].stage.model_dump()
    assert (timed["prompts"], timed["new_tokens"]) == ((128, 1024), 32)


@pytest.mark.parametrize(
    ("positions", "given", "prompts", "new_tokens"),
    [
        (32, {}, (24,), 8),
        (1024, {}, (128, 992), 32),
        (160, {}, (128,), 32),
        (32, {"new_tokens": 2}, (30,), 2),
        (32, {"prompts": [16, 24]}, (16, 24), 8),
    ],
)
def test_prompts_end_where_the_model_does(
    positions: int, given: dict[str, Any], prompts: tuple[int, ...], new_tokens: int, short: Path
) -> None:
    shape = replace(shape_of(json.loads((short / "model/config.json").read_text())), max_position_embeddings=positions)
    for name in ("latency", "choose-format"):
        stage: Any = stage_class(name).model_validate(given).fitted(shape)
        assert (stage.prompts, stage.new_tokens) == (prompts, new_tokens)
        assert f"ttft_ms@{prompts[-1]}" in stage.produces()
        assert list(stage.check(shape)) == []


@pytest.mark.parametrize("options", ["prompts: [64]", "new_tokens: 32", "prompts: [30], new_tokens: 8"])
def test_prompts_that_are_given_and_too_long_are_refused(options: str, short: Path) -> None:
    with pytest.raises(InvalidInput, match="but the model reads at most 32"):
        graph(short, f"[export-onnx, latency: {{{options}}}]")


def test_recall_asks_over_contexts_that_the_model_reads(short: Path) -> None:
    shape = replace(shape_of(json.loads((short / "model/config.json").read_text())), max_position_embeddings=512)
    stage: Any = stage_class("evaluate").model_validate({"recall": {}}).fitted(shape)
    assert stage.recall.contexts == (256, 512)
    with pytest.raises(InvalidInput, match="1024 tokens, but the model reads at most 32"):
        graph(short, "[evaluate: {recall: {}}]")


def test_the_exporter_compares_within_the_positions(short: Path, tmp_path: Path) -> None:
    assert export(short / "model", tmp_path / "out")["parity_max_error"] < 1e-3
    evaluate(tmp_path / "out", str(short / "text.txt"), short / "model", tokens=256, threads=1, as_json=True)
    with pytest.raises(InvalidInput, match=r"--sequence-length: 64 tokens, but a model here reads at most 32"):
        evaluate(tmp_path / "out", str(short / "text.txt"), sequence_length=64)
    bench([tmp_path / "out"], threads=1, repeats=3, as_json=True)
    with pytest.raises(InvalidInput, match=r"--prompts: 64 tokens, but the model in .* reads at most 32"):
        bench([tmp_path / "out"], prompts="64", threads=1)


def test_a_whole_run_of_defaults(short: Path, tmp_path: Path) -> None:
    stages = "[prune-layers: {keep: 1}, distill: {tokens: 256}, quantize: {scheme: w4-block32}, export-onnx, "
    graph(short, stages + "evaluate: {tokens: 256}, latency: {repeats: 3, baselines: []}]")
    run = run_pipeline(load_pipeline(short / "pipeline.yaml"), runs=tmp_path, reporter=Reporter(), twin=True)
    figures = run.stages[-1].metrics["result"]
    assert {"ttft_ms@24", "tpot_ms@24"} <= figures.keys()
