"""The stage in real pipelines on pico models: candidates, choice, files, what is refused and what goes on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compress.errors import ExitCode, InvalidInput, RequirementMissed
from compress.pipeline.check import check_file, valid_pipeline
from compress.report.figures import figures_of
from compress.runner.estimate import estimate
from compress.runner.prepare import prepare
from compress.runner.record import RunRecord, StageRecord, State
from compress.runner.run import run_pipeline
from compress.runtime.session import OnnxModel
from compress.stage import INPUT, Reporter
from compress.stages.choose.stage import ChooseFormat

Pico = Callable[[str], Path]
SMALL = {
    "quantize": {"method": "rtn"}, "prompts": [16, 32], "new_tokens": 4, "tokens": 256, "sequence_length": 64,
    "repeats": 3, "max_seconds": 1,
}  # fmt: skip


def write(folder: Path, model: Path, stages: list[Any], name: str = "p") -> Path:
    file = folder / f"{name}.yaml"
    data = {"train": "python-docs"}
    head = {"name": "p", "model": str(model), "data": data, "target": {"threads": 1}}
    file.write_text(yaml.safe_dump({**head, "stages": stages}), "utf-8")
    return file


def run(folder: Path, model: Path, before: tuple[Any, ...] = (), **options: Any) -> RunRecord:
    file = write(folder, model, [*before, {"choose-format": {**SMALL, **options}}])
    return run_pipeline(valid_pipeline(file), runs=folder, reporter=Reporter(), twin=False)


def chosen(record: RunRecord, folder: Path) -> tuple[StageRecord, Path]:
    stage = record.stage("choose-format")
    return stage, folder / "p" / stage.directory


def problems(folder: Path, model: Path, *before: Any, **options: Any) -> list[str]:
    found = check_file(write(folder, model, [*before, {"choose-format": options}])).problems
    return [str(problem).partition("stages")[2] for problem in found]


@pytest.fixture(scope="module")
def done(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    folder = tmp_path_factory.mktemp("done")
    schemes = ["fp32", "w8-block32", {"w4-block32": {"symmetric": False}}]
    return run(folder, pico("llama"), schemes=schemes, budget={"top1_agreement": 0.9}, prefer="decode"), folder


def test_the_choice_is_one_of_the_candidates_untouched(done: tuple[RunRecord, Path]) -> None:
    record, folder = done
    stage, out = chosen(record, folder)
    written = json.loads((out / "formats.json").read_text())
    name = written["chosen"]
    assert set(written["candidates"]) == {"fp32", "w8-block32", "w4-block32"}
    within = {name for name, each in written["candidates"].items() if each["within_budget"]}
    assert within == {"fp32", "w8-block32"}, "4 bits of random weights are beyond it"
    assert name == min(within, key=lambda name: written["candidates"][name]["cost_ms"])
    origin = folder / "p" / record.stage(stage.inputs[name]).directory
    assert (out / "model.onnx").read_bytes() == (origin / "model.onnx").read_bytes()
    assert (out / "config.json").read_bytes() == (origin / "config.json").read_bytes()
    ids = np.arange(1, 9)[None]
    assert np.array_equal(OnnxModel(out).forward(ids)[0], OnnxModel(origin).forward(ids)[0])


def test_figures_of_every_candidate_reach_the_report(done: tuple[RunRecord, Path]) -> None:
    record, folder = done
    stage, out = chosen(record, folder)
    figures = figures_of(record)
    measured = {"size_mb", "perplexity", "kl", "ttft_ms@16", "ttft_ms@32", "tpot_ms@16", "load_ms", "top1_agreement"}
    for name in ("fp32", "w8-block32", "w4-block32", "result"):
        assert measured <= set(figures[name]), name
    assert figures["w4-block32"]["size_mb"] < figures["w8-block32"]["size_mb"] < figures["fp32"]["size_mb"]
    assert figures["fp32"]["kl"] < figures["w8-block32"]["kl"] < figures["w4-block32"]["kl"]
    assert set(stage.metrics["result"]) - {"size_mb", "parameters"} <= set(ChooseFormat(**SMALL).produces()) | {
        "eval_tokens"
    }
    report = (folder / "p" / "report.md").read_text()
    assert "| source | fp32 | w4-block32 | w8-block32 | result |" in report
    assert "formats.png" in report
    assert (out / "formats.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "formats.md").read_text()
    assert "| prefill (ms) | decode (ms) |" in table
    assert "missed by" in next(line for line in table.splitlines() if "w4-block32" in line)
    written = json.loads((out / "formats.json").read_text())
    assert written["vector_flags"] == [flag for flag in written["vector_flags"] if flag in record.hardware["flags"]]
    assert written["latency"]["method"]["interleaved"]


def test_what_is_reported_is_of_other_text_than_what_chose(done: tuple[RunRecord, Path]) -> None:
    record, folder = done
    stage, out = chosen(record, folder)
    candidates = json.loads((out / "formats.json").read_text())["candidates"]
    for name, each in candidates.items():
        quality = folder / "p" / record.stage(stage.inputs[f"{name} quality"]).directory / "evaluation.json"
        blocks = json.loads(quality.read_text())["blocks"]
        assert blocks["num_blocks"] == 4
        halves = [
            sum(blocks["top1_agreement"][first::2]) / sum(blocks["num_predictions"][first::2]) for first in (0, 1)
        ]
        assert each["figures"]["top1_agreement"] == pytest.approx(halves[1]), name
        assert each["within_budget"] == (halves[0] >= 0.9), name
        assert each["figures"]["eval_tokens"] == 128
    assert stage.metrics["w8-block32"]["top1_agreement"] == candidates["w8-block32"]["figures"]["top1_agreement"]


def test_none_within_the_budget_is_a_missed_requirement_and_is_gone_on_from(pico: Pico, tmp_path: Path) -> None:
    schemes = ["w8a8-dynamic", "w4-block32"]
    with pytest.raises(RequirementMissed) as missed:
        run(tmp_path, pico("bert"), schemes=schemes, budget={"cosine": 0.99999})
    assert missed.value.exit_code is ExitCode.REQUIREMENT_MISSED
    for name in schemes:
        assert f"{name}: cosine 0.9" in missed.value.problem.what
    assert missed.value.problem.what.count("required >= 1: missed by ") == 2
    record = run(tmp_path, pico("bert"), schemes=schemes, budget={"cosine": 0.5})
    states = {stage.id: stage.state for stage in record.stages}
    assert states.pop("choose-format") is State.DONE
    assert set(states.values()) == {State.CACHED}, "another budget makes no candidate again"
    assert {"latency_ms@16", "latency_ms@32", "cosine"} <= set(figures_of(record)["w4-block32"])


def test_candidates_are_made_of_the_stages_input(pico: Pico, tmp_path: Path) -> None:
    keep = {"prune-layers": {"keep": [0, 1]}}
    file = write(tmp_path, pico("llama"), [keep, {"choose-format": {**SMALL, "schemes": ["fp32", "w8-block64"]}}])
    prepared = prepare(valid_pipeline(file), tmp_path / "p", Reporter())
    nodes = {node.id: node for node in prepared.graph.nodes}
    assert set(nodes["choose-format"].inputs) == {
        INPUT, "fp32", "fp32 quality", "w8-block64", "w8-block64 quality",
    }  # fmt: skip
    assert nodes["choose-format"].inputs["w8-block64"] == "prune-layers/quantize/export-onnx"
    assert nodes["prune-layers/quantize"].inputs == {INPUT: "prune-layers"}
    evaluation = nodes["prune-layers/quantize/export-onnx/evaluate"]
    assert evaluation.inputs == {INPUT: "prune-layers/quantize/export-onnx", "source": "source"}
    costs = estimate(prepared)
    assert costs["choose-format"].size_mb == costs[nodes["choose-format"].inputs["fp32"]].size_mb, "the largest"
    assert costs["choose-format"].seconds > 0


def test_warnings_are_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, pico: Pico,
                             tmp_path: Path) -> None:  # fmt: skip
    import compress.stages.choose.choice as module

    monkeypatch.setattr(module, "_warnings", lambda candidates: iter([f"SMALLER {candidates[0].name}"]))
    with caplog.at_level(logging.WARNING):
        record = run(tmp_path, pico("llama"), schemes=["w4-block32"], budget={})
    assert [each.getMessage() for each in caplog.records if "SMALLER" in each.getMessage()] == [
        "choose-format: SMALLER w4-block32"
    ]
    _, out = chosen(record, tmp_path)
    assert "**SMALLER w4-block32.**" in (out / "formats.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schemes": []}, "[0].choose-format.schemes: must be at least 1 value(s) long"),
        ({"schemes": ["w4-block48"]}, "[0].choose-format.schemes[0]: is no scheme that ONNX Runtime can run"),
        ({"schemes": ["bnb-nf4"]}, "[0].choose-format.schemes[0]: is no scheme that ONNX Runtime can run"),
        ({"schemes": ["fp32", "fp32"]}, "[0].choose-format.schemes: fp32 is there twice"),
        ({"schemes": [{"w4-block32": {"methd": "rtn"}}]}, "[0].choose-format.schemes: w4-block32: methd is no option"),
        ({"schemes": [{"fp32": {"method": "rtn"}}]}, "[0].choose-format.schemes: fp32 has no options"),
        ({"quantize": {"scheme": "w4-block32"}}, "[0].choose-format.quantize: scheme is what this stage chooses"),
        ({"quantize": {"tokens": -1}}, "[0].choose-format.quantize: tokens must be at least 0"),
        ({"export": {"format": "int4"}}, "[0].choose-format.export: format is what this stage chooses"),
        ({"budget": {"perplexty": 1.1}}, "[0].choose-format.budget.perplexty: is no option here"),
        ({"budget": {"cosine": 0.9}}, "[0].choose-format.budget.cosine: is of an encoder's embeddings"),
        ({"prefer": "speed"}, "[0].choose-format.prefer: must be 'both', 'prefill' or 'decode'"),
        ({"prefer": {"prefill": 0}}, "[0].choose-format.prefer: nothing counts"),
        ({"prompts": [300]}, "[0].choose-format.prompts: 332 tokens"),
        ({"schemes": [{"w4-block32": {"prompt": "int4"}}]}, "[0].choose-format.schemes: w4-block32: prompt"),
        ({"schemes": [{"w8a8-dynamic": {"prompt": "int8"}}]}, "[0].choose-format: its hidden export-onnx: prompt: is"),
        ({"against": "distil"}, "[0].choose-format.against: 'distil' is no earlier stage"),
        ({"tokens": 300}, "[0].choose-format: its hidden evaluate: tokens: 300 is under two blocks"),
        (
            {"schemes": [{"w4-block32": {"ranges": "entropy"}}]},
            "[0].choose-format: its hidden quantize: ranges: has no say where the scheme is w4-block32",
        ),
    ],
)  # fmt: skip
def test_bad_options_are_refused_at_their_place(options: Any, said: str, pico: Pico, tmp_path: Path) -> None:
    found = problems(tmp_path, pico("llama"), **{"prompts": [16], "tokens": 512, **options})
    assert any(problem.startswith(said) for problem in found), found


def test_what_an_encoder_has_no_use_for(pico: Pico, tmp_path: Path) -> None:
    assert problems(tmp_path, pico("bert"), prompts=[16], prefer="decode") == [
        "[0].choose-format.prefer: an encoder has one phase: there is nothing to prefer; remove it"
    ]
    assert problems(tmp_path, pico("bert"), prompts=[16], budget={"cosine": 0.9}) == []


def test_quantised_weights_are_refused_once(pico: Pico, tmp_path: Path) -> None:
    found = problems(tmp_path, pico("llama"), "quantize", prompts=[16])
    assert found == ["[1].choose-format: takes torch, but what 'quantize' hands on is quantized; "
                     "move it before 'quantize'"]  # fmt: skip


def test_defaults_fit_every_family(pico: Pico, tmp_path: Path) -> None:
    for model_type in ("llama", "gpt2", "gpt_neox", "bert"):
        assert problems(tmp_path, pico(model_type), prompts=[128]) == []


def test_several_candidates_of_one_scheme_are_numbered() -> None:
    stage = ChooseFormat(schemes=("w4-block32", {"w4-block32": {"method": "rtn"}}, "fp32"), quantize={"tokens": 512})
    assert {name: dict(way).get("quantize") for name, way in stage.ways().items()} == {
        "w4-block32": {"tokens": 512, "scheme": "w4-block32"},
        "w4-block32-2": {"tokens": 512, "method": "rtn", "scheme": "w4-block32"},
        "fp32": None,
    }


def test_what_reads_prompts_is_told_apart_by_the_export() -> None:
    schemes = ("fp32", "w4-block32", {"w4-block32": {"prompt": "int8", "method": "rtn", "chunk_size": 64}})
    ways = ChooseFormat(schemes=schemes, export={"fused": True}).ways()
    assert {name: way[-1] for name, way in ways.items()} == {
        "fp32": ("export-onnx", {"fused": True, "format": "fp32"}),
        "w4-block32": ("export-onnx", {"fused": True}),
        "w4-block32-int8-prompt": ("export-onnx", {"fused": True, "prompt": "int8", "chunk_size": 64}),
    }
    assert ways["w4-block32-int8-prompt"][0] == ("quantize", {"scheme": "w4-block32", "method": "rtn"})
    everywhere = ChooseFormat(schemes=("fp32", "w4-block32"), export={"prompt": "int8"}).ways()
    assert dict(everywhere["fp32"])["export-onnx"] == {"format": "fp32"}
    assert list(everywhere) == ["fp32", "w4-block32-int8-prompt"]


def test_prompts_in_int8_are_raced_with_the_rest(pico: Pico, tmp_path: Path) -> None:
    schemes = ["w4-block32", {"w4-block32": {"prompt": "int8"}}]
    record = run(tmp_path, pico("llama"), schemes=schemes, budget={"kl": 10})
    _, out = chosen(record, tmp_path)
    candidates = json.loads((out / "formats.json").read_text())["candidates"]
    assert list(candidates) == ["w4-block32", "w4-block32-int8-prompt"]
    figures = figures_of(record)
    assert figures["w4-block32-int8-prompt"]["size_mb"] > figures["w4-block32"]["size_mb"]
    assert figures["w4-block32-int8-prompt"]["kl"] != figures["w4-block32"]["kl"]


def test_the_stage_is_imported_without_what_is_heavy() -> None:
    program = (
        "import sys, compress.stages.choose.stage;"
        "print(sorted({'torch', 'numpy', 'transformers', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_bad_yaml_is_invalid_input(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        valid_pipeline(write(tmp_path, pico("llama"), [{"choose-format": {"schemes": "w4"}}]))
