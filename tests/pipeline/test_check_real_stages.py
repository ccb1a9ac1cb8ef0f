"""The real stages in the real files: they pass, `init` writes such, the schema accepts them, and torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.cli.main import main
from compress.cli.stages import describe
from compress.models.anatomy import FAMILIES, shape_of
from compress.pipeline.check import check_file
from compress.pipeline.matrix import as_markdown, cells
from compress.pipeline.schema import file_schema
from compress.pipeline.starter import run_name, starter
from compress.registry import stage_class, stage_names

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("tests/pipelines/*.yaml"), *ROOT.glob("pipelines/*.yaml")])
HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "datasets", "huggingface_hub", "scipy", "matplotlib")
MODEL_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `compress` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_passes_check(file: Path, pico: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / file.name
    text = file.read_text("utf-8").replace("model: PICO-bert", f"model: {pico('bert')}")
    copy.write_text(text.replace("model: PICO", f"model: {pico('llama')}"), "utf-8")
    assert [str(problem) for problem in check_file(copy).problems] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_schema_accepts_file(file: Path) -> None:
    import jsonschema

    jsonschema.Draft202012Validator(file_schema()).validate(yaml.safe_load(file.read_text("utf-8")))


@pytest.mark.parametrize(
    "broken",
    [
        {"stages": ["evaluat"]},
        {"stages": [{"evaluate": {"token": 3}}]},
        {"stages": [{"evaluate": None, "latency": None}]},
        {"seed": "1"},
        {"sead": 1},
        {"require": {"size_mb": 90}},
        {"require": {"size_mb": "about 90"}},
        {"name": "a/b"},
    ],
)
def test_schema_refuses(broken: dict[str, Any]) -> None:
    import jsonschema

    schema = file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    file = {"name": "n", "model": "m", "stages": ["evaluate", {"evaluate": {"id": "again"}}]}
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(file)
    assert not validator.is_valid({**file, **broken})


def test_schema_describes_every_option() -> None:
    for name in stage_names():
        for option in describe(stage_class(name))["options"]:
            assert option["description"], f"{name}.{option['name']}"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_init_writes_a_file_that_passes(
    model_type: str, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["init", str(pico(model_type))], monkeypatch) == 0
    assert capsys.readouterr().out == "pipeline.yaml\n"
    assert [str(problem) for problem in check_file(Path("pipeline.yaml")).problems] == []


def test_init_of_a_model_not_at_hand(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(starter("org/model-1B", "pipeline.yaml", None), "utf-8")
    found = check_file(file)
    assert found.problems == ()
    assert ["unchecked until fetched" in note.what for note in found.notes] == [True]


def test_init_does_not_overwrite(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine", "utf-8")
    assert run(["init", str(pico("llama")), "--output", str(file)], monkeypatch) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text("utf-8") == "mine"
    assert run(["init", str(pico("llama")), "--output", str(file), "--force"], monkeypatch) == 0
    assert "prune-layers" in file.read_text("utf-8")
    assert run(["init", str(pico("llama")), "-o", str(tmp_path / "no" / "such.yaml")], monkeypatch) == 2


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/Model-1B@main", "model-1b"), ("pypi://p/1/a/B.Q4_1.gguf", "b.q4_1"), ("/a/b c/", "b-c"), ("..", "model")],
)
def test_run_name(model: str, name: str) -> None:
    assert run_name(model) == name


def test_stages_lists_and_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out and stage_class(name).summary in out for name in stage_names())
    assert run(["stages", "latency"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "prompts: list of whole number ≥ 1 (default [128, 1024])" in out
    assert "tpot_ms@128" in out
    assert run(["stages", "latency", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["returns"] == "measurement"
    assert run(["stages", "latencey"], monkeypatch) == 2
    assert "did you mean 'latency'?" in capsys.readouterr().err


def test_matrix_says_what_check_says() -> None:
    found = {(cell.model_type, cell.stage, cell.export): cell for cell in cells()}
    assert found["llama", "prune-layers", "int4"].is_supported
    assert found["llama", "export alone", "fp32"].is_supported
    assert all(cell.is_supported or cell.reason for cell in found.values())
    assert {cell.model_type for cell in found.values()} == set(MODEL_TYPES)
    table = as_markdown(cells()).splitlines()
    assert len(table) == 2 + len(MODEL_TYPES)
    assert len({line.count("|") for line in table}) == 1


def test_check_is_fast_and_imports_no_torch(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    file = tmp_path / "pipeline.yaml"
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text("utf-8")))
    file.write_text(starter(str(pico("llama")), str(file), shape), "utf-8")
    program = (
        "import sys, time; from compress.cli.main import main\n"
        "try: main()\n"
        f"finally: print(time.process_time(), *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "check", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, *imported = done.stderr.split()
    assert imported == []
    assert float(seconds) < 1.0  # of the processor: the clock says more of what else the machine does
