"""The dry run: on a real, small model of its own, in a temporary folder, naming the stage that fails."""

from __future__ import annotations

import json
import logging
import shutil
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
from pico import make_pico

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


def large_vocabulary(folder: Path) -> Path:
    """A pico Llama of 4000 tokens, most of which only the vocabulary has, that ends texts with the last one."""
    make_pico("llama", folder, vocab_size=4000, eos_token_id=3999)
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text())
    vocab = parsed["model"]["vocab"]
    vocab |= {f"word{number}": number for number in range(len(vocab), 3999)}
    end = parsed["added_tokens"][0]
    parsed["added_tokens"].append({**end, "id": 3999, "content": "<|last|>"})
    file.write_text(json.dumps(parsed))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|last|>"}))
    return folder


def test_a_twin_has_few_tokens_that_any_text_can_be_written_in(tmp_path: Path) -> None:
    from compress.models.load import load_model, load_tokenizer

    source = large_vocabulary(tmp_path / "source")
    folder = write_twin(source, tmp_path / "twin")
    config, tokenizer = load_model(folder).config, load_tokenizer(folder)
    assert config.vocab_size == len(tokenizer) < 1200
    assert (config.eos_token_id, config.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == "<|last|>"
    text = "naïve 数学 words\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_special_token_beyond_the_real_vocabulary_is_refused(key: str, pico: Pico, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(pico("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: 512}))
    with pytest.raises(InvalidInput, match=f"says {key} 512 of a model of 512 embeddings"):
        run(tmp_path, source)


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
