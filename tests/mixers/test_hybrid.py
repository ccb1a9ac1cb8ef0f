"""Converted models as transformers models: every way in which tokens reach them gives the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from compress.mixers.cache import HybridCache
from compress.mixers.cache_name import CACHE
from compress.mixers.spec import SPECS
from compress.models.convert import to_hybrid
from compress.models.load import load_model
from pico import VOCAB_SIZE, make_hybrid, make_pico

WINDOW = 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {}, "windows": {"mixers": ("gated-linear@6", None)}, "mistral": {}, "qwen2": {}, "qwen3": {},
    "all linear": {"mixers": ("linear", "mamba2", "gated-linear", "gated-delta")},
    "all windows": {"mixers": ("linear@5", "gated-linear@5", "gated-linear@3", "gated-linear")},
    "sliding": {
        "mixers": (None, "gated-linear", None, "mamba2"), "sliding_window": WINDOW,
        "layer_types": ("sliding_attention", "linear_attention", "full_attention", "linear_attention"),
    },
    "sliding qwen2": {
        "mixers": (None, "linear"), "sliding_window": WINDOW,
        "layer_types": ("sliding_attention", "linear_attention"),
    },
}  # fmt: skip
CLOSE = {"rtol": 0.0, "atol": 2e-5}
Build = Callable[[str], Any]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    models: dict[str, Any] = {}

    def model(layout: str) -> Any:
        if layout not in models:
            model_type = next((name for name in ("mistral", "qwen2", "qwen3") if name in layout), "llama")
            folder = make_hybrid(model_type, tmp_path_factory.mktemp("hybrid"), **LAYOUTS[layout])
            models[layout] = load_model(folder)
        return models[layout]

    return model


each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tokens(batch: int = 2, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    result: Tensor = model(ids, **inputs).logits
    return result


@each_layout
@pytest.mark.parametrize("first", [1, 12])
def test_token_by_token_equals_the_whole(build: Build, layout: str, first: int) -> None:
    model, ids, cache = build(layout), tokens(), None
    steps = []
    for part in (ids[:, :first], *ids[:, first:].split(1, 1)):
        with torch.no_grad():
            result = model(part, cache=cache, use_cache=True)
        cache = getattr(result, CACHE)
        steps.append(result.logits)
    whole = logits(model, ids, use_cache=False)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
    assert whole.std() > 0.1
    assert isinstance(cache, HybridCache)
    assert cache.get_seq_length() == ids.shape[1]


@each_layout
def test_generation_with_a_cache_equals_that_without(build: Build, layout: str) -> None:
    model, ids = build(layout), tokens()
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 5},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options = options | {"max_new_tokens": 12, "eos_token_id": None}
            chunk = {} if use_cache else {"prefill_chunk_size": None}
            found.append(model.generate(ids, use_cache=use_cache, **options | chunk))
        assert torch.equal(*found), options
        assert found[0].shape[1] == ids.shape[1] + 12


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names_under_any_transformers(build: Build, name: str) -> None:
    model, ids = build("llama"), tokens()
    for given_to in (model, model.model):  # the head, and the backbone alone
        cache = HybridCache(model.config)
        with torch.no_grad():
            whole, *steps = (given_to(part, **{name: given})[0] for part, given in (
                (ids, None), (ids[:, :12], cache), (ids[:, 12:], cache)
            ))  # fmt: skip
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
        assert cache.get_seq_length() == ids.shape[1]
        with pytest.raises(TypeError, match="two names of one argument"):
            given_to(ids, cache=cache, past_key_values=HybridCache(model.config))


@pytest.mark.parametrize("layout", ["windows", "all linear", "sliding"])
@pytest.mark.parametrize("form", ["whole text", "new tokens", "embeddings"])
def test_generation_goes_on_from_a_cache(build: Build, layout: str, form: str) -> None:
    model, ids, cache = build(layout), tokens(), HybridCache(build(layout).config)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    begun = model.generate(ids, cache=cache, **options)
    text = torch.cat([begun, tokens(length=3, seed=2)], 1)
    seen = cache.get_seq_length()
    assert seen == ids.shape[1] + 5
    given: dict[str, Any] = {"attention_mask": torch.ones_like(text)}
    expected = model.generate(text, use_cache=False, **given, **options)[:, text.shape[1] :]
    if form == "embeddings":
        given["inputs_embeds"] = model.get_input_embeddings()(text)
    else:
        given["inputs"] = text if form == "whole text" else text[:, seen:]
    assert torch.equal(model.generate(cache=cache, **given, **options)[:, -6:], expected)


@each_layout
def test_padding_on_the_left_changes_nothing(build: Build, layout: str) -> None:
    model, ids, short = build(layout), tokens(), 9
    mask = torch.ones_like(ids)
    mask[0, :-short] = 0
    padded = ids.masked_fill(mask == 0, 0)
    alone = ids[:1, -short:]
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:1, -short:], logits(model, alone), **CLOSE)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    found = model.generate(padded, attention_mask=mask, output_logits=True, **options)
    for row, prompt in ((0, alone), (1, ids[1:])):
        own = model.generate(prompt, attention_mask=torch.ones_like(prompt), output_logits=True, **options)
        assert torch.equal(found.sequences[row, -6:], own.sequences[0, -6:])
        for a, b in zip(found.logits, own.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], **CLOSE)


@each_layout
def test_padding_on_the_right_changes_nothing(build: Build, layout: str) -> None:
    model, ids, short = build(layout), tokens(), 9
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:1, :short], logits(model, ids[:1, :short]))
    if "sliding" in layout:
        return  # a window counts the padding between a prompt and what follows it, in every transformers model
    more = tokens(length=3, seed=2)
    cache = HybridCache(model.config)
    logits(model, padded, attention_mask=mask, cache=cache)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    followed = logits(model, more, attention_mask=mask, cache=cache)
    alone = logits(model, torch.cat([ids[:1, :short], more[:1]], 1))[:, short:]
    torch.testing.assert_close(followed[:1], alone, **CLOSE)


@each_layout
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_see_each_other(build: Build, layout: str, use_cache: bool) -> None:
    model, ids, cut = build(layout), tokens(), 8
    positions = torch.cat([torch.arange(cut), torch.arange(ids.shape[1] - cut)])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=use_cache)
    alone = torch.cat([logits(model, ids[:, :cut]), logits(model, ids[:, cut:])], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    assert (alone - logits(model, ids)).abs().max() > 0.01


@each_layout
def test_gradients_with_checkpointing_are_those_without(build: Build, layout: str) -> None:
    model, ids = build(layout), tokens()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(ids, labels=ids).loss.backward()
        model.eval()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
        model.activation_checkpointing_disable()
    plain, checkpointed = found
    for name, gradient in plain.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, checkpointed[name])
        assert gradient.any() or name.endswith("norm.weight"), name


def test_embeddings_and_hidden_states(build: Build) -> None:
    model, ids = build("llama"), tokens()
    embedded = logits(model, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded, logits(model, ids))
    states = model(ids, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 21, 64)] * 5
    torch.testing.assert_close(model.lm_head(states[-1]), logits(model, ids))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=states[0])


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_window_in_every_layer_is_what_mistral_computes(model_type: str, tmp_path: Path) -> None:
    source: Any = load_model(make_pico(model_type, tmp_path))
    model = to_hybrid(source, [None] * 4, ["sliding_attention"] * 4, WINDOW)
    config = {key: value for key, value in source.config.to_dict().items() if key not in ("model_type", "layer_types")}
    mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **config | {"sliding_window": WINDOW}))
    for name, projection in mistral.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")) and model_type == "qwen2":
            projection.bias = torch.nn.Parameter(torch.empty(projection.out_features))
    mistral.load_state_dict(source.state_dict())
    ids = tokens(length=30)
    torch.testing.assert_close(logits(model, ids), logits(mistral.eval(), ids))
    assert (logits(model, ids) - logits(source, ids)).abs().max() > 0.01


def test_the_cache_of_linear_layers_alone_counts_and_does_not_grow(build: Build) -> None:
    model = build("all linear")
    cache = HybridCache(model.config)
    assert cache.get_seq_length() == cache.num_bytes == 0
    sizes = []
    for length in (5, 1, 7):
        logits(model, tokens(length=length), cache=cache)
        sizes.append(cache.num_bytes)
    assert cache.get_seq_length() == 13
    specs = [SPECS[name] for name in LAYOUTS["all linear"]["mixers"]]
    assert set(sizes) == {2 * sum(spec.state_bytes(4, 2, 16, 16) for spec in specs)}  # of two sequences
    cache.reset()
    assert cache.get_seq_length() == cache.num_bytes == 0
    again = logits(model, tokens(length=5), cache=cache)
    torch.testing.assert_close(again, logits(model, tokens(length=5)))


@each_layout
def test_rows_of_a_cache_are_repeated_selected_and_reordered(build: Build, layout: str) -> None:
    model, ids, more = build(layout), tokens(batch=3), tokens(batch=3, length=2, seed=2)
    cache = HybridCache(model.config)
    logits(model, ids, cache=cache)
    cache.batch_repeat_interleave(2)  # rows 0 0 1 1 2 2
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows = torch.tensor([2, 0, 1])
    found = logits(model, more, cache=cache)
    torch.testing.assert_close(found, logits(model, torch.cat([ids[rows], more], 1))[:, -2:], **CLOSE)


def test_what_a_state_cannot_do_is_refused(build: Build) -> None:
    model, ids = build("llama"), tokens()
    cache = getattr(model(ids), CACHE)
    with pytest.raises(ValueError, match="can't forget its last tokens"):
        cache.crop(-1)
    for wrong in (DynamicCache(), StaticCache(model.config, max_cache_len=32)):
        with pytest.raises(TypeError, match=r"must be a HybridCache\(model.config\), or none, not "):
            model(ids, cache=wrong)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 1, 21, 21))
    with pytest.raises(ValueError, match="'static' has no linear layers"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)


def test_without_linear_layers_a_cache_can_be_cropped(tmp_path: Path) -> None:
    model, ids = to_hybrid(load_model(make_pico("llama", tmp_path)), [None] * 4), tokens()
    cache = HybridCache(model.config)
    logits(model, ids, cache=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(logits(model, ids[:, 16:], cache=cache), logits(model, ids)[:, 16:], **CLOSE)
