"""What a deployment runs: the example, and the verbs that need no torch, in an environment of what they name."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import export
from tokenizers import Tokenizer

from compress.runtime.session import OnnxModel
from pico import make_hybrid

ROOT = Path(__file__).parents[1]
REQUIREMENTS, EXAMPLE = ROOT / "deploy-requirements.txt", ROOT / "examples" / "generate.py"
HEAVY = ("torch", "transformers", "datasets", "optimum")
PROMPT = "The with statement is used to wrap the execution of a block."
CASES: dict[str, tuple[Sequence[str | None], dict[str, Any]]] = {
    "softmax attention": ((None, None), {}),
    "every state": (("mamba2", None, "gated-linear@8", "gated-delta"), {}),
    "standard operators": (("mamba2", None), {"fused": False}),
    "an int8 cache": ((None, "linear"), {"kv_cache": "int8"}),
}


class Text:
    """Random tokens in place of a pipeline's text."""

    def blocks(self, split: str, tokenizer: Any, length: int, tokens: int) -> Any:
        return np.random.default_rng(len(split)).integers(1, 500, (2, length))


@pytest.mark.parametrize("case", CASES)
def test_the_example_generates_what_the_whole_text_says(tmp_path: Path, case: str) -> None:
    mixers, options = CASES[case]
    export(make_hybrid("llama", tmp_path / "pico", mixers), folder := tmp_path / "out", data=Text(), **options)
    example = runpy.run_path(str(EXAMPLE))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    generated = list(example["generate"](example["Decoder"](folder, 1), ids, 12, set()))
    assert all(seconds > 0 for _, seconds in generated)
    model, tokens = OnnxModel(folder, threads=1), [token for token, _ in generated]
    for count, token in enumerate(tokens):  # read from its beginning each time: nothing of a cache
        logits_1NV, _ = model.forward(np.array([ids + tokens[:count]]), num_logits=1)
        assert token == logits_1NV[0, -1].argmax(), f"token {count} of {case}"
    last = tokens[5]
    ended = list(example["generate"](example["Decoder"](folder, 1), ids, 12, {last}))
    assert [token for token, _ in ended] == tokens[: tokens.index(last) + 1]


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    assert set(lines) <= set(project["dependencies"])


def test_an_environment_of_the_deploy_requirements_runs_both(tmp_path: Path, wheel: Path, record_property: Any) -> None:
    export(make_hybrid("llama", tmp_path / "pico", ("mamba2", None)), folder := tmp_path / "out")
    began = time.monotonic()
    python = new_environment(tmp_path / "env", wheel)
    record_property("install_seconds", seconds := round(time.monotonic() - began, 1))
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    size_mb = sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) / 1e6
    record_property("environment_mb", round(size_mb))
    print(f"{seconds} s to install, {size_mb:.0f} MB")
    asked = forbid(site, tmp_path / "asked")

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={})
        assert done.returncode == 0, done.stderr
        assert "first token" in done.stdout + done.stderr
        return done.stdout

    bench = [python.with_name("compress"), "bench", folder, "--prompts", "8", "--repeats", "3", "--threads", "1"]
    assert "time per token, ms @ 8" in run(*bench)
    assert run(python, EXAMPLE, folder, PROMPT, "--max-new-tokens", "4", "--threads", "1").strip()
    assert not asked.exists(), f"they import {asked.read_text()}"
    assert size_mb < 300


def new_environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a virtual environment with the deploy requirements and `wheel`, without what that needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-compile"]
    for what in (["-r", str(REQUIREMENTS), "-c", str(ROOT / "constraints.txt")], ["--no-deps", str(wheel)]):
        done = subprocess.run([*pip, *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "bin" / "python"


def forbid(site: Path, asked: Path) -> Path:
    """Have every process of an environment note in the file `asked` where it asks for what is heavy."""
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY}:\n"
        f"            open({str(asked)!r}, 'a').write(name + '\\n')\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    return asked
