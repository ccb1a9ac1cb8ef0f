"""Logits of every token: what speculation judges drafts by, in onnxruntime-genai's own decoding too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from exporting import export, genai_tokens, quantised

from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.exports.onnx.stage import ExportOnnx
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.quant.schemes import SCHEMES
from compress.runtime.session import OnnxModel
from compress.stage import INPUT, Given
from pico import make_hybrid, make_pico

Pico = Callable[[str], Path]
PROMPT = np.tile(np.arange(20, 28, dtype=np.int64), 5)[None]
NUM_NEW = 24


@pytest.fixture(scope="module")
def folders(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pico Llama exported with the last token's logits and with all, and a smaller one, `draft`."""
    made = tmp_path_factory.mktemp("logits")
    found = {name: made / name for name in ("last", "all", "draft")}
    export(pico("llama"), found["last"])
    export(pico("llama"), found["all"], logits="all", chunk_size=16)
    export(make_pico("llama", made / "source", num_hidden_layers=1, seed=1), found["draft"])
    return found


def speculated(folder: Path, **options: Any) -> tuple[list[int], Mapping[str, Any]]:
    """What onnxruntime-genai generates after `PROMPT` by speculation, and its counts."""
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model := og.Model(str(folder)))
    parameters.set_search_options(max_length=PROMPT.shape[1] + NUM_NEW, do_sample=False)
    parameters.set_speculative_options(**options)
    generator = og.Generator(model, parameters)
    generator.append_tokens(PROMPT[0].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0)[PROMPT.shape[1] :]
    return [int(token) for token in tokens], dict(generator.get_speculative_stats())


def test_the_graph_gives_those_of_every_token_and_torchs(pico: Pico, folders: dict[str, Path]) -> None:
    session = onnxruntime.InferenceSession(folders["all"] / "model.onnx", providers=["CPUExecutionProvider"])
    assert {output.name: output.shape for output in session.get_outputs()}["logits"][1] == "sequence_length"
    onnx = OnnxModel(folders["all"], threads=1)
    feeds = onnx.token_feeds(PROMPT, np.ones_like(PROMPT)) | {slot.past: slot.empty(1) for slot in onnx.cache}
    import torch

    with torch.inference_mode():
        model: Any = load_model(pico("llama"))
        expected = model(input_ids=torch.from_numpy(PROMPT)).logits.numpy()
    assert np.abs(onnx.run(feeds)["logits"] - expected).max() < 1e-4
    assert onnx.forward(PROMPT, num_logits=1)[0].shape[1] == 1, "who asks for fewer gets fewer"
    last = OnnxModel(folders["last"], threads=1)
    assert np.array_equal(onnx.decoder(64).greedy(PROMPT, 8), last.decoder(64).greedy(PROMPT, 8))


def test_genai_decodes_by_ngrams(folders: dict[str, Path]) -> None:
    expected = genai_tokens(folders["all"], PROMPT, NUM_NEW)
    assert expected == genai_tokens(folders["last"], PROMPT, NUM_NEW)
    tokens, counts = speculated(folders["all"], ngram_size=2, max_draft_tokens=4)
    assert tokens == expected
    assert counts["draft_tokens_proposed"] > 0
    with pytest.raises(Exception, match="last-token-only"):
        speculated(folders["last"], ngram_size=2, max_draft_tokens=4)


@pytest.mark.parametrize("drafter", ["draft", "last"])
def test_genai_decodes_by_a_draft_model(folders: dict[str, Path], tmp_path: Path, drafter: str) -> None:
    """Drafts of the model itself are all taken: several tokens for each time that it runs."""
    both = tmp_path / "both"
    shutil.copytree(folders["all"], both)
    shutil.copytree(folders[drafter], both / "draft")
    config = json.loads((both / "genai_config.json").read_text())
    draft = json.loads((both / "draft" / "genai_config.json").read_text())["model"]["decoder"]
    config["model"]["draft"] = {**draft, "filename": "draft/model.onnx"}
    (both / "genai_config.json").write_text(json.dumps(config))
    tokens, counts = speculated(both, max_draft_tokens=4)
    assert tokens == genai_tokens(folders["last"], PROMPT, NUM_NEW)
    assert counts["draft_tokens_proposed"] > 0
    if drafter == "last":
        assert counts["draft_tokens_accepted"] == counts["draft_tokens_evaluated"]
        assert counts["target_forward_passes"] < NUM_NEW / 2


def test_with_prompts_in_int8_and_a_cache_in_int8(pico: Pico, tmp_path: Path) -> None:
    quantised(pico("llama"), tmp_path / "q", SCHEMES["w4-block32"])
    options = {"prompt": "int8", "prompt_exceptions": (), "kv_cache": "int8", "logits": "all"}
    data: Any = TextData(DataConfig())
    figures = export(tmp_path / "q", tmp_path / "out", "quantized", data=data, **options)
    assert figures["parity_relative_error"] < 1e-4
    assert figures["logits_mb@256"] == pytest.approx(256 * OnnxModel(tmp_path / "out").forward(PROMPT)[0].nbytes / 40e6)
    tokens, counts = speculated(tmp_path / "out", ngram_size=2, max_draft_tokens=4)
    assert len(tokens) == NUM_NEW
    assert counts["draft_tokens_proposed"] > 0


def test_hybrids_give_them_too(tmp_path: Path) -> None:
    source = make_hybrid("llama", tmp_path / "source", ("gated-delta", None))
    figures = export(source, tmp_path / "out", logits="all", chunk_size=None)
    assert figures["parity_max_error"] < 1e-4
    assert "logits_mb@1024" in figures
    with pytest.raises(Exception, match="hybrid"):
        speculated(tmp_path / "out", ngram_size=2)


def test_where_it_has_no_say_it_is_refused(pico: Pico) -> None:
    llama, bert = (shape_of(json.loads((pico(name) / "config.json").read_text())) for name in ("llama", "bert"))
    for shape, options, where in (
        (llama, {"logits": "all"}, []), (llama, {"fused": False}, []), (bert, {}, []),
        (llama, {"logits": "all", "fused": False}, ["logits"]), (bert, {"logits": "last"}, ["logits"]),
    ):  # fmt: skip
        assert [problem.where for problem in ExportOnnx(**options).check(shape)] == where  # type: ignore[arg-type]
    given = Given(llama, {INPUT: "torch"})
    assert ExportOnnx(logits="all").settled(given)["logits"] == "all"
    assert "logits" not in ExportOnnx(fused=False).settled(given)
