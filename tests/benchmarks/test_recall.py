"""MQAR, the needle and perplexity by position: what is asked, what answers are worth, and where it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.artifact import Artifact
from compress.benchmarks import scorers
from compress.benchmarks.evaluate import Evaluate
from compress.benchmarks.haystack import Haystack
from compress.benchmarks.probes import ask, mqar_batch, mqar_probe, needle_probe
from compress.benchmarks.recall import Recall
from compress.benchmarks.recollection import recollect, rows_by_bucket
from compress.benchmarks.text import OneText
from compress.cli.main import app
from compress.errors import InvalidInput, StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_model, load_tokenizer
from compress.stage import StageContext, Target
from pico import VOCAB_SIZE, make_pico

SMALL = Recall(contexts=(128, 192), mqar_pairs=4, samples=3)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pydoc_data.topics as topics

    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics.topics[name] for name in ("assignment", "numbers", "compound")), "utf-8")
    return file


@pytest.fixture(scope="session")
def haystack(pico: Callable[[str], Path], text: Path) -> Haystack:
    return Haystack([text.read_text("utf-8")], load_tokenizer(pico("llama")))


def one_hot(tokens_R: Any) -> np.ndarray:
    return np.eye(VOCAB_SIZE, dtype=np.float32)[np.asarray(tokens_R)] * 50


def copier(ids_T: Any, rows: Any = slice(None)) -> np.ndarray:
    """An ideal induction head: what came after the longest earlier repetition of the row's past."""

    def shared(row: int, earlier: int) -> int:
        steps = (n for n in range(earlier + 1) if ids_T[earlier - n] != ids_T[row - n])
        return next(steps, earlier + 1)

    rows_R = np.arange(len(ids_T))[rows]
    nearest = [max(range(row), key=lambda earlier, row=row: shared(row, earlier), default=0) for row in rows_R]
    return one_hot([ids_T[earlier + 1] for earlier in nearest])


def forgetful(ids_T: Any, rows: Any = slice(None)) -> np.ndarray:
    """Guesses."""
    rows_R = np.arange(len(ids_T))[rows]
    return np.random.default_rng(int(ids_T.sum())).normal(size=(len(rows_R), VOCAB_SIZE)).astype(np.float32)


def test_bare_mqar_repeats_every_key_once_with_its_value_to_be_told() -> None:
    vocabulary = np.arange(100, 200)
    ids_NT, rows_NP, answers_NP = mqar_batch(5, 8, 64, vocabulary, seed=3)
    assert (ids_NT.shape, rows_NP.shape, answers_NP.shape) == ((5, 64), (5, 8), (5, 8))
    assert np.isin(ids_NT, vocabulary).all()
    for ids_T, rows_P, answers_P in zip(ids_NT, rows_NP, answers_NP, strict=True):
        stated = dict(ids_T[:16].reshape(8, 2).tolist())
        assert {ids_T[row]: answer for row, answer in zip(rows_P, answers_P, strict=True)} == stated
        assert np.array_equal(ids_T[rows_P + 1], answers_P)
        assert rows_P.min() >= 16
        for token in [*stated, *stated.values()]:
            assert (ids_T == token).sum() == 2, "noise never repeats a key or a value"
    again = mqar_batch(5, 8, 64, vocabulary, seed=3)
    assert all(np.array_equal(*pair) for pair in zip((ids_NT, rows_NP, answers_NP), again, strict=True))
    assert not np.array_equal(mqar_batch(5, 8, 64, vocabulary, seed=4)[0], ids_NT)


@pytest.mark.parametrize(("pairs", "words"), [(17, 100), (8, 16)])
def test_bare_mqar_that_does_not_fit_is_refused(pairs: int, words: int) -> None:
    with pytest.raises(ValueError, match="pairs need 4 tokens each of 64"):
        mqar_batch(1, pairs, 64, np.arange(words), seed=0)


def test_mqar_states_its_pairs_reads_text_and_asks_for_all_of_them(haystack: Haystack) -> None:
    probe = mqar_probe(haystack, 1, 3, 5, 128)
    lines = haystack.tokenizer.decode(probe.ids_T).split("\n")
    stated, asked = lines[:5], lines[-6:-1]
    assert sorted(stated) == sorted(asked)
    assert len(set(stated)) == 5
    assert len(probe.ids_T) == 128
    assert np.array_equal(probe.ids_T[probe.rows_R + 1], probe.answers_R)
    values = [line.partition(":")[2] for line in asked]
    assert [haystack.tokenizer.decode([answer]) for answer in probe.answers_R] == values
    assert np.array_equal(mqar_probe(haystack, 1, 3, 5, 128).ids_T, probe.ids_T)
    assert not np.array_equal(mqar_probe(haystack, 2, 3, 5, 128).ids_T, probe.ids_T)


def test_the_needle_stands_between_sentences_at_its_depth(haystack: Haystack) -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        probe = needle_probe(haystack, 2, 3, depth, 192)
        shown = haystack.tokenizer.decode(probe.ids_T)
        secret = haystack.tokenizer.decode(probe.answers_R).strip()
        assert secret.isdigit()
        assert len(secret) == 4
        before, fact, after = shown.partition(f" The secret number of Cairo is {secret}.")
        assert fact
        assert before.rstrip().endswith((".", "!", "?")) or after.startswith("\n\n") or not before.strip()
        assert after.endswith(f"Answer: The secret number of Cairo is {secret}")
        assert np.array_equal(probe.ids_T[probe.rows_R + 1], probe.answers_R)
        assert len(probe.ids_T) == 192
        places.append(len(before))
    assert places == sorted(set(places))


def test_a_perfect_copier_remembers_all_and_a_guesser_nothing(haystack: Haystack) -> None:
    blocks_NT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, SMALL.longest + 1))
    found = recollect(copier, forgetful, haystack, blocks_NT, SMALL, lambda steps=1, note="": None)
    own, theirs = found.result(), found.reference()
    tasks = [name for name in SMALL.figures() if name.startswith(("mqar", "needle"))]
    assert all(own[name] == (pytest.approx(0, abs=1e-6) if "logprob" in name else 1) for name in tasks)
    assert own["mqar_chance"] == 0.25
    for length in SMALL.contexts:
        assert theirs[f"needle@{length}"] == 0
        assert theirs[f"mqar@{length}"] < 0.2
        assert 0 < theirs[f"mqar_choice@{length}"] < 0.7
        assert theirs[f"mqar_choice@{length}_se"] > 0


def test_bare_mqar_is_scored_by_the_same_copier() -> None:
    for ids_T, rows_P, answers_P in zip(*mqar_batch(3, 8, 64, np.arange(VOCAB_SIZE), seed=0), strict=True):
        logits_RV = copier(ids_T, rows_P)
        assert np.array_equal(logits_RV.argmax(1), answers_P)


def test_buckets_double_and_end_at_every_context() -> None:
    recall = Recall(contexts=(200, 1024))
    assert recall.edges == (64, 128, 200, 256, 512, 1024)
    rows = rows_by_bucket(recall.edges)
    assert rows[64].tolist() == list(range(64))
    assert rows[128].tolist() == list(range(64, 128))
    assert (rows[1024][0], rows[1024][-1], len(rows[1024])) == (512, 1023, 256)


class WholeText(OneText):
    """Nothing is held out, so there is no overlap to look for."""

    def digest(self, split: str) -> str:
        return "whole"


def run(subject: Path, source: Path, text: Path, out: Path, recall: Recall = SMALL) -> dict[str, Any]:
    out.mkdir()
    inputs = {
        role: Artifact(folder, "torch", "t", role)
        for role, folder in {"input": subject, "source": source}.items()
    }
    data = WholeText(str(text))
    context = StageContext(out, out, inputs, data, seed=0, target=Target(threads=1))
    return dict(Evaluate(sequence_length=32, tokens=96, recall=recall).run(context))


def test_the_stage_measures_what_it_says_beside_the_source(tmp_path: Path, text: Path) -> None:
    import torch

    source, other = (make_pico("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    metrics = run(other, source, text, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    stage = Evaluate(recall=SMALL)
    assert set(stage.produces()) - {"cosine", "cosine_se"} == metrics["result"].keys() - {"eval_tokens", "mqar_chance"}
    assert metrics["source"].keys() == {n for n in metrics["result"] if n[:4] in ("mqar", "need")} | {
        name for name in metrics["result"] if name.startswith(("perplexity", "bits_per_byte")) and "ratio" not in name
    }
    assert written["metrics"] == metrics
    for sums in written["blocks"]["recall"].values():
        assert sums.keys() == set(SMALL.figures())
        assert len(sums["mqar@128"]["sums"]) == SMALL.samples

    blocks = torch.from_numpy(WholeText(str(text)).blocks("eval", load_tokenizer(source), 193, 3 * 193))
    with torch.inference_mode():
        log_p = load_model(other)(blocks[:, :-1]).logits.log_softmax(-1)
    nll_NT = -log_p.gather(2, blocks[:, 1:, None])[..., 0]
    for first, last in ((0, 64), (64, 128), (128, 192)):
        naive = math.exp(nll_NT[:, first:last].mean())
        assert metrics["result"][f"perplexity@{last}"] == pytest.approx(naive, rel=1e-4)


def test_text_that_is_too_short_or_has_too_few_words_is_refused(tmp_path: Path, text: Path, haystack: Haystack) -> None:
    source = make_pico("llama", tmp_path / "source")
    short = tmp_path / "short.txt"
    short.write_text(text.read_text("utf-8")[:900], "utf-8")
    with pytest.raises(StageFailed, match=r"of 193 tokens"):
        run(source, source, short, tmp_path / "a")
    with pytest.raises(StageFailed, match=r"mqar_pairs: 24 lower-case words .* has \d+; ask for fewer"):
        run(source, source, text, tmp_path / "b", Recall(contexts=(128,), mqar_pairs=12, samples=2))
    with pytest.raises(StageFailed, match="tokens of text are wanted"):
        needle_probe(haystack, 0, 1, 0.5, 40)


def test_recall_that_a_model_can_not_do_is_refused(pico: Callable[[str], Path]) -> None:
    llama, bert = (shape_of(json.loads((pico(name) / "config.json").read_text())) for name in ("llama", "bert"))
    assert list(Evaluate(recall=SMALL).check(llama)) == []
    problems = list(Evaluate(recall=Recall(contexts=(128, 4096), mqar_pairs=20)).check(llama))
    assert [problem.where for problem in problems] == ["recall.contexts", "recall.mqar_pairs"]
    assert problems[1].fix.startswith("at most 14")
    (problem,) = Evaluate(recall=SMALL).check(bert)
    assert "bert is an encoder" in problem.what


def test_what_recall_costs_is_in_the_estimate(pico: Callable[[str], Path]) -> None:
    shape = shape_of(json.loads((pico("llama") / "config.json").read_text()))
    assert Evaluate(tokens=512).forward_tokens(shape) == 512
    assert Evaluate(tokens=512, recall=SMALL).forward_tokens(shape) == 512 + 3 * (4 * (128 + 192) + 192)
    twin = Evaluate(recall=Recall(contexts=(8192,))).twin()
    assert twin.forward_tokens(shape) < 2000


def test_rows_of_an_onnx_decoder_read_in_parts_are_those_of_the_whole(
    toy_decoder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_T, rows_R = np.arange(30) % 32, np.array([2, 7, 8, 29])
    score = scorers.open_scorer(toy_decoder("toy"), "causal", threads=1)
    whole = score(ids_T)
    monkeypatch.setattr(scorers, "_ONNX_TOKENS", 8)
    assert np.array_equal(score(ids_T), whole)
    assert np.array_equal(score(ids_T, rows_R), whole[rows_R])


def test_rows_of_a_torch_model_are_those_of_the_whole(pico: Callable[[str], Path]) -> None:
    score = scorers.open_scorer(pico("llama"), "causal", threads=1)
    ids_T, rows_R = np.arange(30), np.array([0, 7, 29])
    np.testing.assert_allclose(score(ids_T, rows_R), score(ids_T)[rows_R], atol=1e-5)
    assert ask(score, needle_like(ids_T, rows_R)).right_R.shape == (3,)


def needle_like(ids_T: Any, rows_R: Any) -> Any:
    from compress.benchmarks.probes import Probe

    return Probe(ids_T, rows_R, np.array([1, 2, 3]))


def test_the_command_line_asks_too(pico: Callable[[str], Path], text: Path) -> None:
    command = ["eval", str(pico("llama")), "--text", str(text), "--tokens", "64", "--sequence-length", "32"]
    with pytest.raises(InvalidInput, match=r"recall .*: 300 tokens, but the model reads at most 256"):
        CliRunner().invoke(app, [*command, "--recall", "300"], catch_exceptions=False)
