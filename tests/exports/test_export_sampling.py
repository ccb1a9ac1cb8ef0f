"""How the model's authors have its tokens chosen, and for how many there is room, in what onnxruntime-genai reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import export

from compress.errors import InvalidInput
from compress.exports.onnx.genai import room
from compress.exports.onnx.sampling import search_options
from compress.exports.onnx.stage import ExportOnnx
from compress.models.anatomy import shape_of
from compress.models.sources import parse_source
from compress.stage import INPUT, Given
from pico import make_hybrid, make_pico

GREEDY = {"do_sample": False, "num_beams": 1}
SAMPLED = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "nothing": ({}, GREEDY, []),
    "ids alone": ({"eos_token_id": [1, 2]}, GREEDY, []),
    "as transformers has it": ({"do_sample": True}, SAMPLED, []),
    "null": ({"do_sample": True, "temperature": None, "top_k": None}, SAMPLED, []),
    "a chat model's": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05},
        {**SAMPLED, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}, [],
    ),
    "greedy with what only sampling reads": ({"do_sample": False, "temperature": 0.6, "min_p": 0.1}, GREEDY, []),
    "a word": ({"do_sample": "yes"}, GREEDY, []),
    "whole numbers": ({"do_sample": True, "temperature": 1, "top_p": 1}, SAMPLED, []),
    "all tokens": ({"do_sample": True, "top_k": 0}, {**SAMPLED, "top_k": 0}, []),
    "more than there are": ({"do_sample": True, "top_k": 1000}, {**SAMPLED, "top_k": 512}, []),
    "no n-gram twice": ({"no_repeat_ngram_size": 3}, {**GREEDY, "no_repeat_ngram_size": 3}, []),
    "temperature 0": ({"do_sample": True, "temperature": 0}, GREEDY, ["the likeliest token always"]),
    "top_p 0": ({"do_sample": True, "top_p": 0.0}, GREEDY, ["the likeliest token always"]),
    "numbers that can't be": (
        {"do_sample": True, "temperature": -1, "top_k": -3, "top_p": 1.5, "repetition_penalty": 0},
        SAMPLED,
        ["temperature: -1 can't be, 1.0", "top_k: -3", "top_p: 1.5", "repetition_penalty: 0 can't be, 1.0 is taken"],
    ),
    "no numbers": (
        {"do_sample": True, "temperature": "x", "top_k": 2.5, "top_p": float("nan"), "repetition_penalty": True},
        SAMPLED,
        ["temperature: 'x'", "top_k: 2.5", "top_p: nan", "repetition_penalty: True"],
    ),
    "infinite": ({"do_sample": True, "temperature": float("inf")}, SAMPLED, ["temperature: inf"]),
    "what the runtime can't": (
        {"do_sample": True, "min_p": 0.1, "num_beams": 4, "typical_p": 1.0},
        SAMPLED,
        ["num_beams: 4 is left out", "min_p: 0.1 is left out"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_the_words_of_transformers_become_those_of_the_runtime(case: str) -> None:
    generation, expected, said = TABLE[case]
    options, notes = search_options(generation, 512)
    assert options == expected
    assert len(notes) == len(said)
    assert all(word in note for word, note in zip(said, notes, strict=True)), notes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico("llama", tmp_path_factory.mktemp("source"), num_hidden_layers=1)


def exported(source: Path, generation: object, out: Path) -> dict[str, Any]:
    (source / "generation_config.json").write_text(json.dumps(generation))
    export(source, out)
    config: dict[str, Any] = json.loads((out / "genai_config.json").read_text())
    return config


def draw(folder: Path, num_new: int) -> list[int]:
    """Tokens as the folder alone says them."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=8 + num_new)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.arange(20, 28, dtype=np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize(
    "case", ["a chat model's", "all tokens", "temperature 0", "no n-gram twice", "numbers that can't be"]
)
def test_genai_chooses_so(case: str, source: Path, tmp_path: Path) -> None:
    generation, expected, _ = TABLE[case]
    search = exported(source, {**generation, "eos_token_id": [510, 511]}, tmp_path / "out")["search"]
    assert expected.items() <= search.items()
    several = {tuple(draw(tmp_path / "out", 16)) for _ in range(4)}
    assert (len(several) > 1) == expected["do_sample"]


@pytest.mark.parametrize(
    ("generation", "eos", "pad"),
    [
        ({"eos_token_id": [3, 5]}, [3, 5], 0),
        ({"eos_token_id": [3, 5], "pad_token_id": 7}, [3, 5], 7),
        ({"eos_token_id": [], "pad_token_id": None}, 0, 0),
        ({"eos_token_id": None}, 0, 0),
        ({"eos_token_id": [3, 5], "pad_token_id": -1}, [3, 5], 0),
    ],
)
def test_several_end_tokens_or_none(
    generation: dict[str, Any], eos: object, pad: int, source: Path, tmp_path: Path
) -> None:
    model = exported(source, generation, tmp_path / "out")["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == (eos, pad)
    assert draw(tmp_path / "out", 4)


@pytest.mark.parametrize("text", ["[1]", "{", "null"])
def test_a_generation_config_that_is_none(text: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_pico("llama", tmp_path, num_hidden_layers=1)
    (source / "generation_config.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"a generation_config\.json that is no mapping in JSON"):
        parse_source(str(source))


LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, 16384),
        ({}, {"kv_cache": "int8"}, 65536),
        ({}, {"max_length": 131072}, 131072),
        ({"max_position_embeddings": 8192}, {}, 8192),
        ({"max_position_embeddings": 40}, {}, 40),
        ({"num_hidden_layers": 15}, {}, 17408),
        ({"num_hidden_layers": 4096}, {}, 256),
        ({}, {"fused": False}, None),
    ],
)
def test_there_is_room_for_what_a_gib_of_keys_and_values_holds(
    changes: dict[str, Any], options: dict[str, Any], expected: int | None
) -> None:
    stage, shape = ExportOnnx(**options), shape_of(LLAMA_1B | changes)
    assert list(stage.check(shape)) == []
    assert stage.settled(Given(shape, {INPUT: "torch"})).get("max_length") == expected


def test_a_mixers_state_takes_no_room(tmp_path: Path) -> None:
    softmax, hybrid = (
        shape_of(json.loads((make_hybrid("llama", tmp_path / name, mixers) / "config.json").read_text()))
        for name, mixers in {"softmax": (None, None), "hybrid": ("linear", None)}.items()
    )
    long = [replace(shape, max_position_embeddings=1 << 30) for shape in (softmax, hybrid)]
    assert room(long[1], num_bytes=4) == 2 * room(long[0], num_bytes=4)


@pytest.mark.parametrize(
    ("options", "model_type", "said"),
    [
        ({"max_length": 300}, "llama", "300 tokens, but the model reads at most 256"),
        ({"max_length": 64, "fused": False}, "llama", "runs fused decoders"),
        ({"max_length": 64}, "bert", "runs fused decoders"),
    ],
)
def test_a_length_that_can_not_be(
    options: dict[str, Any], model_type: str, said: str, pico: Callable[[str], Path]
) -> None:
    shape = shape_of(json.loads((pico(model_type) / "config.json").read_text()))
    (problem,) = ExportOnnx(**options).check(shape)
    assert problem.where == "max_length"
    assert said in problem.what


def test_the_room_is_what_the_folder_says(source: Path, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    (source / "generation_config.json").write_text("{}")
    export(source, tmp_path / "out", max_length=24)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert (config["search"]["max_length"], config["model"]["context_length"]) == (24, 256)
    generator = og.Generator(model := og.Model(str(tmp_path / "out")), og.GeneratorParams(model))
    generator.append_tokens(np.arange(20, 28, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) <= 24
    assert len(draw(tmp_path / "out", 60)) > 24, "who gives a length has it"
