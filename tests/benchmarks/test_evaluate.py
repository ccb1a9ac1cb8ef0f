"""The `evaluate` stage on pico models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import killed

from compress.artifact import Artifact
from compress.benchmarks.evaluate import Evaluate
from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_tokenizer
from compress.stage import Reporter, StageContext, Target
from pico import make_pico

LENGTH, BLOCKS = 32, 6


class FixedText:
    """Stands in for TextData: the same few sentences, packed."""

    def blocks(self, split: str, tokenizer: Any, sequence_length: int, max_tokens: int | None = None) -> np.ndarray:
        import pydoc_data.topics

        text = pydoc_data.topics.topics["assignment"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: BLOCKS * sequence_length]
        return np.array(ids, np.int64).reshape(-1, sequence_length)

    def texts(self, split: str) -> list[str]:
        import pydoc_data.topics

        return [pydoc_data.topics.topics[name] for name in ("assignment", "numbers")]

    def digest(self, split: str) -> str:
        return "fixed"


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, "torch", "test", folder.name)


def evaluate(
    tmp_path: Path, subject: Path, source: Path, reporter: Reporter | None = None, **options: Any
) -> tuple[dict[str, Any], Path]:
    out = tmp_path / "out"
    out.mkdir(parents=True)
    stage = Evaluate(sequence_length=LENGTH, tokens=LENGTH * BLOCKS, **options)
    inputs = {"input": artifact(subject), "source": artifact(source)}
    data: Any = FixedText()
    context = StageContext(out, tmp_path, inputs, data, 0, Target(threads=1), reporter or Reporter())
    return dict(stage.run(context)), out


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.fixture
def source(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    return copy_of(pico("llama"), tmp_path / "source")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_pico("llama", tmp_path / "other", seed=1)


def naive(folder: Path) -> Any:
    import torch

    from compress.models.load import load_model, load_tokenizer

    blocks = torch.from_numpy(FixedText().blocks("eval", load_tokenizer(folder), LENGTH))
    with torch.inference_mode():
        return blocks, load_model(folder)(blocks).logits.double().log_softmax(-1)


def test_figures_equal_a_naive_computation(tmp_path: Path, source: Path, other: Path) -> None:
    metrics, _ = evaluate(tmp_path, other, source)
    blocks, log_q = naive(other)
    _, log_p = naive(source)
    num_bytes = [len(load_tokenizer(source).decode(ids[1:]).encode()) for ids in blocks]
    targets = blocks[:, 1:, None]
    log_q, log_p = log_q[:, :-1], log_p[:, :-1]
    result = metrics["result"]
    assert result["perplexity"] == pytest.approx(math.exp(-log_q.gather(2, targets).mean()), rel=1e-5)
    assert metrics["source"]["perplexity"] == pytest.approx(math.exp(-log_p.gather(2, targets).mean()), rel=1e-5)
    assert result["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()), abs=1e-12
    )
    nats_q, nats_p = (-log.gather(2, targets)[..., 0].sum(1).numpy() for log in (log_q, log_p))
    bits = nats_q / math.log(2)
    mean = bits.sum() / sum(num_bytes)
    assert result["bits_per_byte"] == pytest.approx(mean, rel=1e-5)
    spread = BLOCKS / (BLOCKS - 1) * ((bits - mean * np.array(num_bytes)) ** 2).sum()
    assert result["bits_per_byte_se"] == pytest.approx(spread**0.5 / sum(num_bytes), rel=1e-4)
    assert metrics["source"]["bits_per_byte"] == pytest.approx(nats_p.sum() / math.log(2) / sum(num_bytes), rel=1e-5)
    ratio = nats_q.sum() / nats_p.sum()
    assert result["bits_per_byte_ratio"] == pytest.approx(ratio, rel=1e-5)
    spread = BLOCKS / (BLOCKS - 1) * ((nats_q - ratio * nats_p) ** 2).sum()
    assert result["bits_per_byte_ratio_se"] == pytest.approx(spread**0.5 / nats_p.sum(), rel=1e-3)
    difference = (log_p - log_q).gather(2, targets)[..., 0].mean(1)  # blocks of equal length: plain SE of their means
    assert result["perplexity_ratio"] == pytest.approx(math.exp(difference.mean()), rel=1e-5)
    assert result["perplexity_ratio_se"] / result["perplexity_ratio"] == pytest.approx(
        float(difference.std() / BLOCKS**0.5), rel=1e-4
    )


@pytest.mark.parametrize("padded", ["subject", "source"])
def test_embeddings_of_no_token_have_no_say(padded: str, tmp_path: Path, source: Path, other: Path) -> None:
    """Of the distance between two models; each one's perplexity is of all that it may say."""
    from compress.models.load import load_model, save_model

    plain, _ = evaluate(tmp_path / "plain", other, source)
    model = load_model({"subject": other, "source": source}[padded])
    model.resize_token_embeddings(576, mean_resizing=False)
    save_model(model, source, tmp_path / "wide")
    pair = (tmp_path / "wide", source) if padded == "subject" else (other, tmp_path / "wide")
    found, _ = evaluate(tmp_path / "padded", *pair)
    for figure in ("kl", "top1_agreement"):
        assert found["result"][figure] == pytest.approx(plain["result"][figure], rel=1e-5)


def test_a_model_against_itself(tmp_path: Path, source: Path) -> None:
    metrics, _ = evaluate(tmp_path, copy_of(source, tmp_path / "same"), source)
    result = metrics["result"]
    assert (result["kl"], result["top1_agreement"], result["perplexity_ratio"]) == (0, 1, 1)
    assert (result["kl_se"], result["perplexity_ratio_se"]) == (0, 0)
    assert (result["bits_per_byte_ratio"], result["bits_per_byte_ratio_se"]) == (1, 0)
    assert result["perplexity"] == metrics["source"]["perplexity"]


def test_the_source_itself_is_run_once(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.benchmarks import judging

    opened = []
    real = judging.open_scorer
    monkeypatch.setattr(judging, "open_scorer", lambda *a, **k: opened.append(a) or real(*a, **k))
    metrics, _ = evaluate(tmp_path, source, source)
    assert len(opened) == 1
    assert metrics["result"]["kl"] == 0


def test_blocks_are_written_so_that_later_comparisons_can_be_paired(tmp_path: Path, source: Path, other: Path) -> None:
    metrics, out = evaluate(tmp_path, other, source)
    written = json.loads((out / "evaluation.json").read_text())
    blocks = written["blocks"]
    assert written["metrics"] == metrics
    assert blocks["num_blocks"] == len(blocks["nll"]) == len(blocks["kl"]) == BLOCKS
    assert math.exp(sum(blocks["nll"]) / sum(blocks["num_predictions"])) == pytest.approx(
        metrics["result"]["perplexity"]
    )


def test_an_evaluation_goes_on_block_by_block(tmp_path: Path, pico: Callable[[str], Path], other: Path) -> None:
    recall = {"contexts": [128], "mqar_pairs": 2, "samples": 2}
    (tmp_path / "undisturbed").mkdir()
    expected, out = evaluate(tmp_path / "undisturbed", other, pico("llama"), recall=recall)

    def again(reporter: Reporter) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return evaluate(tmp_path, other, pico("llama"), reporter, recall=recall)[0]

    metrics, lines = killed(again, 2, 3, 2)
    assert lines == [
        *(f"done: evaluate block {number}" for number in range(BLOCKS)), "done: evaluate recall text 0",
        "done: evaluate recall text 1",
    ]  # fmt: skip
    assert metrics == expected
    assert (tmp_path / "out/evaluation.json").read_bytes() == (out / "evaluation.json").read_bytes()


def test_a_tokenizer_that_spells_other_text_is_refused(tmp_path: Path, source: Path, other: Path) -> None:
    file = other / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(StageFailed, match="spell the same text"):
        evaluate(tmp_path, other, source)


def test_outputs_that_are_not_finite_are_named(tmp_path: Path, source: Path, other: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][:] = torch.finfo(torch.float32).max  # overflows; what is none is told at reading
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match="not finite"):
        evaluate(tmp_path, other, source)


@pytest.mark.parametrize(
    ("architecture", "figures"),
    [
        (None, {"cosine"}),
        ("BertForMaskedLM", {"perplexity", "perplexity_ratio", "kl", "top1_agreement"}),
        ("BertForSequenceClassification", {"kl", "top1_agreement"}),
        ("BertForTokenClassification", {"kl", "top1_agreement"}),
    ],
)
def test_encoders(tmp_path: Path, architecture: str | None, figures: set[str]) -> None:
    head = {"architecture": architecture} if architecture else {}
    source, other = (make_pico("bert", tmp_path / str(seed), seed=seed, **head) for seed in (0, 1))
    for folder in (source, other):  # the pico tokenizer is a decoder's
        file = folder / "tokenizer_config.json"
        extra = {"cls_token": "<|end|>", "sep_token": "<|end|>", "mask_token": "<|end|>"}
        file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    metrics, _ = evaluate(tmp_path, other, source)
    result = metrics["result"]
    assert {name for name in result if not name.endswith("_se")} == figures | {"eval_tokens"}
    assert result["eval_tokens"] == BLOCKS * LENGTH
    assert all(math.isfinite(value) for value in result.values())
    assert result.get("kl", 1) > 0
    assert abs(result.get("cosine", 0)) < 0.99


def test_options_are_checked_against_the_model(pico: Callable[[str], Path]) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert [p.where for p in Evaluate(sequence_length=300, tokens=8192).check(shape)] == ["sequence_length"]
    assert [p.where for p in Evaluate(sequence_length=200, tokens=300).check(shape)] == ["tokens"]
    assert list(Evaluate().check(shape)) == []
