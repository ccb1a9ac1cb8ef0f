"""Ids, hidden stages, shapes and requirements: what a valid file becomes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fake_stages import Pack, Round, fakes  # noqa: F401 (fakes is a fixture)

from compress.errors import InvalidInput
from compress.models.anatomy import ModelShape, shape_of
from compress.pipeline.file import Pipeline, load_pipeline
from compress.pipeline.graph import Graph, resolve
from compress.pipeline.require import measured_early, parse_requirement
from compress.stage import INPUT, SOURCE

pytestmark = pytest.mark.usefixtures("fakes")

SHAPE = shape_of(
    {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
)
BERT = shape_of(
    {"model_type": "bert", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
)


def load(tmp_path: Path, stages: str, require: str = "{}") -> Pipeline:
    file = tmp_path / "p.yaml"
    file.write_text(f"name: p\nmodel: org/name\nstages: [{stages}]\nrequire: {require}\n", "utf-8")
    return load_pipeline(file)


def graph_of(tmp_path: Path, stages: str, require: str = "{}") -> Graph:
    return resolve(load(tmp_path, stages, require), SHAPE)


def test_pipeline_keeps_the_file_verbatim(tmp_path: Path) -> None:
    text = "# mine\nname: p\nmodel: org/name  # a hub id\nstages: [judge]\n"
    (tmp_path / "p.yaml").write_text(text, "utf-8")
    pipeline = load_pipeline(tmp_path / "p.yaml")
    assert pipeline.text == text
    assert (pipeline.seed, pipeline.target.threads, pipeline.require) == (0, 2, ())
    assert pipeline.stages[0].place.endswith("p.yaml:4 stages[0].judge")


def test_numbers_and_words_are_what_they_look_like(tmp_path: Path) -> None:
    rates = {"1e-1": 0.1, "1": 1.0, ".5": 0.5, "0x1": 1.0}
    for written, rate in rates.items():
        (entry,) = load(tmp_path, f"shrink: {{keep: 010, rate: {written}}}").stages
        assert entry.stage.model_dump() == {"keep": 10, "by": "first", "rate": rate, "slow": False}


def test_repeated_stages_are_numbered_or_named(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "judge, judge, judge: {id: mine}, judge")
    assert [node.id for node in graph.nodes] == ["judge", "judge-2", "mine", "judge-4"]
    assert all(node.inputs == {INPUT: SOURCE, SOURCE: SOURCE} for node in graph.nodes)


def test_number_that_is_taken_by_an_id_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="two stages"):
        load(tmp_path, "judge: {id: judge-2}, judge")


def test_measurement_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "shrink: {keep: 3}, judge, tune")
    assert [node.inputs[INPUT] for node in graph.nodes] == [SOURCE, "shrink", "shrink"]
    assert graph.result == "tune"


@pytest.mark.parametrize("shape", [SHAPE, None])
def test_stage_may_refuse_what_the_one_before_it_makes(tmp_path: Path, shape: ModelShape | None) -> None:
    with pytest.raises(InvalidInput, match=r"stages\[2\]\.pack\.format: what comes in has 8 bits; round to 4"):
        resolve(load(tmp_path, "round: {bits: 8}, judge, pack: {format: int4}"), shape)
    assert resolve(load(tmp_path, "round: {bits: 4}, judge, pack: {format: int4}"), shape).result == "pack"


def test_distance_has_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"kl of 'source'; it compares two models already: .* \"<= 0\.1\""):
        graph_of(tmp_path, "shrink: {keep: 3}, judge", '{kl: "<= 0.1x source"}')
    require = '{kl: "<= 0.1", perplexity: "<= 2x source"}'
    assert graph_of(tmp_path, "shrink: {keep: 3}, judge", require).result == "shrink"
    assert graph_of(tmp_path, "shrink: {keep: 3, id: one}, judge, shrink: {keep: 2}, judge", '{kl: "<= 2x one"}')


def test_before_becomes_a_hidden_stage(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "shrink: {keep: 3}, pack: {format: int4}")
    assert [(node.id, node.hidden) for node in graph.nodes] == [
        ("shrink", False), ("shrink/round", True), ("pack", False),
    ]  # fmt: skip
    assert graph.nodes[1].stage == Round(bits=4)
    assert graph.nodes[2].inputs == {INPUT: "shrink/round"}
    assert [node.id for node in graph_of(tmp_path, "round, pack: {format: int4}").nodes] == ["round", "pack"]


def test_baselines_are_hidden_and_identical_ones_are_one(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "shrink: {keep: 3}, pack, time, time: {prompts: [16]}")
    assert [node.id for node in graph.nodes] == [
        "shrink", "pack", "source/pack", "source/round", "source/round/pack", "time", "time-2",
    ]  # fmt: skip
    baselines = {SOURCE: "source/pack", "source-int4": "source/round/pack"}
    assert graph.nodes[-2].inputs == graph.nodes[-1].inputs == {INPUT: "pack", **baselines}
    assert graph.nodes[2].stage == Pack()


def test_baseline_that_the_file_spells_out_is_that_stage(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "pack, time")
    assert graph.nodes[-1].inputs[SOURCE] == "pack"


def test_every_input_comes_before(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "shrink: {keep: 3}, judge, tune: {teacher: shrink}, pack: {format: int4}, time, judge")
    seen = {SOURCE}
    for node in graph.nodes:
        assert seen >= set(node.inputs.values())
        seen.add(node.id)


def test_shapes_go_through_the_stages(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "judge, shrink: {keep: 3}, judge, shrink: {keep: 2}, pack, time")
    layers = {node.id: node.shape.num_hidden_layers for node in graph.nodes if node.shape}
    assert layers == {
        "judge": 4, "shrink": 3, "judge-2": 3, "shrink-2": 2, "pack": 2, "time": 2,
        "source/pack": 4, "source/round": 4, "source/round/pack": 4,
    }  # fmt: skip


def test_later_options_are_held_against_the_smaller_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"stages\[1\]\.shrink\.keep: 3 of 2 layers"):
        graph_of(tmp_path, "shrink: {keep: 2}, shrink: {keep: 3}")


def test_without_a_shape_options_are_not_held_against_it(tmp_path: Path) -> None:
    graph = resolve(load(tmp_path, "shrink: {keep: 40}, tune"), None)
    assert [node.shape for node in graph.nodes] == [None, None]


def test_stage_for_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="tune works on decoder models, and bert is an encoder"):
        resolve(load(tmp_path, "tune"), BERT)


def test_baseline_may_be_the_artifact_or_its_measurement(tmp_path: Path) -> None:
    stages = "shrink: {keep: 3}, judge: {id: first}, tune, judge: {against: shrink}"
    for baseline in ("source", "shrink", "first"):
        assert graph_of(tmp_path, stages, f'{{perplexity: "<= 1.1x {baseline}"}}').result == "tune"
    with pytest.raises(InvalidInput, match="'judge' may mean 'judge' or 'judge-2'"):
        graph_of(tmp_path, "judge, tune, judge", '{perplexity: "<= 1.1x judge"}')
    with pytest.raises(InvalidInput, match="no stage measures perplexity of 'pack'"):
        graph_of(tmp_path, f"{stages}, pack", '{perplexity: "<= 1.1x pack"}')


def test_figure_measured_before_the_last_stage_is_noted(tmp_path: Path) -> None:
    pipeline = load(tmp_path, "tune, judge, pack", '{perplexity: "<= 90", size_mb: "<= 1"}')
    (note,) = measured_early(resolve(pipeline, SHAPE), pipeline.require)
    assert "perplexity is last measured of 'tune', and the result is 'pack'" in note.what


@pytest.mark.parametrize(
    ("comparison", "measured", "met", "words"),
    [
        ("<= 90", 85.5, True, "tpot 85.5, required <= 90: met, 5.0% to spare"),
        ("<= 90", 90.0, True, "met"),
        ("< 90", 90.0, False, "missed by 0.0%"),
        ("<= 90", 99.0, False, "tpot 99, required <= 90: missed by 10.0%"),
        (">= 0.95", 0.855, False, "missed by 10.0%"),
        ("> 0", 1.0, True, "met"),
        ("<=1.05x source", 20.0, True, "tpot 20, required <= 21 (1.05x source): met, 4.8% to spare"),
        ("<= 0.25× mine", 20.0, False, "tpot 20, required <= 1 (0.25x mine): missed by 1900.0%"),
        ("<= 1x nobody", 20.0, False, "that of nobody was not measured"),
        ("<= 90", math.nan, False, "missed"),
        ("<= 90", None, False, "it was not measured"),
    ],
)
def test_verdict(comparison: str, measured: float | None, met: bool, words: str) -> None:
    result = {} if measured is None else {"tpot": measured}
    figures = {"result": result, "source": {"tpot": 20.0}, "mine": {"tpot": 4.0}}
    verdict = parse_requirement("tpot", comparison, "here").verdict(figures)
    assert verdict.met is met
    assert words in verdict.sentence
