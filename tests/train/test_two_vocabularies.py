"""A student that has a part of its teacher's vocabulary learns from what the teacher says after the same text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stages/vocab"))

from reducing import Text, reduced
from teaching import context
from tokenizers_of_kinds import TEXTS, make_model

from compress.errors import StageFailed
from compress.models.load import load_model, load_tokenizer
from compress.stages.distill.stage import Distill
from compress.stages.qat.stage import Qat
from compress.train.losses import IGNORED, forward_kl
from compress.train.objective import Objective
from compress.train.options import LossWeights
from compress.train.vocabularies import NOWHERE, TwoWays, first_pieces, in_students_tokens, two_ways

LENGTH = 24
ASCII = [text.encode("ascii", "ignore").decode() for text in TEXTS[:6]]
SHORT: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_size": 4, "tokens": 10 * 4 * LENGTH, "eval_tokens": 4 * LENGTH,
    "eval_steps": 5, "learning_rate": 3e-3, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    source = make_model("byte-level", folder / "source")
    reduced(source, folder / "reduced", keep=400)
    return {"input": folder / "reduced", "teacher": source}


def run(stage: Any, models: dict[str, Path], folder: Path) -> Any:
    data: Any = Text(ASCII)
    return stage.run(replace(context(folder, models), data=data))


def lesson(models: dict[str, Path], max_tokens: int = 40 * LENGTH, split: Any = "train") -> TwoWays:
    data: Any = Text(ASCII)
    tokenizers = (load_tokenizer(models[role]) for role in ("input", "teacher"))
    return two_ways(data, split, *tokenizers, LENGTH, max_tokens)


def test_both_have_read_the_same_text_up_to_a_place(models: dict[str, Path]) -> None:
    student, teacher = (load_tokenizer(models[role]) for role in ("input", "teacher"))
    found = lesson(models)
    data: Any = Text(ASCII)
    blocks = {tuple(ids) for ids in data.blocks("train", student, LENGTH)}
    assert len(found) == 40
    assert {tuple(ids) for ids in found.ids_NT} <= blocks
    for ids, theirs, places in zip(found.ids_NT, found.their_ids_NS, found.places_NT, strict=True):
        read = [(place, at) for at, place in enumerate(places) if place != NOWHERE]
        assert read
        assert [place for place, _ in read] == sorted(place for place, _ in read)
        (first, begun), *_ = read
        for place, at in read:
            assert student.decode(ids[begun + 1 : at + 1]) == teacher.decode(theirs[first + 1 : place + 1])
        assert student.decode(ids[: begun + 1]).endswith(teacher.decode(theirs[: first + 1]))
        # every place where tokens of both end is there
        ends = np.cumsum([len(student.decode([id_])) or 1 for id_ in ids[begun + 1 :]])
        their_ends = np.cumsum([len(teacher.decode([id_])) or 1 for id_ in theirs[first + 1 : read[-1][0] + 1]])
        assert len(read) - 1 == len(set(ends) & set(their_ends))
    assert 0.2 < found.shared_positions < 1


def test_trained_on_are_the_blocks_with_most_split_tokens(models: dict[str, Path]) -> None:
    student, teacher = (load_tokenizer(models[role]) for role in ("input", "teacher"))
    data: Any = Text(ASCII)
    blocks_NT = data.blocks("train", student, LENGTH)
    kept = {name for name in teacher.get_vocab() if name in student.get_vocab()}
    splits = {}
    for ids in blocks_NT:
        whole = teacher.convert_ids_to_tokens(teacher(student.decode(ids))["input_ids"])
        splits[tuple(ids)] = sum(name not in kept for name in whole)
    chosen = {tuple(ids) for ids in lesson(models, 5 * LENGTH).ids_NT}
    assert len(chosen) == 5 < len(splits) / 2
    mean = {part: np.mean([splits[ids] for ids in splits if (ids in chosen) == part]) for part in (True, False)}
    assert mean[True] > 1.2 * mean[False]
    assert min(splits[ids] for ids in chosen) > 0.7 * max(splits.values())
    whole_N = [tuple(ids) for ids in lesson(models, blocks_NT.size).ids_NT]
    assert whole_N == [tuple(ids) for ids in blocks_NT]
    assert lesson(models, 5 * LENGTH).shared_positions < lesson(models, blocks_NT.size).shared_positions


def test_a_token_that_the_student_lacks_counts_for_its_first_piece(models: dict[str, Path]) -> None:
    student, teacher = (load_tokenizer(models[role]) for role in ("input", "teacher"))
    pieces = first_pieces(student, teacher)
    for name, id_ in teacher.get_vocab().items():
        text = teacher.decode([id_])
        if name in student.get_vocab():
            assert pieces[id_] == student.get_vocab()[name]
        elif "\N{REPLACEMENT CHARACTER}" not in text:
            assert pieces[id_] == student(text, add_special_tokens=False)["input_ids"][0], name
    assert (pieces != np.arange(len(pieces))).any()


def test_what_the_teacher_says_is_added_up_by_pieces() -> None:
    logits = torch.randn(2, 3, 7)  # two ids that are no token, one of them beyond the pieces
    places = torch.tensor([[0, NOWHERE, 2, 1], [2, 1, 0, NOWHERE]])
    pieces = torch.tensor([0, 1, 1, 2, 0, 3])
    found = in_students_tokens(logits, places, pieces, 3)
    assert found.shape == (2, 4, 3)
    for row in range(2):
        for at, place in enumerate(places[row].tolist()):
            if place != NOWHERE:
                said = logits[row, place, :6].softmax(-1)
                expected = torch.stack([said[[0, 4]].sum(), said[[1, 2]].sum(), said[3]])
                torch.testing.assert_close(found[row, at].exp(), expected)


def test_kl_and_cross_entropy_equal_a_naive_computation(models: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(Distill.model_validate({**SHORT, "learning_rate": 1e-9}), models, tmp_path)["input"]
    found = lesson(models, SHORT["eval_tokens"], "eval")
    assert len(found) == 4
    student, teacher = (load_model(models[role]) for role in ("input", "teacher"))
    divergences, surprises = [], []
    for ids, theirs, places in zip(found.ids_NT, found.their_ids_NS, found.places_NT, strict=True):
        with torch.no_grad():
            ours = student(torch.tensor(ids)[None]).logits[0]
            says = teacher(torch.tensor(theirs)[None]).logits[0].softmax(-1)
        one = []
        for at in range(LENGTH - 1):
            if places[at] != NOWHERE:
                said = torch.zeros(ours.shape[-1])
                for id_, piece in enumerate(found.pieces_W):
                    said[piece] += says[places[at], id_]
                one.append(float(forward_kl(ours[at][None], said.log()[None])))
        divergences.append(np.mean(one))
        surprises.append(float(-ours.log_softmax(-1)[torch.arange(LENGTH - 1), torch.tensor(ids[1:])].mean()))
    assert metrics["kl_to_teacher"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert metrics["cross_entropy"] == pytest.approx(np.mean(surprises), rel=1e-4)


@pytest.mark.parametrize(("loss", "of_text"), [({"kl": 2}, 2), ({"kl": 1, "skew_kl": 1, "ce": 0.5}, 2.5)])
def test_where_the_teacher_says_nothing_the_text_is_learnt(loss: dict[str, float], of_text: float) -> None:
    torch.manual_seed(0)
    (student_NV, teacher_NV), labels_N = torch.randn(2, 4, 7), torch.tensor([3, 1, IGNORED, 5])
    objective = Objective(LossWeights.model_validate({"kl": 0, **loss}), 3.0, "cosine")
    logits = student_NV, teacher_NV
    silent, told = (objective.per_item(*logits, labels_N, torch.full((4,), taught)) for taught in (False, True))
    expected = -of_text * student_NV.log_softmax(-1)[[0, 1, 3], labels_N[[0, 1, 3]]]
    torch.testing.assert_close(silent[[0, 1, 3]], expected)
    assert silent[2] == told[2] == 0
    mixed = objective.per_item(*logits, labels_N, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(mixed, torch.stack([told[0], silent[1], told[2], silent[3]]))


@pytest.mark.parametrize("loss", [{"kl": 1}, {"kl": 1, "ce": 0.5}, {"kl": 0, "skew_kl": 1}])
def test_distill_brings_it_nearer_to_its_teacher(loss: Any, models: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(Distill.model_validate({**SHORT, "loss": loss}), models, tmp_path)
    assert metrics["result"]["kl_to_teacher"] < metrics["input"]["kl_to_teacher"]
    assert metrics["result"]["shared_positions"] == pytest.approx(lesson(models, SHORT["tokens"]).shared_positions)
    assert (tmp_path / "out" / "vocabulary.json").read_bytes() == (models["input"] / "vocabulary.json").read_bytes()


def test_cross_entropy_alone_needs_no_teacher(models: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(Distill.model_validate({**SHORT, "loss": {"kl": 0, "ce": 1}}), {"input": models["input"]}, tmp_path)
    assert metrics["result"]["cross_entropy"] < metrics["input"]["cross_entropy"]
    assert "shared_positions" not in metrics["result"]


def test_qat_learns_from_a_teacher_with_more_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    options = {**SHORT, "scheme": "w4-block32", "method": "rtn"}
    metrics = run(Qat.model_validate(options), models, tmp_path)
    assert metrics["result"]["kl_to_teacher"] < metrics["start"]["kl_to_teacher"]
    assert 0 < metrics["result"]["shared_positions"] < 1


@pytest.mark.parametrize(
    ("options", "what"),
    [({"data": "generated"}, "data: .*its own tokens"), ({"loss": {"hidden": 1}}, "loss.hidden: .*other tokens"),
     ({"loss": {"attention_map": 1}}, "loss.attention_map"), ({"loss": {"attention_output": 1}}, "loss.attention_out")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(options: Any, what: str, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=what):
        run(Distill.model_validate({**SHORT, **options}), models, tmp_path)


def test_an_encoder_and_a_teacher_with_fewer_tokens_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    swapped = {"input": models["teacher"], "teacher": models["input"]}
    with pytest.raises(StageFailed, match=r"not the student's.*loss: \{kl: 0, ce: 1\}"):
        run(Distill.model_validate(SHORT), swapped, tmp_path)
    source = make_model("wordpiece", tmp_path / "source", "bert")
    reduced(source, tmp_path / "reduced", keep=400)
    with pytest.raises(StageFailed, match="encoders"):
        run(Distill.model_validate(SHORT), {"input": tmp_path / "reduced", "teacher": source}, tmp_path)
