"""However a pipeline file is mangled, checking it ends in a pipeline or in problems, one line each."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_stages import fakes  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.data import config as data_config
from compress.errors import InvalidInput
from compress.models.anatomy import shape_of
from compress.pipeline.check import check_file
from compress.pipeline.file import load_pipeline
from compress.pipeline.graph import resolve

pytestmark = pytest.mark.usefixtures("fakes", "no_folders")

SHAPE = shape_of(
    {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
)
VALID: dict[str, Any] = {
    "name": "good",
    "model": "org/name",
    "data": {"train": "python-docs", "eval_share": 0.2},
    "target": {"threads": 2},
    "seed": 3,
    "stages": [
        {"shrink": {"keep": [0, 1, 2], "by": "last", "rate": 0.5, "slow": True}},
        {"shrink": {"keep": 2, "id": "two"}},
        {"tune": {"teacher": "two"}},
        "judge",
        {"pack": {"format": "int4"}},
        {"judge": {"against": "two"}},
        {"time": {"prompts": [8, 16]}},
    ],
    "require": {"perplexity": "<= 1.05x source", "tpot_ms@8": "<= 0.5x source-int4", "size_mb": "<= 9e1"},
}
WORDS = ["source", "shrink", "two", "tune", "judge", "judge-2", "pack", "time", "keep", "id", "int4", "<= 2x two", "~"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**64, -(10**300), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=20), st.sampled_from(WORDS),
    st.sampled_from(["é\u202e", "\x85", "\U0001f600", "a\nb", "[bold]", "%s{}", "~nobody", "pypi://", "x" * 999]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(WORDS), below, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture
def no_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working directory of its own, and no walks through the machine where the text happens to name a folder."""
    monkeypatch.chdir(tmp_path)
    text_files = data_config.text_files
    monkeypatch.setattr(data_config, "text_files", lambda name: [] if os.path.isdir(name) else text_files(name))


def containers(value: Any) -> list[Any]:
    """Every mapping and list in `value`, itself first."""
    if not isinstance(value, dict | list):
        return []
    below = value.values() if isinstance(value, dict) else value
    return [value, *(inner for child in below for inner in containers(child))]


@st.composite
def mangled(draw: st.DrawFn) -> Any:
    """The valid file's values after one to four deletions, replacements, insertions and duplications."""
    value = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(containers(value)))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else None
        action = draw(st.sampled_from(["delete", "replace", "insert", "duplicate", "rename"]))
        if action == "delete" and key is not None:
            del place[key]
        elif action == "replace" and key is not None:
            place[key] = draw(VALUES)
        elif isinstance(place, list):
            place.insert(
                draw(st.integers(0, len(place))), place[key] if action == "duplicate" and keys else draw(VALUES)
            )
        elif action == "rename" and key is not None:
            place[draw(st.text(max_size=8) | st.sampled_from(WORDS))] = place.pop(key)
        else:
            place[draw(st.text(max_size=8) | st.sampled_from(WORDS))] = draw(VALUES)
    return value


def judge(file: Path, text: bytes) -> None:
    """Check `text` as `compress check` does, and load and resolve it as `compress run` does; they must agree."""
    file.write_bytes(text)
    found = check_file(file)
    for problem in (*found.problems, *found.notes):
        assert len(str(problem).splitlines()) == 1
        assert str(problem).isprintable()
        assert problem.where.startswith(str(file))
        assert len(str(problem)) < 1500
    json.dumps(found.to_json()).encode()
    with contextlib.suppress(InvalidInput):
        resolve(load_pipeline(file), SHAPE)
        assert all("model" in problem.where or "data" in problem.where for problem in found.problems)


common = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(mangled())
@common
def test_mangled_values(tmp_path: Path, value: Any) -> None:
    judge(
        tmp_path / "p.yaml", yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    )


@given(st.data())
@common
def test_mangled_text(tmp_path: Path, data: st.DataObject) -> None:
    text = yaml.safe_dump(VALID, sort_keys=False, default_flow_style=data.draw(st.sampled_from([None, True, False])))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        new = data.draw(
            st.text(alphabet=st.sampled_from("ab:-[]{},&*!|>'\"%@`#?~ \n\t0.\\\u2028\x00é😀"), max_size=8)
            | st.just(text[start:end])
        )
        text = text[:start] + new + text[end:]
    judge(tmp_path / "p.yaml", text.encode())


@given(st.binary(max_size=300))
@common
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    judge(tmp_path / "p.yaml", content)


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(VALID), "utf-8")
    graph = resolve(load_pipeline(file), SHAPE)
    assert [node.id for node in graph.nodes if not node.hidden] == [
        "shrink",
        "two",
        "tune",
        "judge",
        "pack",
        "judge-2",
        "time",
    ]
    assert check_file(file).problems == ()
