"""Each score against a naive reference: plain loops over whole forward passes of a pico model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stages.prune import scores
from pico import VOCAB_SIZE, make_pico

FAMILIES = ("llama", "qwen2", "gpt_neox", "gpt2", "bert")
HEADS = (*FAMILIES, "BertForMaskedLM", "BertForSequenceClassification")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A pico model by its model_type, or a BERT by its architecture."""

    def load(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        if name.startswith("Bert"):
            return load_model(make_pico("bert", folder, architecture=name, num_labels=3))
        return load_model(make_pico(name, folder))

    return load


def batches() -> list[Tensor]:
    """Three blocks of eight tokens, in batches of two and one."""
    ids_BT = torch.randint(0, VOCAB_SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
    return list(ids_BT.split(2))


def silent(steps: int = 1, note: str = "") -> None:
    pass


class Skip(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def without(model: Any, dropped: set[int]) -> Any:
    model = copy.deepcopy(model)
    parts = Parts(model)
    parts.replace_layers([Skip() if i in dropped else layer for i, layer in enumerate(parts.layers)])
    return model


def residual_streams(model: Any, ids_T: Tensor) -> list[Tensor]:
    """x_0 … x_L of one text, as the model itself reports them once its final norm is out of the way."""
    model = copy.deepcopy(model)
    parts = Parts(model)
    if parts.family.final_norm:
        setattr(parts.backbone, parts.family.final_norm, nn.Identity())
    with torch.no_grad():
        states = parts.backbone(ids_T[None], output_hidden_states=True).hidden_states
    return [state[0] for state in states]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", FAMILIES)
def test_block_influence_is_one_minus_the_mean_cosine_of_in_and_out(name: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    total, count = [0.0] * 4, 0
    for ids_T in torch.cat(batches()):
        x = residual_streams(model, ids_T)
        for token in range(len(ids_T)):
            count += 1
            for layer in range(4):
                total[layer] += cosine(x[layer][token], x[layer + 1][token])
    found = scores.block_influence(Parts(model), batches(), silent)
    assert list(found) == [0, 1, 2, 3]
    assert list(found.values()) == pytest.approx([1 - value / count for value in total], abs=1e-5)
    assert max(found.values()) - min(found.values()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [1, 3])
def test_angular_is_the_mean_angle_across_a_run(name: str, length: int, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    total, count = [0.0] * (5 - length), 0
    for ids_T in torch.cat(batches()):
        x = residual_streams(model, ids_T)
        for token in range(len(ids_T)):
            count += 1
            for first in range(5 - length):
                total[first] += math.acos(cosine(x[first][token], x[first + length][token])) / math.pi
    found = scores.angular(Parts(model), batches(), length, silent)
    assert list(found.values()) == pytest.approx([value / count for value in total], abs=1e-5)


def naive_distance(full: Any, pruned: Any) -> float:
    """Mean KL over positions, or mean 1 − cos of the last hidden state where there is no head."""
    total, count = 0.0, 0
    for ids_T in torch.cat(batches()):
        with torch.no_grad():
            a, b = full(ids_T[None]), pruned(ids_T[None])
        has_logits = "logits" in a
        a, b = (out.logits if has_logits else out.last_hidden_state for out in (a, b))
        for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True):
            p, q = x.softmax(0), y.softmax(0)
            total += float((p * (p / q).log()).sum()) if has_logits else 1 - cosine(x, y)
            count += 1
    return total / count


@pytest.mark.parametrize("name", HEADS)
def test_leave_one_out_is_greedy_and_recomputes(name: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    rounds = scores.leave_one_out(Parts(model), batches(), 2, silent)
    gone: set[int] = set()
    for found in rounds:
        remaining = [layer for layer in range(4) if layer not in gone]
        expected = {layer: naive_distance(model, without(model, {*gone, layer})) for layer in remaining}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        gone.add(min(expected, key=expected.__getitem__))
    assert scores.choose("leave-one-out", Parts(model), batches(), 2, silent).dropped == sorted(gone)


def test_scoring_leaves_the_model_as_it_was(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    ids = batches()[0]
    with torch.no_grad():
        before = model(ids).logits
    layers = list(Parts(model).layers)
    scores.leave_one_out(Parts(model), batches(), 1, silent)
    assert list(Parts(model).layers) == layers
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_the_measure_is_named_for_what_the_head_gives(model_of: Callable[[str], Any]) -> None:
    bert = scores.choose("leave-one-out", Parts(model_of("bert")), batches(), 1, silent)
    assert bert.measure.startswith("1 − cos")
    llama = scores.choose("leave-one-out", Parts(model_of("llama")), batches(), 1, silent)
    assert llama.measure.startswith("KL")
    assert llama.num_tokens == 24


@pytest.mark.parametrize("by", ["block-influence", "angular", "leave-one-out"])
def test_a_layer_that_does_nothing_goes_first(by: Any, model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    layer = Parts(model).layers[2]
    with torch.no_grad():
        layer.get_parameter("self_attn.o_proj.weight").zero_()
        layer.get_parameter("mlp.down_proj.weight").zero_()
    choice = scores.choose(by, Parts(model), batches(), 1, silent)
    assert choice.dropped == [2]
    assert choice.rounds[0][2] == pytest.approx(0, abs=1e-3)


def test_angular_drops_neighbours(model_of: Callable[[str], Any]) -> None:
    choice = scores.choose("angular", Parts(model_of("llama")), batches(), 2, silent)
    first = scores.lowest(choice.rounds[0])
    assert choice.dropped == [first, first + 1]


@pytest.mark.parametrize(
    ("num_layers", "num_dropped", "dropped"),
    [(30, 2, [7, 22]), (4, 2, [1, 2]), (6, 3, [1, 2, 4]), (4, 3, [1, 2, 3]), (1, 0, []), (5, 0, [])],
)
def test_uniform_keeps_the_ends_and_even_gaps(num_layers: int, num_dropped: int, dropped: list[int]) -> None:
    assert scores.uniform(num_layers, num_dropped) == dropped


def test_uniform_drops_as_many_as_asked() -> None:
    for num_layers in range(1, 40):
        for num_dropped in range(num_layers):
            assert len(scores.uniform(num_layers, num_dropped)) == num_dropped


def test_random_follows_its_seed() -> None:
    draws = [scores.at_random(30, 4, seed) for seed in range(5)]
    assert draws == [scores.at_random(30, 4, seed) for seed in range(5)]
    assert all(len(set(draw)) == 4 and max(draw) < 30 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 5
