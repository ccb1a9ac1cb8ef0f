"""The dry run: on a real, small model of its own, in a temporary folder, naming the stage that fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest

from compress import registry
from compress.artifact import Metrics
from compress.errors import InvalidInput
from compress.pipeline.file import load_pipeline
from compress.runner.record import State, load_record
from compress.runner.run import run_pipeline
from compress.runner.twin import write_twin
from compress.stage import Reporter, StageContext

Pico = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _fake_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_points", fakes.points)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def run(folder: Path, model: Path, **changes: Any) -> State:
    pipeline = load_pipeline(fakes.make_pipeline(folder, model, **changes))
    return run_pipeline(pipeline, runs=folder / "runs", reporter=Reporter()).state


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_twin_is_a_shallow_random_model_of_the_same_class(model_type: str, pico: Pico, tmp_path: Path) -> None:
    from compress.models.load import load_model, load_tokenizer
    from compress.models.parts import Parts

    origin, twin = load_model(pico(model_type)), load_model(write_twin(pico(model_type), tmp_path / "twin"))
    assert type(twin) is type(origin)
    assert len(Parts(twin).layers) == 4
    assert Parts(twin).shape.vocab_size == Parts(origin).shape.vocab_size
    assert not all((a == b).all() for a, b in zip(origin.parameters(), twin.parameters(), strict=True))
    assert load_tokenizer(tmp_path / "twin").get_vocab() == load_tokenizer(pico(model_type)).get_vocab()


def test_what_fails_on_the_twin_fails_before_anything_is_computed(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"fake-shrink: fails on a random twin .* can't shrink this"):
        run(tmp_path, pico("llama"), shrink={"fail_on_twin": True})
    assert not list((tmp_path / "runs/pico").glob("01-*"))
    assert load_record(tmp_path / "runs/pico").state is State.FAILED


def test_the_twin_teaches_where_another_model_does(pico: Pico, tmp_path: Path) -> None:
    assert run(tmp_path, pico("llama"), shrink={"teacher_model": str(pico("qwen2"))}) is State.DONE


def test_a_twin_says_what_it_runs_and_warns_of_nothing(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shrink = fakes.FakeShrink.run

    def warned(stage: fakes.FakeShrink, context: StageContext) -> Metrics:
        context.reporter.log.warning("shrinking did not help")
        return shrink(stage, context)

    monkeypatch.setattr(fakes.FakeShrink, "run", warned)
    with caplog.at_level(logging.INFO):
        run(tmp_path, pico("llama"))
    assert "twin [1/" in caplog.text
    assert [record.name for record in caplog.records if "did not help" in record.message] == ["compress"]


def test_the_twin_is_run_once_for_a_plan_and_not_when_nothing_is_to_be_trained(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("compress.runner.run.try_twin", lambda prepared: tried.append(prepared.plan.digest))
    assert run(tmp_path, pico("llama")) is State.DONE
    assert len(tried) == 1
    record = json.loads((tmp_path / "runs/pico/run.json").read_text())
    assert record["twin"] == tried[0]
    next((tmp_path / "runs/pico").glob("01-fake-shrink-*/artifact.json")).unlink()
    assert run(tmp_path, pico("llama")) is State.DONE  # the same plan has passed already
    assert run(tmp_path, pico("llama"), stages=[{"fake-shrink": {}}, "fake-export"]) is State.DONE  # all cached
    assert len(tried) == 1
    assert run(tmp_path, pico("llama"), shrink={"by": 3.0}) is State.DONE
    assert len(tried) == 2
    monkeypatch.setattr(fakes.FakeShrink, "splits", frozenset({"eval"}))  # trains on what its teacher writes
    assert run(tmp_path, pico("llama"), shrink={"by": 4.0}) is State.DONE
    assert len(tried) == 3
    monkeypatch.setattr(fakes.FakeShrink, "splits", frozenset())
    assert run(tmp_path, pico("llama"), shrink={"by": 5.0}) is State.DONE
    assert len(tried) == 3
