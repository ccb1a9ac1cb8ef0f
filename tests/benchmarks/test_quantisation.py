"""The quantisation benchmark on a pico model: arms are run as pipelines, judged on windows, and not run twice."""

from __future__ import annotations

import json
import pydoc_data.topics as topics
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.benchmarks import quantisation, quantisation_parity
from compress.benchmarks.export_cost import Cost
from compress.benchmarks.quantisation_arms import ARMS, select
from compress.benchmarks.quantisation_report import Judged, jackknife
from compress.benchmarks.remembered import Remembered
from compress.errors import InvalidInput
from compress.exports.onnx.parity import ROUNDING_LIMIT
from compress.models.anatomy import shape_of
from compress.pipeline.check import valid_pipeline
from compress.registry import stage_class
from compress.runner.run import run_pipeline
from compress.stage import Reporter


@pytest.fixture
def texts(tmp_path):
    pages = list(topics.topics.values())
    for name, chosen in {"train": pages[:12], "novel": pages[40:44], "letters": pages[50:54]}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen))
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Run pipelines here and not in processes of their own; the names of those that ran."""
    ran: list[str] = []

    def run(command, cwd):
        file = Path(command[command.index("run") + 1])
        ran.append(file.stem)
        run_pipeline(valid_pipeline(file), runs=file.parent / "runs", reporter=Reporter(), twin=False)
        return Cost(2.0, 300.0)

    monkeypatch.setattr(quantisation, "cost_of", run)
    return ran


def arguments_of(model: Path, texts: Path, *more: str) -> list[str]:
    judged = [f"a novel={texts / 'novel.txt'}", f"letters={texts / 'letters.txt'}"]
    options = ["--windows", "3", "--length", "24", "--calibrate", '{"tokens": 64, "sequence_length": 16}']
    given = [str(model), "--out", str(texts / "out"), "--train", str(texts / "train.txt"), "--judge", *judged]
    return [*given, *options, *more]


def test_arms_are_run_judged_and_not_measured_again(pico, texts, in_process, capsys):
    arguments = arguments_of(pico("llama"), texts, "--arms", "w4-block32-rtn", "w4-block32-gptq")
    assert quantisation.main(arguments) == 0
    assert in_process == ["w4-block32-rtn-0", "w4-block32-gptq-0"]
    report = (texts / "out" / "quantisation.md").read_text()
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| w4-block32-gptq")]
    cost, on_novel, on_letters = rows
    assert cost[1:2] + cost[4:6] == ["5.00", "2", "300"]
    assert on_novel != on_letters
    ratio, share = float(on_novel[1].split(" ± ")[0]), float(on_novel[4].split(" ± ")[0])
    (file,) = (texts / "out").glob("w4-block32-rtn-0-*.json")
    plain = json.loads(file.read_text())["judged"]["quantized"]["a novel"]["result"]["perplexity_ratio"]
    assert share == pytest.approx(100 * (ratio - 1) / (plain - 1), rel=0.01)
    assert quantisation.main(arguments) == 0
    assert len(in_process) == 2
    assert (texts / "out" / "quantisation.md").read_text() == report
    capsys.readouterr()


def test_encoders_and_exports_are_judged_too(pico, texts, in_process, capsys):
    arguments = arguments_of(pico("bert"), texts, "--arms", "w8-block32-rtn", "--onnx")
    assert quantisation.main(arguments) == 0
    report = (texts / "out" / "quantisation.md").read_text()
    lines = [line.split(" | ") for line in report.splitlines() if line.startswith("| w8-block32-rtn")]
    in_torch, in_onnx, *_ = (float(cells[1].split(" ± ")[0]) for cells in lines[1:])
    assert 0 < in_torch < 0.01
    assert in_onnx == pytest.approx(in_torch, rel=0.1)
    capsys.readouterr()


def test_an_arm_that_fails_does_not_stop_the_others(pico, texts, monkeypatch, in_process, capsys):
    good = quantisation.cost_of

    def fail_first(command, cwd):
        if "w8-block32-rtn" in command[command.index("run") + 1]:
            raise quantisation.subprocess.CalledProcessError(1, command)
        return good(command, cwd)

    monkeypatch.setattr(quantisation, "cost_of", fail_first)
    assert quantisation.main(arguments_of(pico("llama"), texts, "--arms", "w8-block32-rtn", "ternary-rtn")) == 1
    assert in_process == ["ternary-rtn-0"]
    assert "w8-block32-rtn, seed 0: failed" in capsys.readouterr().err


def test_every_arm_is_a_valid_stage_of_the_model_that_it_is_for():
    config = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 512, "tie_word_embeddings": True}
    smollm2 = shape_of({**config, **heads, "max_position_embeddings": 8192})
    for arm in ARMS:
        for item in arm.stages({"tokens": 512}, {}, export=False):
            ((name, options),) = item.items()
            assert not list(stage_class(name).model_validate(options).check(smollm2)), arm.name


def test_names_of_arms_are_unique_and_unknown_ones_refused():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    plain = {arm.name for arm in ARMS}
    assert {arm.plain for arm in ARMS} <= plain
    with pytest.raises(InvalidInput, match="no arm is called 'w3-"):
        select(["w4-*", "w3-block32-rtn"])


def test_the_jackknife_knows_the_error_of_a_mean_and_cancels_what_is_shared():
    values_N = np.random.default_rng(0).normal(size=40)
    found = jackknife(lambda keep_N: values_N[keep_N].mean(), 40)
    assert found.value == pytest.approx(values_N.mean())
    assert found.se == pytest.approx(values_N.std(ddof=1) / 40**0.5)
    nll_N = np.abs(values_N) + 1
    rows = [{"num_predictions": [10] * 40, "nll": list(nll_N * f), "reference_nll": list(nll_N)} for f in (1.1, 1.2)]
    one, other = (Judged.of([row]) for row in rows)
    ratio = jackknife(lambda keep_N: one.loss(keep_N) / other.loss(keep_N), 40)
    assert ratio.se < 0.01 * ratio.value


def test_answers_are_remembered_by_question(tmp_path):
    asked = []

    def score(ids_T, rows=slice(None)):
        asked.append(len(ids_T))
        return np.outer(ids_T, [1.0, 2.0])[rows]

    for _ in range(2):  # the second time in another process, so to say
        remembered = Remembered(tmp_path, lambda: score)
        assert np.array_equal(remembered(np.array([3, 4]), slice(0, -1)), [[3, 6]])
        assert np.array_equal(remembered(np.array([3, 4])), [[3, 6], [4, 8]])
    assert asked == [2, 2]


def folders_of(arm: str, texts: Path) -> list[Path]:
    """The artifact of an arm and its export."""
    run = texts / "out" / "runs" / f"{arm}-0"
    return [folder for stage in ("quantize", "export-onnx") for folder in run.glob(f"*-{stage}-*")]


def test_the_proof_holds_for_a_real_export_and_sees_one_changed_code(pico, texts, in_process, capsys):
    given = ["--out", str(texts / "out"), "--train", str(texts / "train.txt"), "--text", str(texts / "novel.txt")]
    small = ["--windows", "2", "--length", "16", "--new-tokens", "4"]
    small += ["--calibrate", '{"tokens": 64, "sequence_length": 16}']
    schemes = ["w4-block32-rtn", "w2-block32-rtn", "w8a8-dynamic-rtn", "w8a8-static-rtn"]
    quantisation_parity.main([str(pico("llama")), *given, *small, "--arms", *schemes])
    lines = (texts / "out" / "parity.md").read_text().splitlines()[2:6]
    for line in lines:
        arm, rows, unrounded, shipped, own, tokens = line.strip("| ").split(" | ")
        assert len(set(rows.split("/"))) == 1
        assert float(unrounded.split(" (")[0]) < 1e-5
        chosen_by_a_digit = arm == "w8a8-dynamic-rtn"  # a code that flips in one layer moves the next one's whole range
        limit = ROUNDING_LIMIT if chosen_by_a_digit else 5e-2
        assert all(float(cell.strip(")").split(" (")[1]) < limit for cell in (shipped, own))
        gap = float(tokens.partition("≤ ")[2].strip(")") or 0)
        assert tokens.startswith("4/4") or (chosen_by_a_digit and gap < float(shipped.split(" (")[0]))
    quantised, exported = folders_of("w4-block32-rtn", texts)
    stored = quantisation_parity.stored_rows(quantised)
    assert quantisation_parity.graph_rows(exported) == stored
    graph = onnx.load(exported / "model.onnx", load_external_data=False)
    codes = next(each for each in graph.graph.initializer if each.name.endswith("down_proj.weight.codes"))
    place = int({entry.key: entry.value for entry in codes.external_data}["offset"])
    data = bytearray((exported / "model.onnx.data").read_bytes())
    data[place] ^= 1
    (exported / "model.onnx.data").write_bytes(data)
    assert (stored & quantisation_parity.graph_rows(exported)).total() == stored.total() - 1

    quantised, exported = folders_of("w8a8-static-rtn", texts)
    stored = quantisation_parity.stored_rows(quantised)
    assert quantisation_parity.graph_rows(exported) == stored
    graph = onnx.load(exported / "model.onnx", load_external_data=False)
    scale = next(node.input[1] for node in graph.graph.node if node.op_type == "QuantizeLinear")
    constant = next(each for each in graph.graph.initializer if each.name == scale)
    constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant) * np.float32(1.01), scale))
    onnx.save(graph, exported / "model.onnx")
    assert (stored & quantisation_parity.graph_rows(exported)).total() < stored.total()
    capsys.readouterr()
