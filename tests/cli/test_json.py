"""With `--json` stdout is one JSON document, and nothing else; of an error it is empty, and stderr has it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.cli.main import app
from compress.pipeline.matrix import cells

Call = Callable[..., tuple[int, str]]
RESULTS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "check": (("pipeline.yaml",), {"file", "valid", "problems", "notes", "stages"}),
    "plan": (("pipeline.yaml", "--no-twin"), {"name", "stages"}),
    "run": (("pipeline.yaml", "--no-twin"), {"state", "figures", "deploy", "operators", "verdicts", "stages"}),
    "show": (("pico",), {"state", "figures", "deploy", "operators", "verdicts", "stages"}),
    "compare": (("pico", "pico"), {"a", "b", "ratio"}),
    "verify": (("pico",), {"run", "whole", "stages", "damaged"}),
    "bench": (("onnx",), {"subjects", "ratios", "environment", "method", "warnings"}),
    "eval": (("model", "--text", "text"), {"figures", "blocks", "sequence_length"}),
    "gc": ((), {"directories", "total_mb", "deleted"}),
}
LISTS: dict[str, tuple[str, ...]] = {"stages": (), "stages --matrix": ("--matrix",)}
"""Those whose document is a list."""
WITHOUT = {"schema", "init"}
"""JSON in any case, and a file."""
ERRORS: dict[str, tuple[str, ...]] = {
    "plan": ("none.yaml",), "run": ("none.yaml",), "show": ("none",), "compare": ("pico", "none"), "verify": ("none",),
    "bench": ("none",), "eval": ("none", "--text", "text"), "stages": ("none",), "gc": ("--runs", "none"),
}  # fmt: skip


def strict(text: str) -> Any:
    """As a parser has it that knows no NaN."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def said(call: Call, here: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The exit status, stdout and stderr of a verb."""

    def run(*arguments: str) -> tuple[int, str, str]:
        stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
        status, stderr = call(*arguments, stdout=stdout)
        stdout.flush()
        return status, stdout.buffer.getvalue().decode(), stderr  # type: ignore[attr-defined]

    yield run
    cells.cache_clear()  # of stages that are no longer there


def test_every_verb_is_here() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == {*RESULTS, "stages"} | WITHOUT


@pytest.mark.parametrize("verb", RESULTS)
def test_stdout_is_one_document(said: Callable[..., tuple[int, str, str]], verb: str) -> None:
    arguments, keys = RESULTS[verb]
    status, stdout, stderr = said(verb, *arguments, "--json")
    assert status == 0, stderr
    assert keys <= strict(stdout).keys()


@pytest.mark.parametrize("case", LISTS)
def test_lists(said: Callable[..., tuple[int, str, str]], case: str) -> None:
    status, stdout, _ = said("stages", *LISTS[case], "--json")
    assert status == 0
    assert isinstance(strict(stdout), list)


def test_what_is_no_number_is_null(said: Callable[..., tuple[int, str, str]]) -> None:
    found = strict(said("eval", "model", "--text", "text", "--json")[1])
    assert found["figures"]["model"] == {"perplexity": 7.0, "perplexity_se": None}


@pytest.mark.parametrize("verb", ERRORS)
def test_an_error_is_a_line_on_stderr_and_nothing_on_stdout(
    said: Callable[..., tuple[int, str, str]], verb: str
) -> None:
    status, stdout, stderr = said(verb, *ERRORS[verb], "--json")
    assert (status, stdout) == (2, "")
    *_, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert "; " in last, "and what to do"


def test_check_lists_what_is_wrong(said: Callable[..., tuple[int, str, str]], here: Path) -> None:
    (here / "bad.yaml").write_text("name: bad\nmodel: model\nstages: [none]\n")
    status, stdout, _ = said("check", "bad.yaml", "--json")
    assert status == 2
    (problem,) = strict(stdout)["problems"]
    assert set(problem) == {"where", "what", "fix"}
