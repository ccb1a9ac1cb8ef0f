"""A converted model's folder: with this package, without it, incomplete, and as a pipeline's model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, InvalidInput
from compress.mixers.hybrid import HybridLlamaConfig, HybridLlamaForCausalLM
from compress.mixers.spec import SPECS
from compress.models.anatomy import HYBRID, shape_of
from compress.models.convert import to_hybrid
from compress.models.load import load_model, load_tokenizer, save_model
from compress.models.parts import Parts
from compress.models.sources import parse_source
from compress.runner.twin import twin_config, write_twin
from pico import VOCAB_SIZE, make_hybrid

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
Hybrids = Callable[[str], Path]


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> Hybrids:
    folders: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = make_hybrid(model_type, tmp_path_factory.mktemp(model_type))
        return folders[model_type]

    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(torch.arange(1, 31)[None]).logits
    return result


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_converted_is_the_model_itself(model_type: str, pico: Hybrids, tmp_path: Path) -> None:
    source = load_model(pico(model_type))
    model = to_hybrid(source, [None] * 4)
    assert torch.equal(logits(model), logits(source))
    save_model(model, pico(model_type), tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(source))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert logits(source).any()  # the hybrid has copies


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_mamba2_starts_as_the_linear_model_that_it_is_made_of(model_type: str, tmp_path: Path) -> None:
    linear = load_model(make_hybrid(model_type, tmp_path, ("linear", None, "linear", None)))
    mamba2 = to_hybrid(linear, [SPECS["mamba2"], None, SPECS["mamba2"], None])
    torch.testing.assert_close(logits(mamba2), logits(linear), rtol=0, atol=1e-4)
    back = to_hybrid(mamba2, [None] * 4)
    assert "linear_attention" not in back.config.layer_types
    assert (logits(back) - logits(linear)).abs().max() > 0.01


def test_what_has_no_hybrid_form_is_refused_by_name(pico: Hybrids) -> None:
    with pytest.raises(InvalidInput, match="GPT2LMHeadModel has no layers with mixers"):
        to_hybrid(load_model(pico("gpt2")), [None] * 4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_fresh_object_has_the_same_logits_and_our_own_code(model_type: str, hybrids: Hybrids, tmp_path: Path) -> None:
    shutil.copytree(hybrids(model_type), tmp_path / "copy")
    (tmp_path / "copy/hybrid.py").write_text("raise RuntimeError('a folder’s code is not run')")
    model = load_model(tmp_path / "copy")
    assert type(model).__module__ == "compress.mixers.hybrid"
    save_model(model, tmp_path / "copy", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    config, given = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "copy"))
    assert config == given
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
    assert len(load_tokenizer(tmp_path / "copy")) == VOCAB_SIZE


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "compress":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, warnings
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
code = sys.modules[type(model).__module__]
ids = torch.arange(1, 31)[None]
found = {"whole": (model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False))}
warnings.simplefilter("error")
for name in ("cache", "past_key_values"):
    caches = [{name: code.HybridCache(model.config)} for _ in range(2)]
    logits = torch.cat([model(part, **caches[0]).logits for part in ids.split(12, 1)], 1)
    found[name] = logits, model.generate(ids, max_new_tokens=5, do_sample=False, **caches[1])
torch.save(found, sys.argv[2])
model.save_pretrained(sys.argv[3])
assert "compress" not in sys.modules
"""


def test_a_python_without_this_package_runs_the_copy_of_its_code(hybrids: Hybrids, tmp_path: Path) -> None:
    folder = hybrids("qwen3")
    command = [sys.executable, "-I", "-c", WITHOUT, str(folder), str(tmp_path / "found.pt"), str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HOME": str(tmp_path / "home")})
    found, model = torch.load(tmp_path / "found.pt"), load_model(folder)
    expected: Any = model.generate(torch.arange(1, 31)[None], max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert found.keys() == {"whole", "cache", "past_key_values"}
    for which, (own_logits, own_tokens) in found.items():
        close = {"rtol": 0.0, "atol": 0.0 if which == "whole" else 2e-5}
        torch.testing.assert_close(own_logits, logits(model), **close)
        assert torch.equal(own_tokens, expected), which
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(model))


def test_weights_that_do_not_fit_are_named(hybrids: Hybrids, tmp_path: Path) -> None:
    shutil.copytree(hybrids("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    name = "model.layers.0.self_attn.conv.weight"
    cut = {other: weight for other, weight in weights.items() if other != name}
    save_file(cut, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=f"missing_keys {name}"):
        load_model(tmp_path / "model")
    more = weights | {"model.layers.1.self_attn.conv.weight": weights[name].clone()}
    save_file(more, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"unexpected_keys model\.layers\.1"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_anatomy_tells_the_mixers_and_counts_their_parameters(
    model_type: str, pico: Hybrids, hybrids: Hybrids
) -> None:
    source, model = load_model(pico(model_type)), load_model(hybrids(model_type))
    shape, before = Parts(model).shape, Parts(source).shape
    assert shape.family is before.family
    assert shape.model_type == HYBRID + model_type
    assert shape.mixers == (SPECS["mamba2"], None, SPECS["gated-delta"], SPECS["linear"])
    assert shape.layer_types == ("linear_attention", "full_attention", "linear_attention", "linear_attention")
    more = sum(parameter.numel() for parameter in model.parameters()) - sum(p.numel() for p in source.parameters())
    assert shape.num_mixer_parameters == shape.num_parameters - before.num_parameters == more
    assert shape.of_layers([1, 3]).mixers == (None, SPECS["linear"])
    source_ = parse_source(str(hybrids(model_type)))
    assert shape_of(source_.config() or {}) == shape
    assert source_.fetch() == hybrids(model_type)


def test_a_config_that_does_not_fit_itself_is_refused(hybrids: Hybrids) -> None:
    config = json.loads((hybrids("llama") / "config.json").read_text())
    with pytest.raises(InvalidInput, match="has 3 mixers for 4 layers"):
        shape_of(config | {"mixers": config["mixers"][:3]})
    with pytest.raises(InvalidInput, match=r"a mixer that can't be read .*'taps'"):
        shape_of(config | {"mixers": [{"type": "linear", "taps": 3}, None, None, None]})
    for wrong in ({"mixers": [None] * 4}, {"layer_types": ["full_attention"] * 4}):
        with pytest.raises(ValueError, match="mixers must name a mixer for each linear_attention"):
            HybridLlamaConfig(**config | wrong)
    with pytest.raises(ValueError, match="sliding_window is not set"):
        HybridLlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"])
    assert HybridLlamaConfig(num_hidden_layers=2).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_twin_has_layers_of_every_kind(model_type: str, tmp_path: Path) -> None:
    kinds = ("linear@64", "linear@64", "linear@64", "linear@64", "linear@64", None, "mamba2", None)
    types = ["linear_attention" if kind else "full_attention" for kind in kinds]
    types[-1] = "sliding_attention"
    origin = make_hybrid(model_type, tmp_path / "origin", kinds, layer_types=types, sliding_window=64, head_dim=64)
    model: Any = load_model(write_twin(origin, tmp_path / "twin"))
    assert type(model) is type(load_model(origin))
    assert model.config.layer_types == ["linear_attention", "full_attention", "linear_attention", "sliding_attention"]
    assert [mixer and mixer["type"] for mixer in model.config.mixers] == ["linear", None, "mamba2", None]
    assert (model.config.sliding_window, model.config.mixers[0]["window"], model.config.head_dim) == (8, 8, 32)
    assert logits(model).isfinite().all()


def test_the_twin_of_more_kinds_than_layers_keeps_all_kinds() -> None:
    mixers = [*(spec.to_json() for spec in SPECS.values()), None, None]
    types = ["linear_attention"] * 4 + ["full_attention"] * 2
    config = {
        "model_type": "hybrid_llama", "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4,
        "vocab_size": 9, "mixers": mixers, "layer_types": types,
    }  # fmt: skip
    twin = twin_config(config)
    assert (twin["num_hidden_layers"], twin["mixers"], twin["layer_types"]) == (5, mixers[:5], types[:5])


def test_a_new_model_starts_where_mixers_start() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 512}
    mixers = [spec.to_json() for spec in SPECS.values()]
    types = ["linear_attention"] * 4
    config = HybridLlamaConfig(num_hidden_layers=4, mixers=mixers, layer_types=types, **sizes)
    model: Any = HybridLlamaForCausalLM(config)
    gated = model.model.layers[1].self_attn
    assert not gated.g_proj.weight.any()
    assert gated.a_proj.bias.any()
    assert gated.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert logits(model).isfinite().all()
