"""Stages that train on text that their teacher wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "distill"))
sys.path.insert(0, str(Path(__file__).parent / "convert"))

import converting
import launched

from compress.data.text import TextData
from compress.models.anatomy import shape_of
from compress.models.load import load_model, load_tokenizer
from compress.stages.convert.conversion import prepare
from compress.stages.convert.stage import ConvertAttention
from compress.stages.distill.stage import Distill
from compress.stages.qat.stage import Qat
from compress.train import generated
from pico import make_pico

GENERATED = {"data": "generated"}


@pytest.fixture
def models(tmp_path):
    return {role: make_pico("llama", tmp_path / role, seed=seed) for seed, role in enumerate(("teacher", "input"))}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents were written each time."""
    nums, write = [], generated.Author.write

    def counted(author: Any, num: int, *rest: Any) -> Any:
        nums.append(num)
        return write(author, num, *rest)

    monkeypatch.setattr(generated.Author, "write", counted)
    return nums


def test_a_student_learns_from_text_that_its_teacher_wrote(models, tmp_path, monkeypatch):
    blocks = TextData.blocks

    def no_train(data: TextData, split: str, *rest: Any) -> Any:
        assert split == "eval", "the train text is not read"
        return blocks(data, split, *rest)

    monkeypatch.setattr(TextData, "blocks", no_train)
    metrics = launched.distil(tmp_path, models, **GENERATED)
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]
    assert list((tmp_path / "work" / "generated" / "16").glob("*.safetensors")), "which a killed run would find there"


@pytest.mark.parametrize("cls", [Distill, Qat])
def test_the_key_has_the_train_text_only_where_it_is_read(cls):
    assert cls.model_validate({}).reads() == {"train", "eval"}
    assert cls.model_validate(GENERATED).reads() == {"eval"}


@pytest.mark.parametrize(
    ("align", "distill", "read"),
    [({}, {}, {"train", "eval"}), ({}, None, {"train"}), (GENERATED, {}, {"train", "eval"}),
     (GENERATED, GENERATED, {"eval"}), (GENERATED, None, set()), (None, GENERATED, {"eval"}), (None, None, set())],
)  # fmt: skip
def test_a_conversion_reads_what_any_of_its_trainings_does(align, distill, read):
    options = {"to": "linear", "align": align, "distill": distill}
    assert ConvertAttention.model_validate(options).reads() == read
    judged = ConvertAttention.model_validate({**options, "keep": 1})  # which layers is found on text
    assert judged.reads() == read | (set() if align == GENERATED else {"train"})


@pytest.mark.parametrize("cls", [Distill, Qat])
def test_the_teacher_is_read_that_only_writes(cls):
    ce = {"loss": {"kl": 0, "ce": 1}}
    assert "teacher" not in cls.model_validate(ce).inputs()
    assert "teacher" in cls.model_validate({**ce, **GENERATED}).inputs()


def test_cross_entropy_with_what_the_teacher_wrote(models, tmp_path):
    metrics = launched.distil(tmp_path, models, loss={"kl": 0, "ce": 1}, **GENERATED)
    assert "kl_to_teacher" not in metrics["result"] or np.isnan(metrics["result"]["kl_to_teacher"])
    assert metrics["result"]["cross_entropy"] > 0


def test_alignment_and_distillation_share_what_was_written(pico, tmp_path, written):
    options = {
        **converting.BASE, "align": {**converting.ALIGN, **GENERATED}, "distill": {**converting.DISTILL, **GENERATED},
    }  # fmt: skip
    job = prepare(ConvertAttention.model_validate(options), converting.context(tmp_path, pico("llama")))
    assert job.distill_ids is not None
    train_NT = job.distill_ids[0]
    aligned_on = {*map(tuple, job.align_NT), *map(tuple, job.held_NT)}
    assert {*map(tuple, train_NT)} <= aligned_on
    assert sum(written) < 1.5 * len(aligned_on)


@pytest.mark.parametrize(("bits", "precision"), [(8, "fp32"), (None, "bf16")])
def test_a_coarser_teacher_writes_almost_the_same(bits, precision, tmp_path):
    folder = make_pico("llama", tmp_path / "teacher", intermediate_size=128)
    loads = (lambda: load_model(folder), lambda: generated._to_write(folder, bits, precision))
    authors = [generated.Author(load, load_tokenizer(folder)) for load in loads]
    fine, coarse = (author.write(16, 8, np.random.default_rng(0))[:, :3] for author in authors)
    assert (fine == coarse).mean() > 0.8


@pytest.mark.parametrize(("cls", "place"), [(Distill, "data"), (Qat, "data"), (ConvertAttention, "align.data")])
def test_an_encoder_writes_no_text(cls, place, pico):
    shape = shape_of(json.loads((pico("bert") / "config.json").read_text()))
    options: dict[str, Any] = GENERATED
    if cls is ConvertAttention:
        options = {"to": "linear", "align": GENERATED}
    problems = {problem.where: problem for problem in cls.model_validate(options).check(shape)}
    assert problems[place].what == "bert is an encoder, which writes no text"
