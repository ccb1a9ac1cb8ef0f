"""Every kind of folder behind one function, and what a process costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.benchmarks.export_cost import cost_of
from compress.benchmarks.scorers import open_scorer, task_of
from compress.errors import CompressError


def test_an_onnx_decoder_gives_the_logits_of_every_position(toy_decoder: Callable[[str], Path]) -> None:
    score = open_scorer(toy_decoder("toy"), "causal", threads=1)
    logits_TV = score(np.array([3, 1, 3]))
    assert logits_TV.shape == (3, 32)
    assert np.array_equal(logits_TV[0], logits_TV[2]), "the toy is a bigram model"
    assert not np.array_equal(logits_TV[0], logits_TV[1])


def test_a_decoder_that_keeps_its_logits_to_itself_is_refused(toy_decoder: Callable[[str], Path]) -> None:
    folder = toy_decoder("toy")
    model = onnx.load(folder / "model.onnx")
    all_logits, last = model.graph.node[0], onnx.helper.make_node("Gather", ["all", "last"], ["logits"], axis=1)
    all_logits.output[0] = model.graph.node[1].input[0] = "all"
    model.graph.node.insert(1, last)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "last"))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(CompressError, match="the last token alone"):
        open_scorer(folder, "causal", threads=1)(np.array([3, 1, 3]))


def test_an_onnx_encoder_is_pooled_as_its_folder_says(toy_encoder: Callable[[str], Path]) -> None:
    folder, ids = toy_encoder("toy"), np.array([3, 1, 4])
    mean = open_scorer(folder, "embedding", threads=1)(ids)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = open_scorer(folder, "embedding", threads=1)(ids)
    assert mean.shape == first.shape == (1, 32)
    assert np.array_equal(first, open_scorer(folder, "embedding", threads=1)(ids[:1]))
    assert not np.allclose(mean, first)


def test_the_task_is_read_from_the_architecture(tmp_path: Path) -> None:
    assert task_of(tmp_path) == "causal", "onnxruntime-genai's folders have no config.json"
    for architecture, task in {
        "GPT2LMHeadModel": "causal", "BertForMaskedLM": "masked", "BertModel": "embedding",
        "BertForSequenceClassification": "classification",
    }.items():  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert task_of(tmp_path) == task


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"neither model\.onnx nor config\.json"):
        open_scorer(tmp_path, "causal", threads=1)


def test_the_cost_of_a_process_is_seen(tmp_path: Path) -> None:
    program = "import time; block = bytearray(300_000_000); time.sleep(0.2)"
    cost = cost_of((sys.executable, "-c", program), tmp_path)
    assert 300 < cost.peak_rss_mb < 400
    assert cost.seconds > 0.2
    with pytest.raises(subprocess.CalledProcessError):
        cost_of((sys.executable, "-c", "raise SystemExit(3)"), tmp_path)
