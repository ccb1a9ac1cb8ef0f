"""`evaluate` beside a model with another vocabulary: each reads its own tokens of the same text."""

from __future__ import annotations

import json
import math
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stages/vocab"))

from reducing import Text, reduced
from tokenizers_of_kinds import TEXTS, make_model

from compress.artifact import Artifact
from compress.benchmarks.evaluate import Evaluate
from compress.errors import StageFailed
from compress.models.load import load_model, load_tokenizer
from compress.stage import StageContext, Target

LENGTH, BLOCKS = 32, 6


def evaluate(folder: Path, subject: Path, source: Path, texts: list[str], **options: Any) -> dict[str, Any]:
    (folder / "evaluated").mkdir(exist_ok=True)
    stage = Evaluate(sequence_length=LENGTH, tokens=LENGTH * BLOCKS, **options)
    inputs = {"input": Artifact(subject, "torch", "", "a"), "source": Artifact(source, "torch", "", "b")}
    data: Any = Text(texts)
    context = StageContext(folder / "evaluated", folder, inputs, data, 0, Target(threads=1))
    return dict(stage.run(context))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    source = make_model("byte-level", folder / "source")
    reduced(source, folder / "reduced", keep=400)
    return source, folder / "reduced"


class Reading:
    """A model's tokens of one text, what they spell so far at each, and the nats of each given those of a block."""

    def __init__(self, folder: Path, text: str) -> None:
        tokenizer = load_tokenizer(folder)
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.ends = [0, *accumulate(len(tokenizer.decode([id_]).encode()) for id_ in self.ids)]
        self._model = load_model(folder)

    def nats(self, begin: int, first: int, stop: int) -> float:
        """Of the bytes from `first` to `stop`, having read those from `begin` on."""
        at, asked, end = (self.ends.index(place) for place in (begin, first, stop))
        ids = torch.tensor([self.ids[at:end]])
        with torch.no_grad():
            log = self._model(ids).logits[0].double().log_softmax(-1)
        return -float(log[:-1].gather(1, ids[0, 1:, None])[asked - at - 1 :].sum())


def test_bits_per_byte_equal_a_naive_computation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = " ".join(TEXTS[:3]).encode("ascii", "ignore").decode()  # a part of a character has no spelling of its own
    metrics = evaluate(tmp_path, folders[1], folders[0], [text])
    theirs, ours = (Reading(folder, text) for folder in folders)
    num_blocks = (len(theirs.ids) + 1) // LENGTH
    shared = sorted(set(theirs.ends) & set(ours.ends))
    rows = []
    for block in range(BLOCKS):
        start = block * num_blocks // BLOCKS * LENGTH
        begin, first = [place for place in shared if place >= theirs.ends[start]][:2]
        last = ours.ends[min(ours.ends.index(begin) + LENGTH, len(ours.ids))]
        stop = max(place for place in shared if place <= min(theirs.ends[start + LENGTH], last))
        rows.append((ours.nats(begin, first, stop), theirs.nats(begin, first, stop), stop - first))
    own_N, their_N, bytes_N = np.array(rows).T
    result = metrics["result"]
    assert result["bits_per_byte"] == pytest.approx(own_N.sum() / math.log(2) / bytes_N.sum(), rel=1e-5)
    assert metrics["source"]["bits_per_byte"] == pytest.approx(their_N.sum() / math.log(2) / bytes_N.sum(), rel=1e-5)
    ratio = own_N.sum() / their_N.sum()
    assert result["bits_per_byte_ratio"] == pytest.approx(ratio, rel=1e-5)
    spread = BLOCKS / (BLOCKS - 1) * ((own_N - ratio * their_N) ** 2).sum()
    assert result["bits_per_byte_ratio_se"] == pytest.approx(spread**0.5 / their_N.sum(), rel=1e-3)
    assert bytes_N.sum() > BLOCKS * LENGTH


def test_no_figure_compares_tokens(folders: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, folders[1], folders[0], TEXTS[:3])
    bits = {"bits_per_byte", "bits_per_byte_se"}
    assert metrics["result"].keys() == bits | {"bits_per_byte_ratio", "bits_per_byte_ratio_se", "eval_tokens"}
    assert metrics["source"].keys() == bits
    written = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert all(written["blocks"]["num_bytes"])


def test_what_is_remembered_is_asked_of_the_model_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    recall = {"contexts": [128], "mqar_pairs": 2, "samples": 2}
    metrics = evaluate(tmp_path, folders[1], folders[0], [" ".join(TEXTS)], recall=recall)
    assert 0 <= metrics["result"]["mqar@128"] <= 1
    assert metrics["source"].keys() == {"bits_per_byte", "bits_per_byte_se"}


@pytest.mark.parametrize(("architecture", "figures"), [
    (None, {"cosine"}), ("BertForSequenceClassification", {"kl", "top1_agreement"}), ("BertForMaskedLM", None),
    ("BertForTokenClassification", None),
])  # fmt: skip
def test_encoders(architecture: str | None, figures: set[str] | None, tmp_path: Path) -> None:
    head = {"architecture": architecture} if architecture else {}
    source = make_model("wordpiece", tmp_path / "source", "bert", **head)
    reduced(source, tmp_path / "reduced", keep=400)
    if figures is None:
        with pytest.raises(StageFailed, match=r"different ones.*against"):
            evaluate(tmp_path, tmp_path / "reduced", source, TEXTS)
        return
    result = evaluate(tmp_path, tmp_path / "reduced", source, TEXTS)["result"]
    assert {name for name in result if not name.endswith("_se")} == figures | {"eval_tokens"}
    assert all(math.isfinite(value) for value in result.values())
    assert 0 < result.get("cosine", 0.5) < 1
