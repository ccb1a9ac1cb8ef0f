"""A model's folder may bring Python code. No verb runs it, whatever stands on stdin."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from glob import glob
from pathlib import Path

import pytest
from click.testing import Result
from tiny_gguf import write_gguf
from typer.testing import CliRunner

from compress.benchmarks.contest import COMMAND
from compress.benchmarks.genai import with_threads
from compress.cli.main import app
from compress.errors import CompressError, ExitCode
from compress.models.load import load_model, load_tokenizer
from compress.models.sources import parse_source
from pico import VOCAB_SIZE, make_hybrid

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).parents[2]
LOADER = ROOT / "compress/models/pretrained.py"
CALLS = {"from_pretrained", "from_config", "get_class_from_dynamic_module"}
PLANTED = "from pathlib import Path\nPath({marker!r}).touch()\nclass Planted: pass\n"
PIPELINE = """
name: planted
model: {model}
data: {{train: {text}}}
stages: [prune-layers: {{drop: 1}}, export-onnx: {{format: fp32}}, evaluate: {{tokens: 64, sequence_length: 16}}]
"""


def plant(folder: Path, tokenizer_class: str = "Planted", **config: object) -> Path:
    """Code in `folder` for every auto class that would run it, and for generation; the file that it would leave.

    config: what else its config.json says. tokenizer_class: one that transformers has reads the tokenizer without it.
    """
    marker = folder.parent / "ran"
    for name in ("planted.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(PLANTED.format(marker=str(marker)))
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    code = {"auto_map": dict.fromkeys(autos, "planted.Planted")}
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **code, **config}))
    code = {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}}
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **code, "tokenizer_class": tokenizer_class}))
    return marker


def yes(*arguments: str) -> Result:
    """`yes | compress …`."""
    return CliRunner().invoke(app, list(arguments), input="y\n" * 100)


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """A converted model: transformers has no tokenizer class for its config, so that it would take the folder's."""
    return make_hybrid("llama", tmp_path / "model", ("linear", None))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} says {i * i} and {i**3}." for i in range(2000)))
    return tmp_path / "text.txt"


def done_without(*arguments: str) -> None:
    done = yes(*arguments)
    assert (arguments, done.exit_code, done.exception) == (arguments, 0, None)


def refused(status: ExitCode, *arguments: str) -> None:
    done = yes(*arguments)
    assert isinstance(done.exception, CompressError), arguments
    assert done.exception.exit_code is status
    assert str(done.exception).count("\n") == 0
    assert "never run" in str(done.exception)


def test_no_verb_asks_whether_to_run_it(hybrid: Path, text: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    marker = plant(hybrid)
    (tmp_path / "p.yaml").write_text(PIPELINE.format(model=hybrid, text=text))
    done_without("init", str(hybrid), "-o", "new.yaml")
    done_without("check", "p.yaml")
    refused(ExitCode.INVALID_INPUT, "plan", "p.yaml")
    refused(ExitCode.INVALID_INPUT, "run", "p.yaml")
    refused(ExitCode.STAGE_FAILED, "eval", str(hybrid), "--text", str(text))
    assert not marker.exists()


def test_every_verb_does_without(pico: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    marker = plant(model, "PreTrainedTokenizerFast")
    (tmp_path / "p.yaml").write_text(PIPELINE.format(model=model, text=text))
    for arguments in (("plan", "p.yaml"), ("run", "p.yaml"), ("show", "runs/planted"), ("gc",)):
        done_without(*arguments)
    assert not marker.exists()
    for folder in map(Path, glob("runs/planted/0[12]-*")):
        assert "auto_map" not in (folder / "config.json").read_text()
        assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    (exported,) = glob("runs/planted/*export-onnx*")
    folder = Path(shutil.copytree(exported, "exported")).absolute()
    marker = plant(folder, "PreTrainedTokenizerFast")
    shadow = f"open({str(marker)!r}, 'w')\nraise ImportError('taken from the working directory')"
    (folder / "numpy.py").write_text(shadow)
    monkeypatch.chdir(folder)
    options = ("--tokens", "64", "--sequence-length", "16", "--against", str(model))
    done_without("eval", ".", "--text", str(text), *options)
    done_without("bench", ".", "--prompts", "4", "--repeats", "3")
    assert not marker.exists()


def test_a_model_that_only_the_code_could_read_is_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("gpt2"), tmp_path / "model"))
    marker = plant(folder, model_type="planted")
    with pytest.raises(CompressError, match="can be read only by Python code that it brings, which is never run"):
        load_model(folder)
    options = ("--text", "python-docs", "--tokens", "64", "--sequence-length", "16")
    refused(ExitCode.STAGE_FAILED, "eval", str(folder), *options)
    assert not marker.exists()


def test_a_model_that_transformers_knows_is_read_by_its_own_class(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("gpt2"), tmp_path / "model"))
    marker = plant(folder)
    assert type(load_model(folder)).__module__.startswith("transformers.models.gpt2")
    assert len(load_tokenizer(folder)) == VOCAB_SIZE
    assert not marker.exists()


def test_what_lies_beside_a_gguf_counts_for_nothing(pico: Callable[[str], Path], tmp_path: Path) -> None:
    beside = Path(shutil.copytree(pico("llama"), tmp_path / "beside"))
    gguf = write_gguf(beside, beside / "tiny.gguf")
    marker = plant(beside)
    (beside / "tokenizer.json").write_text("{}")
    text = "The if statement is used for conditional execution"
    folder = parse_source(str(gguf)).fetch()
    assert load_tokenizer(folder).encode(text) == load_tokenizer(pico("llama")).encode(text)
    assert not marker.exists()


def test_a_library_that_an_onnx_folder_names_is_not_loaded(tmp_path: Path) -> None:
    options = r'{"model": {"decoder": {"session_options": {"custom_ops\u005flibrary": "evil.so"}}}}'
    (tmp_path / "genai_config.json").write_text(options)
    with pytest.raises(CompressError, match="names a custom_ops_library: code that the folder brings"):
        with_threads(tmp_path, 1, tmp_path / "copy")


def test_nothing_of_ours_goes_past_the_one_place_that_forbids_it() -> None:
    for room in ("compress", "stages", "exports", "benchmarks"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in CALLS:
                    continue
                assert file == LOADER, f"{file}:{node.lineno}: load it through compress.models.pretrained"
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                from_a_folder = ast.unparse(node.args[0]) != "None"
                assert not from_a_folder or said["trust_remote_code"] == "False", f"{file}:{node.lineno}"


def test_a_measuring_process_takes_no_module_from_the_working_directory() -> None:
    assert "-P" in COMMAND
