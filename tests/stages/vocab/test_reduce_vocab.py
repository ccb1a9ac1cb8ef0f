"""`reduce-vocab` as a stage: its logits are the model's own at the kept tokens, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))

from exporting import export, genai_tokens
from reducing import Text, reduced
from tokenizers_of_kinds import KINDS, TEXTS, VOCAB_SIZE, make_model

from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_model, load_tokenizer
from compress.quant.schemes import SCHEMES
from compress.runtime.session import OnnxModel
from compress.stages.vocab.stage import ReduceVocab
from compress.vocab.rewrite import with_new_ids
from pico import MODEL_TYPES, make_hybrid

KEEP = 480
FRESH = """
import sys, numpy as np, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
text, *jobs = sys.argv[1:]
for folder, auto in zip(jobs[::2], jobs[1::2]):
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = globals()[auto].from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        sizes = {"ids": ids, "parameters": sum(each.numel() for each in model.parameters())}
        np.savez(folder + "/../fresh.npz", output=model(ids)[0], **sizes)
assert "compress" not in sys.modules
"""


def origins(folder: Path) -> list[int]:
    found: list[int] = json.loads((folder / "vocabulary.json").read_text())["origin_tokens"]
    return found


def outputs(folder: Path, ids: Any) -> Any:
    with torch.no_grad():
        return load_model(folder)(torch.as_tensor(ids))[0].numpy()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{model_type: ("byte-level", model_type, {}) for model_type in MODEL_TYPES},
    **{kind: (kind, "llama", {}) for kind in KINDS},
    "untied": ("unigram", "llama", {"tie_word_embeddings": False}),
    "masked": ("wordpiece", "bert", {"architecture": "BertForMaskedLM"}),
    "masked, untied": ("wordpiece", "bert", {"architecture": "BertForMaskedLM", "tie_word_embeddings": False}),
    "encoder": ("wordpiece", "bert", {}),
    "padded": ("byte-level", "llama", {"vocab_size": VOCAB_SIZE + 32}),
}


def make_all(folders: Path) -> dict[str, tuple[Path, dict[str, float]]]:
    """By case a folder with the source, what it was reduced to, what a fresh process says of that, and the figures."""
    found, jobs = {}, []
    for case, (kind, model_type, options) in CASES.items():
        folder = folders / case
        source = make_model(kind, folder / "source", model_type, **options)
        found[case] = folder, reduced(source, folder / "out", keep=620 if kind == "unigram" else KEEP)
        causal = "AutoModel" if model_type == "bert" else "AutoModelForCausalLM"
        jobs += [folder / "out", "AutoModelForMaskedLM" if "architecture" in options else causal]
    text = " ".join(TEXTS[0].split()[:12]) + " Zyzzyva"
    subprocess.run([sys.executable, "-c", FRESH, text, *jobs], check=True)
    return found


def test_a_fresh_process_gets_the_logits_of_the_kept_tokens(tmp_path: Path) -> None:
    for case, (folder, figures) in make_all(tmp_path).items():
        found, kept = np.load(folder / "fresh.npz"), origins(folder / "out")
        expected = outputs(folder / "source", [[kept[id_] for id_ in found["ids"][0]]])
        has_logits = expected.shape[-1] > 64
        assert (found["output"] == (expected[..., kept] if has_logits else expected)).all(), case
        config = json.loads((folder / "out" / "config.json").read_text())
        assert figures["vocab_size"] == config["vocab_size"] == len(kept), case
        assert figures["vocab_size"] == (620 if CASES[case][0] == "unigram" else KEEP), case
        assert figures["parameters"] == found["parameters"], case
        assert (folder / "out" / "LICENSE").is_file(), case


@pytest.mark.parametrize("scheme", [None, "w4-block32"])
def test_the_export_runs_in_onnxruntime_genai(scheme: str | None, tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    generation = {"eos_token_id": [2, 700], "pad_token_id": 3, "suppress_tokens": [1, 5, 699]}
    (source / "generation_config.json").write_text(json.dumps(generation))
    reduced(source, tmp_path / "out", keep=KEEP)
    model, kind = tmp_path / "out", "torch"
    if scheme:
        from exporting import quantised

        model, kind = quantised(model, tmp_path / "codes", SCHEMES[scheme]), "quantized"
    figures = export(model, tmp_path / "onnx", kind)
    assert figures["parity_max_error"] < 1e-3
    kept = origins(tmp_path / "onnx")
    described = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]
    assert described["vocab_size"] == KEEP
    assert [kept[id_] for id_ in described["eos_token_id"]] == [2, 700]
    assert kept[described["pad_token_id"]] == 3
    prompt = load_tokenizer(tmp_path / "onnx")("with statements", return_tensors="np")["input_ids"]
    expected = OnnxModel(tmp_path / "onnx", threads=1).decoder(64).greedy(prompt, 24)[0]
    tokens = genai_tokens(tmp_path / "onnx", prompt, 24)
    assert tokens == expected[: len(tokens)].tolist()
    assert len(tokens) == 24 or tokens[-1] in described["eos_token_id"]
    import onnxruntime_genai as og

    text = "def f(x): return 'Zyzzyva'"
    tokenizer = og.Tokenizer(og.Model(str(tmp_path / "onnx")))
    ids = load_tokenizer(tmp_path / "onnx")(text, add_special_tokens=False)["input_ids"]
    assert [id_ for id_ in tokenizer.encode(text).tolist() if id_ != described["bos_token_id"]] == ids
    assert tokenizer.decode(ids) == text


def test_reducing_twice_keeps_count_of_the_first_source(tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    reduced(source, tmp_path / "once", keep=600)
    reduced(tmp_path / "once", tmp_path / "twice", keep=400)
    once, twice = origins(tmp_path / "once"), origins(tmp_path / "twice")
    assert set(twice) < set(once)
    names = {id_: name for name, id_ in load_tokenizer(source).get_vocab().items()}
    assert load_tokenizer(tmp_path / "twice").get_vocab() == {names[old]: new for new, old in enumerate(twice)}
    weights = [load_model(folder).get_input_embeddings().weight for folder in (source, tmp_path / "twice")]  # type: ignore
    assert torch.equal(weights[1], weights[0][twice])


def test_a_converted_model_is_reduced_like_any_other(tmp_path: Path) -> None:
    source = make_hybrid("llama", tmp_path / "source", ("mamba2", None))
    reduced(source, tmp_path / "out", keep=400)
    kept = origins(tmp_path / "out")
    ids = [[5, 17, 30, 2]]
    expected = outputs(source, [[kept[id_] for id_ in ids[0]]])
    assert (outputs(tmp_path / "out", ids) == expected[..., kept]).all()


def test_the_tokens_of_the_chat_template_stay(tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    texts = ["aaaa bbbb " * 1000]
    reduced(source, tmp_path / "out", texts, coverage=0.5)
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    chat = [{"role": "user", "content": ""}]
    rendered = str(before.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert "assistant" in rendered
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer(rendered)["input_ids"]) for tokenizer in (before, after)]
    assert tokens[0] == tokens[1]
    assert after.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered


def test_coverage_keeps_as_few_tokens_as_reach_it(tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    found = [reduced(source, tmp_path / str(share), coverage=share) for share in (0.8, 0.95)]
    assert found[0]["vocab_size"] < found[1]["vocab_size"] < VOCAB_SIZE
    assert 0.8 <= found[0]["coverage"] < 0.81
    assert 0.95 <= found[1]["coverage"] < 0.96
    assert found[0]["tokens_ratio"] > found[1]["tokens_ratio"] > 1


def test_tokens_ratio_is_that_of_the_text(tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    figures = reduced(source, tmp_path / "out", TEXTS[:10], keep=KEEP)
    lengths = [sum(len(load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]) for text in TEXTS[:10])
               for folder in (tmp_path / "out", source)]  # fmt: skip
    assert figures["tokens_ratio"] == pytest.approx(lengths[0] / lengths[1])


def test_files_that_would_contradict_go(tmp_path: Path) -> None:
    source = make_model("byte-level", tmp_path / "source")
    for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"):
        (source / name).write_text("{}")
    reduced(source, tmp_path / "out", keep=KEEP)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "vocabulary.json", "chat_template.jinja"} <= names
    assert names.isdisjoint({"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"})


def test_every_kind_of_id_in_a_config_is_the_new_one() -> None:
    config = {
        "vocab_size": 9, "eos_token_id": [7, 3], "pad_token_id": -1, "bos_token_id": None, "sep_token_id": 3,
        "text_config": {"decoder_start_token_id": 5}, "suppress_tokens": [3, 4, 5], "bad_words_ids": [[3, 5], [4, 5]],
        "forced_decoder_ids": [[1, 3], [2, 4]], "sequence_bias": [[[3, 7], -1.0], [[4], 2.0]], "num_labels": 3,
        "id2label": {"3": "x"},
    }  # fmt: skip
    assert with_new_ids(config, {3: 0, 5: 1, 7: 2}) == {
        "vocab_size": 9, "eos_token_id": [2, 0], "pad_token_id": -1, "bos_token_id": None, "sep_token_id": 0,
        "text_config": {"decoder_start_token_id": 1}, "suppress_tokens": [0, 1], "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 0]], "sequence_bias": [[[0, 2], -1.0]], "num_labels": 3, "id2label": {"3": "x"},
    }  # fmt: skip


def test_the_ids_of_tokenizer_config_are_the_new_ones(tmp_path: Path) -> None:
    source = make_model("wordpiece", tmp_path / "source", "bert")
    file = source / "tokenizer_config.json"
    tokens = {str(id_): {"content": name, "special": True} for id_, name in enumerate(("[PAD]", "[UNK]"))}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": tokens}))
    reduced(source, tmp_path / "out", keep=KEEP)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    vocabulary = load_tokenizer(tmp_path / "out").get_vocab()
    assert {int(id_): token["content"] for id_, token in written.items()} == {
        vocabulary["[PAD]"]: "[PAD]", vocabulary["[UNK]"]: "[UNK]"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "what"),
    [({}, "either keep or coverage"), ({"keep": 9, "coverage": 0.9}, "either keep or coverage"),
     ({"keep": 0}, "greater than or equal"), ({"coverage": 1.5}, "less than or equal")],
)  # fmt: skip
def test_options_that_are_none(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        ReduceVocab.model_validate(options)


def test_options_are_checked_against_the_model(tmp_path: Path) -> None:
    shape = shape_of(json.loads((make_model("byte-level", tmp_path / "m") / "config.json").read_text()))

    def places(**options: Any) -> list[str]:
        return [problem.where for problem in ReduceVocab.model_validate(options).check(shape)]

    assert places(keep=VOCAB_SIZE) == ["keep"]
    assert places(keep=VOCAB_SIZE + 1) == ["keep"]
    assert places(keep=VOCAB_SIZE - 1) == []
    assert places(coverage=0.9) == []
    big = shape_of({**json.loads((tmp_path / "m" / "config.json").read_text()), "vocab_size": 50_000})
    assert [p.where for p in ReduceVocab(keep=16_000, tokens=15_999).check(big)] == ["tokens"]
    assert ReduceVocab(keep=400).shape(shape).vocab_size == 400
    assert ReduceVocab(coverage=0.9).shape(shape).vocab_size == VOCAB_SIZE / 2


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _of_type(folder: Path, kind: str) -> None:
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text())
    parsed["model"]["type"] = kind
    file.write_text(json.dumps(parsed))


def _ends_with(folder: Path, id_: int) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": id_}))


@pytest.mark.parametrize(
    ("spoil", "options", "texts", "what"),
    [
        (lambda folder: _without(folder, "tokenizer.json"), {"keep": 400}, TEXTS, "no tokenizer.json"),
        (lambda folder: _of_type(folder, "WordLevel"), {"keep": 400}, TEXTS, "of the type WordLevel.*BPE, WordPiece"),
        (lambda folder: _ends_with(folder, 9999), {"keep": 400}, TEXTS, "eos_token_id 9999.*no such token"),
        (lambda folder: None, {"keep": 270}, TEXTS, "270 tokens, and bytes.*at least"),
        (lambda folder: None, {"keep": 500}, TEXTS[:1], "data.train: .*too few to choose 500"),
        (lambda folder: None, {"coverage": 0.9}, ["word " * 500], "data.train: .*too few"),
        (lambda folder: None, {"keep": 400}, ["word"], "data.train"),
    ],
)
def test_what_can_not_be_reduced_is_refused_by_name(
    spoil: Any, options: dict[str, Any], texts: list[str], what: str, tmp_path: Path
) -> None:
    source = make_model("byte-level", tmp_path / "source")
    spoil(source)
    with pytest.raises(StageFailed, match=what):
        reduced(source, tmp_path / "out", texts, **options)
    assert not any((tmp_path / "out").iterdir())


def test_its_twin_reads_little_text_and_the_real_vocabulary_is_judged_beside_it(tmp_path: Path) -> None:
    twin = ReduceVocab(keep=16_000).twin()
    assert (twin.keep, twin.coverage, twin.tokens) == (None, 0.5, 1280)
    source, data = make_model("byte-level", tmp_path / "source"), cast(Any, Text())
    ReduceVocab(keep=400).check_source(source, data)
    with pytest.raises(StageFailed, match=r"270 tokens, and bytes.*at least"):
        ReduceVocab(keep=270).check_source(source, data)
    with pytest.raises(StageFailed, match="too few to choose 500"):
        ReduceVocab(keep=500).check_source(source, cast(Any, Text(TEXTS[:1])))
