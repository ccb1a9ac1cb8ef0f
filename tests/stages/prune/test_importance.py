"""Importance against the formulas written out, one group at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.models.load import load_model
from compress.models.narrow import explained
from compress.models.parts import Parts
from compress.stages.prune import importance
from compress.stages.prune.importance import Importance
from compress.stages.prune.selection import _shared_out, allocated, choose
from compress.stages.prune.widths import Widths, layer_widths
from compress.units import Units
from pico import VOCAB_SIZE, make_hybrid, make_pico

BATCHES = list(torch.randint(0, VOCAB_SIZE, (3, 2, 24), generator=torch.Generator().manual_seed(4)))
HEADS, GROUPS, LANES = 4, 2, 16


def advance(steps: int = 1, note: str = "") -> None:
    pass


def model_parts(folder: Path, **options: Any) -> Parts:
    return Parts(load_model(make_pico("llama", folder, num_hidden_layers=2, **options)))


def seen(parts: Parts, path: str, *, inputs: bool) -> list[Tensor]:
    """What goes into (or comes out of) a module, for each batch, (B, T, X)."""
    found: list[Tensor] = []

    def note(_: Any, given: Any, output: Any) -> None:
        found.append(given[0] if inputs else output)

    hook = parts.backbone.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        for ids in BATCHES:
            parts.backbone(ids)
    hook.remove()
    return found


def score(values: list[Tensor]) -> Tensor:
    """√Σ_sequences (mean_tokens |a|)²."""
    return torch.stack([row.abs().mean(0) ** 2 for batch in values for row in batch]).sum(0).sqrt()


def test_activation_is_minitrons(tmp_path: Path) -> None:
    parts = model_parts(tmp_path)
    found = importance.activation(parts, BATCHES, advance)
    assert found.num_tokens == 3 * 2 * 24
    for layer in range(2):
        own = found.layers[layer]
        down = score(seen(parts, f"layers.{layer}.mlp.down_proj", inputs=True))
        torch.testing.assert_close(own["intermediate"].float(), down)
        out = score(seen(parts, f"layers.{layer}.self_attn.o_proj", inputs=True))
        heads = out.view(HEADS, LANES).norm(dim=1)
        torch.testing.assert_close(own["heads"].float(), heads)
        torch.testing.assert_close(own["groups"].float(), heads.view(GROUPS, 2).norm(dim=1))
    norms = [f"layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
    hidden = sum(score(seen(parts, path, inputs=False)) for path in [*norms, "norm"])
    torch.testing.assert_close(found.hidden.float(), hidden)


def test_taylor_and_magnitude_are_of_all_weights_that_go_together(tmp_path: Path) -> None:
    parts = model_parts(tmp_path)
    placed = explained(parts, "test")
    model: Any = parts.model
    taylor = importance.taylor(parts, placed, BATCHES[:1], advance)
    assert all(parameter.grad is None for parameter in model.parameters())
    magnitude = importance.magnitude(parts, placed)
    model.zero_grad()
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    layer = model.model.layers[1]
    mlp, attention = layer.mlp, layer.self_attn
    for found, of in ((taylor, lambda w: w.grad * w.detach()), (magnitude, lambda w: w.detach() ** 2)):
        neuron = sum(of(m.weight)[5].sum() for m in (mlp.gate_proj, mlp.up_proj)) + of(mlp.down_proj.weight)[:, 5].sum()
        group = sum(of(m.weight)[16:32].sum() for m in (attention.k_proj, attention.v_proj))
        group += of(attention.q_proj.weight)[32:64].sum() + of(attention.o_proj.weight)[:, 32:64].sum()
        head = of(attention.q_proj.weight)[16:32].sum() + of(attention.o_proj.weight)[:, 16:32].sum()
        channel = torch.zeros(())
        for name, weight in model.named_parameters():
            for dim, axis in enumerate(placed[name].axes):
                if axis == (("hidden",),):
                    channel = channel + of(weight).select(dim, 7).sum()
        own = found.layers[1]
        for value, wanted in (
            (own["intermediate"][5], neuron), (own["groups"][1], group), (own["heads"][1], head),
            (found.hidden[7], channel),
        ):  # fmt: skip
            expected = wanted.abs() if found is taylor else wanted.sqrt()
            torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-6)


def test_a_killed_scoring_goes_on_with_the_batches_it_has(tmp_path: Path) -> None:
    parts = model_parts(tmp_path / "model")
    whole = importance.activation(parts, BATCHES, advance)
    units = Units("test", tmp_path / "units")
    importance.activation(parts, BATCHES[:2], advance, units)
    seen: list[Tensor] = []
    hook = parts.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    again = importance.activation(parts, BATCHES, advance, units)
    hook.remove()
    assert len(seen) == 1
    assert torch.equal(again.hidden, whole.hidden)
    assert all(torch.equal(a[d], b[d]) for a, b in zip(again.layers, whole.layers, strict=True) for d in a)


def test_as_many_heads_of_each_group_stay_and_groups_take_theirs_along(tmp_path: Path) -> None:
    shape = model_parts(tmp_path).shape
    scores: Any = {
        "intermediate": torch.arange(96.0), "heads": torch.tensor([4.0, 3.0, 1.0, 2.0]),
        "groups": torch.tensor([5.0, 6.0]), "value_lanes": torch.arange(16.0),
    }  # fmt: skip
    found = Importance(torch.arange(64.0), [scores, scores], "")
    kept = choose(found, shape, [layer_widths({"attention-heads": 2, "hidden": 60}, shape, i) for i in (0, 1)])
    assert kept.layers[0] == {"heads": [0, 3], "groups": [0, 1]}
    assert kept.hidden == list(range(4, 64))
    kept = choose(found, shape, [layer_widths({"kv-groups": 1, "intermediate": 3}, shape, i) for i in (0, 1)])
    assert kept.layers[1] == {"heads": [2, 3], "groups": [1], "intermediate": [93, 94, 95]}


def test_global_allocation_keeps_the_total_and_follows_the_scores(tmp_path: Path) -> None:
    shape = model_parts(tmp_path).shape
    flat, steep = torch.ones(96), torch.cat([torch.full((16,), 10.0), torch.full((80,), 0.01)])
    layers: Any = [
        {"intermediate": each, "heads": torch.ones(4), "groups": torch.ones(2), "value_lanes": torch.ones(16)}
        for each in (flat, steep)
    ]
    widths = allocated(Importance(torch.ones(64), layers, ""), shape, {"intermediate": 48}, 16)
    assert [width.intermediate for width in widths] == [80, 16]
    assert Widths.of(shape, 0).heads == widths[0].heads == 4
    assert _shared_out([[3.0, 1.0], [2.0, 0.5]], 3) == [2, 1]


def test_value_lanes_are_one_ranking_and_heads_are_scored_by_those_that_stay(tmp_path: Path) -> None:
    parts = Parts(load_model(make_hybrid("llama", tmp_path, ("mamba2", "mamba2"))))
    found = importance.activation(parts, BATCHES, advance)
    widths = [layer_widths({"ssm-channels": 5, "ssm-heads": 2}, parts.shape, layer) for layer in (0, 1)]
    kept = choose(found, parts.shape, widths)
    out_HV = found.out_HV[0]
    lanes = sorted(out_HV.sum(0).sort(descending=True).indices[:5].tolist())
    assert kept.layers[0]["value_lanes"] == lanes
    heads = out_HV[:, lanes].sum(1).view(GROUPS, 2).argmax(1)
    assert kept.layers[0]["heads"] == [0 + heads[0].item(), 2 + heads[1].item()]


def test_random_is_by_the_seed(tmp_path: Path) -> None:
    parts = model_parts(tmp_path)
    first, same, other = (importance.at_random(parts, seed) for seed in (1, 1, 2))
    assert torch.equal(first.hidden, same.hidden)
    assert not torch.equal(first.layers[0]["heads"], other.layers[0]["heads"])


def test_a_tensor_that_no_description_explains_is_named(tmp_path: Path) -> None:
    from compress.errors import StageFailed

    parts = model_parts(tmp_path)
    parts.layers[0].mlp.extra = torch.nn.Linear(64, 7)
    with pytest.raises(StageFailed, match=r"2 tensors can't be cut along: model\.layers\.0\.mlp\.extra\.bias"):
        explained(parts, "prune-groups")
    parts = model_parts(tmp_path)
    parts.layers[0].mlp.up_proj = torch.nn.Linear(64, 95)
    with pytest.raises(StageFailed, match=r"has the shape \(95, 64\), where \(96, 64\) is expected"):
        explained(parts, "prune-groups")
