"""`prune-groups`: the narrower model is the full one with what it lost masked, whatever the family and the group."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from exporting import export
from pydantic import ValidationError
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.models.anatomy import shape_of
from compress.models.axes import indices, sizes_of
from compress.models.load import load_model, save_model
from compress.models.narrow import Kept, explained, narrow, weights_of
from compress.models.origins import Origins
from compress.models.parts import Parts
from compress.stage import StageContext, Target
from compress.stages.prune.groups import PruneGroups
from compress.stages.prune.importance import at_random
from compress.stages.prune.narrowing import num_parameters, rebuilt
from compress.stages.prune.selection import allocated, choose
from compress.stages.prune.widths import counts, layer_widths
from pico import MODEL_TYPES, VOCAB_SIZE, make_hybrid, make_pico

IDS = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
Pico = Callable[[str], Path]
GROUPED = ("llama", "mistral", "qwen2", "qwen3")
KEEP: dict[str, dict[str, int]] = {
    "intermediate": {"intermediate": 40},
    "hidden": {"hidden": 48},
    "attention-heads": {"attention-heads": 2},
    "kv-groups": {"kv-groups": 1},
    "all": {"intermediate": 72, "hidden": 32, "attention-heads": 2},
}


class OverKept(nn.Module):
    """A norm over the channels that stay, given all of them."""

    def __init__(self, norm: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept
        for parameter in norm.parameters():
            parameter.data = parameter.data[kept]
        if isinstance(norm, nn.LayerNorm):
            norm.normalized_shape = (len(kept),)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., self.kept] = self.norm(x[..., self.kept])
        return out


def masked(model: Any, kept: Kept) -> Any:
    """`model` with every weight zero that goes, and its norms over the channels that stay."""
    parts = Parts(model)
    for name, place in explained(parts, "test").items():
        tensor = weights_of(model)[name]
        for dim, axis in enumerate(place.axes):
            index = indices(axis, sizes_of(parts.shape, place.layer), kept.of(place.layer))
            if index is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[index] = False
                tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    if kept.hidden is not None:
        for path, module in [*model.named_modules()]:
            if type(module).__name__.endswith(("Norm", "RMSNorm")) and _width(module) == parts.shape.hidden_size:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, OverKept(module, list(kept.hidden)))
    for layer, own in zip(parts.layers, kept.layers, strict=True):
        mixer = parts.attention(layer)
        if "value_lanes" in own and isinstance(getattr(mixer, "norm", None), nn.Module):  # of each head's values
            mixer.norm = OverKept(cast(nn.Module, mixer.norm), list(own["value_lanes"]))
    return model


def _width(norm: nn.Module) -> int:
    return cast(Tensor, norm.weight).shape[0]


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(IDS)
    return cast(Tensor, result.logits if "logits" in result else result.last_hidden_state)


def cut(model: Any, keep: Mapping[str, int]) -> tuple[Any, Kept]:
    parts = Parts(model)
    widths = [layer_widths(keep, parts.shape, layer) for layer in range(parts.shape.num_hidden_layers)]  # type: ignore
    kept = choose(at_random(parts, 0), parts.shape, widths)
    placed = explained(parts, "test")
    smaller = rebuilt(parts, narrow(parts, placed, kept), widths)
    assert sum(parameter.numel() for parameter in smaller.parameters()) == num_parameters(parts, placed, widths)
    return smaller, kept


@pytest.mark.parametrize("kind", KEEP)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_narrower_model_is_the_masked_one(model_type: str, kind: str, tmp_path: Path) -> None:
    make_pico(model_type, tmp_path)
    keep = KEEP[kind]
    smaller, kept = cut(load_model(tmp_path), keep)
    full = outputs(load_model(tmp_path))
    ours, theirs = outputs(smaller), outputs(masked(load_model(tmp_path), kept))
    if theirs.shape != ours.shape:
        theirs = theirs[..., list(kept.hidden or ())]
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())
    assert ours.shape != full.shape or (ours - full).abs().max() > 0.01





class RandomTokens:
    """Stands for a pipeline's text: the same random token ids each time."""

    def blocks(self, split: str, tokenizer: Any, sequence_length: int, max_tokens: int) -> Any:
        assert split == "train"
        return np.random.default_rng(0).integers(0, VOCAB_SIZE, (max_tokens // sequence_length, sequence_length))


def prune(source: Path, out: Path, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    artifact = Artifact(source, "torch", "source", "key")
    context = StageContext(out, out / "work", {"input": artifact}, RandomTokens(), seed, Target())  # type: ignore
    stage = PruneGroups.model_validate({"tokens": 128, "sequence_length": 32, **options})
    return {**stage.run(context)["result"]}


_FRESH = """
import json, sys
import torch, transformers
for folder in sys.argv[2:]:
    config = json.load(open(f"{folder}/config.json"))
    auto = transformers.AutoModel if config["model_type"].endswith("bert") else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code="auto_map" in config)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        result = model.eval()(torch.load(sys.argv[1]))
    torch.save(result.logits if "logits" in result else result.last_hidden_state, f"{folder}.pt")
assert "compress" not in sys.modules
"""


def reload_elsewhere(*folders: Path) -> None:
    """Load the models in another process, without us, and compare what they say with what they say here."""
    ids = folders[0].parent / "ids.pt"
    torch.save(IDS, ids)
    subprocess.run([sys.executable, "-c", _FRESH, ids, *folders], check=True, cwd=ids.parent)
    for folder in folders:
        torch.testing.assert_close(torch.load(f"{folder}.pt"), outputs(load_model(folder)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_loads_in_a_fresh_process_without_us_and_exports(model_type: str, pico: Pico, tmp_path: Path) -> None:
    for kind, keep in KEEP.items():
        prune(pico(model_type), tmp_path / kind, keep=keep, by="magnitude")
        export(tmp_path / kind, tmp_path / "onnx" / kind, fused=kind != "hidden")  # raises where logits differ
    reload_elsewhere(*(tmp_path / kind for kind in KEEP))


@pytest.mark.parametrize(
    ("model_type", "mixers", "keep"),
    [
        ("llama", ("mamba2", None, "gated-delta", "linear@8"), {"ssm-channels": 8}),
        ("llama", ("mamba2", None, "mamba2", "mamba2"), {"ssm-heads": 2}),
        ("llama", ("mamba2", None, "mamba2", None), {"ssm-heads": 2, "ssm-channels": 12, "attention-heads": 2}),
        ("qwen3", ("gated-delta", None, "linear@8", "gated-linear"), {"kv-groups": 1, "ssm-channels": 8}),
        ("qwen3", ("gated-linear@8", None, "mamba2", "mamba2"), {"hidden": 48, "intermediate": 48, "ssm-heads": 2}),
        ("bert", ("linear", None, "linear", None), {"ssm-channels": 8, "intermediate": 48}),
        ("bert", ("linear", None, "linear", None), {"ssm-heads": 2}),
    ],
)
def test_layers_with_mixers(
    model_type: str, mixers: tuple[str | None, ...], keep: dict[str, int], tmp_path: Path
) -> None:
    source = make_hybrid(model_type, tmp_path / "source", mixers)
    smaller, kept = cut(load_model(source), keep)
    theirs = outputs(masked(load_model(source), kept))
    theirs = theirs[..., list(kept.hidden)] if kept.hidden and model_type == "bert" else theirs
    assert (outputs(smaller) - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())
    prune(source, tmp_path / "out", keep=keep, by="magnitude")
    for fused in (True, False):
        export(tmp_path / "out", tmp_path / f"onnx-{fused}", fused=fused)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_width_a_layer(model_type: str, tmp_path: Path) -> None:
    keeps: list[dict[str, Any]] = [{"intermediate": 0.5}, {"attention-heads": 4}, {"kv-groups": 2}]
    for keep in keeps:
        (tmp_path / next(iter(keep))).mkdir()
        narrower_by_layer(model_type, keep, tmp_path / next(iter(keep)))
    reload_elsewhere(*(tmp_path / kind / "out" for keep in keeps for kind in keep))


def narrower_by_layer(model_type: str, keep: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"n_head": 8, "n_embd": 128} if model_type == "gpt2" else {"num_attention_heads": 8, "hidden_size": 128}
    if model_type in GROUPED:
        sizes |= {"num_key_value_heads": 2 if "attention-heads" in keep else 4, "head_dim": 16}
    source = make_pico(model_type, tmp_path / "source", **sizes)
    parts = Parts(load_model(source))
    scores = at_random(parts, 3)
    for name in ("intermediate", "heads", "groups"):
        scores.layers[0][name].pow_(64)  # type: ignore[index] # so that few of the first layer's are worth keeping
    kept_numbers = counts(keep, parts.shape, 8)
    widths = allocated(scores, parts.shape, kept_numbers, 8)
    kept = choose(scores, parts.shape, widths)
    smaller = rebuilt(parts, narrow(parts, explained(parts, "test"), kept), widths)
    assert len(set(widths)) > 1
    theirs = outputs(masked(load_model(source), kept))
    assert (outputs(smaller) - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())
    save_model(smaller, source, tmp_path / "out")
    torch.testing.assert_close(outputs(load_model(tmp_path / "out")), outputs(smaller), rtol=1e-6, atol=1e-6)
    for fused in (True, False):
        export(tmp_path / "out", tmp_path / f"onnx-{fused}", fused=fused)
    num_groups = len({width.groups for width in widths})
    if model_type != "bert":
        assert (tmp_path / "onnx-True" / "genai_config.json").is_file() == (num_groups == 1)


@pytest.mark.parametrize("by", ["activation", "taylor", "magnitude", "random"])
def test_what_is_written(by: str, pico: Pico, tmp_path: Path) -> None:
    figures = prune(pico("llama"), tmp_path / "out", keep={"intermediate": 0.5, "hidden": 48}, by=by, multiple_of=16)
    assert (figures["intermediate_size"], figures["hidden_size"]) == (48, 48)
    model = load_model(tmp_path / "out")
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    record = json.loads((tmp_path / "out" / "groups.json").read_text())
    assert all(len(layer["intermediate"]) == 48 for layer in record["kept"]["layers"])
    assert record["num_tokens"] == (128 if by in ("activation", "taylor") else 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["origin_channels"] == record["kept"]["hidden"]
    assert config["origin_hidden_size"] == 64
    assert (tmp_path / "out" / "groups.png").is_file()
    assert ("seed" in record) == (by == "random")


def test_pruned_twice_names_the_first_source(pico: Pico, tmp_path: Path) -> None:
    prune(pico("llama"), tmp_path / "one", keep={"hidden": 48, "attention-heads": 2}, by="random")
    prune(tmp_path / "one", tmp_path / "two", keep={"hidden": 32}, by="random", seed=1)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    kept = json.loads((tmp_path / "two" / "groups.json").read_text())["kept"]["hidden"]
    assert two["origin_channels"] == [one["origin_channels"][index] for index in kept]
    assert two["origin_hidden_size"] == 64
    assert two["origin_heads"] == one["origin_heads"]
    assert all(len(heads) == 2 for heads in two["origin_heads"])


@pytest.mark.parametrize(("budget", "limit"), [({"params": 0.75}, 0.75), ({"size_mb": 0.6}, None)])
def test_a_budget_is_met_and_hardly_undercut(
    budget: dict[str, float], limit: float | None, pico: Pico, tmp_path: Path
) -> None:
    full = sum(parameter.numel() for parameter in load_model(pico("llama")).parameters())
    options = {"cut": ["intermediate"], "by": "magnitude", "multiple_of": 4}
    found = prune(pico("llama"), tmp_path / "out", **options, **budget)["parameters"]
    allowed = limit * full if limit else budget["size_mb"] * 1e6 / 4
    assert allowed - 4 * 4 * 3 * 64 <= found <= allowed


@pytest.mark.parametrize("budget", [{"params": 0.85}, {"size_mb": 400.0}])
def test_a_dry_run_does_not_depend_on_the_budget(budget: dict[str, float], tmp_path: Path) -> None:
    source = make_pico("llama", tmp_path / "source", num_hidden_layers=2, vocab_size=8192)  # outweighs the layers
    stage = PruneGroups.model_validate({"cut": ["intermediate"], **budget})
    assert list(stage.check(SHAPES["llama"])) == []
    twin = stage.twin().model_dump(exclude_none=True)
    figures = prune(source, tmp_path / "out", **twin)
    assert figures["intermediate_size"] == 48


def test_origins_that_do_not_fit_count_for_nothing(pico: Pico) -> None:
    config = json.loads((pico("llama") / "config.json").read_text())
    plain = Origins.of(config)
    for wrong in ([1, 2, 3, 4], [[0]] * 4, [[0, 1, 2, "3"]] * 4, "all", [None] * 4):
        assert Origins.of({**config, "origin_heads": wrong, "origin_num_attention_heads": 9}) == plain
    assert Origins.of({**config, "origin_layers": [0, 1]}) == plain
    said = Origins.of({**config, "origin_layers": [0, 2, 4, 5], "origin_num_hidden_layers": 6})
    assert (said.layers, said.num_layers) == ((0, 2, 4, 5), 6)


def test_a_module_behind_the_backbone_is_narrowed_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_pico("bert", tmp_path / "source")
    for name in ("1_Pooling", "2_Dense"):
        (source / name).mkdir()
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    (source / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 64}')
    (source / "2_Dense" / "config.json").write_text('{"in_features": 64, "out_features": 8}')
    dense = torch.randn(8, 64)
    save_file({"linear.weight": dense, "linear.bias": torch.zeros(8)}, source / "2_Dense" / "model.safetensors")
    prune(source, tmp_path / "out", keep={"hidden": 32, "attention-heads": 2}, by="random")
    kept = json.loads((tmp_path / "out" / "groups.json").read_text())["kept"]["hidden"]
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 32
    assert json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text())["in_features"] == 32
    assert torch.equal(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"], dense[:, kept])


SHAPES = {
    "llama": shape_of({
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }),
    "bert": shape_of({
        "model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536,
        "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512,
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "where", "said"),
    [
        ("llama", {"keep": {"attention-heads": 5}}, "keep.attention-heads", "nearest: 3 or 6"),
        ("llama", {"keep": {"attention-heads": 12}}, "keep.attention-heads", "choose 1 to 9"),
        ("llama", {"keep": {"kv-groups": 2, "attention-heads": 8}}, "keep.attention-heads", "at most 6"),
        ("llama", {"keep": {"kv-groups": 4}}, "keep.kv-groups", "choose 1 to 3"),
        ("llama", {"keep": {"hidden": 512}}, "keep.hidden", "nearest: 504 or 513"),
        ("llama", {"keep": {"intermediate": 1000}, "multiple_of": 64}, "keep.intermediate", "nearest: 960 or 1024"),
        ("llama", {"keep": {"ssm-heads": 3}}, "keep.ssm-heads", "put convert-attention before it"),
        ("llama", {"cut": ["intermediate"], "params": 30_000_000}, "params", "the closest is"),
        ("llama", {"cut": ["intermediate"], "size_mb": 1.0}, "size_mb", "the closest is"),
        ("bert", {"keep": {"intermediate": 0.5}, "by": "taylor"}, "by", "use activation"),
        ("bert", {"keep": {"intermediate": 0.5}, "sequence_length": 1024}, "sequence_length", "at most 512"),
        ("llama", {"keep": {"intermediate": 0.5}, "tokens": 100}, "tokens", "at least 256"),
    ],
)
def test_what_check_refuses(family: str, options: dict[str, Any], where: str, said: str) -> None:
    found = list(PruneGroups.model_validate(options).check(SHAPES[family]))
    assert [problem.where for problem in found] == [where], found
    assert said in str(found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give keep, or cut with one budget"),
        ({"cut": ["hidden"]}, "give keep, or cut with one budget"),
        ({"cut": ["hidden"], "params": 0.5, "size_mb": 3.0}, "give keep, or cut with one budget"),
        ({"keep": {"hidden": 0.5}, "params": 0.5}, "remove params"),
        ({"keep": {"neurons": 0.5}}, "neurons"),
        ({"keep": {"hidden": 0}}, "hidden"),
        ({"keep": {}}, "keep"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneGroups.model_validate(options)


@pytest.mark.parametrize(
    ("family", "keep", "widths"),
    [
        ("llama", {"intermediate": 0.75}, (576, 1152, 9, 3)),
        ("llama", {"intermediate": 0.7, "attention-heads": 0.67}, (576, 1088, 6, 3)),
        ("llama", {"hidden": 0.75}, (432, 1536, 9, 3)),
        ("llama", {"kv-groups": 2}, (576, 1536, 6, 2)),
        ("bert", {"attention-heads": 8, "hidden": 0.67}, (256, 1536, 8, 8)),
    ],
)
def test_shares_come_to_widths_that_the_model_can_have(
    family: str, keep: dict[str, Any], widths: tuple[int, ...]
) -> None:
    stage = PruneGroups.model_validate({"keep": keep})
    assert list(stage.check(SHAPES[family])) == []
    shape = stage.shape(SHAPES[family])
    found = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads
    assert found == widths
    assert shape.head_dim == SHAPES[family].head_dim
