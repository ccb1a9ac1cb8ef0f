"""The losses on attention against transformers' own maps, and what of two models is compared and what is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parent))

from pico_training import BASE, LENGTH, train

from compress.errors import StageFailed
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.models.parts import Parts
from compress.stage import Reporter
from compress.train.attention import SMALLEST, Watch, map_divergence, watches
from compress.train.engine import recover
from compress.train.losses import IGNORED
from compress.train.objective import Objective, Said, token_weights
from compress.train.options import LossWeights, TrainingOptions
from compress.train.taught import TaughtOptions
from compress.train.teacher import layer_map
from compress.train.trainer import Labelled
from pico import MODEL_TYPES, make_hybrid, make_pico

PADDED = torch.tensor([[1] * 9 + [0] * 3, [1] * 12, [1] * 5 + [0] * 7])
WEIGHTS = PADDED * torch.rand(PADDED.shape, generator=torch.Generator().manual_seed(0))


def weights(**given: float) -> LossWeights:
    return LossWeights.model_validate({"kl": 0.0, **given})


def batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(1, 500, PADDED.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids_BT, "attention_mask": PADDED}


def seen(model: Any, maps: list[int], outputs: list[int]) -> Any:
    """What a Watch notes of the batch."""
    with Watch(model, maps, outputs).noting() as noted:
        model(**batch())
    return noted


def naive_divergence(student_BHTT: Tensor, teacher_BHTT: Tensor) -> float:
    """By the definition: of each token that is no padding, over those that it may see."""
    total = 0.0
    for b, t in (WEIGHTS > 0).nonzero().tolist():
        for q_T, p_T in zip(student_BHTT[b, :, t].tolist(), teacher_BHTT[b, :, t].tolist(), strict=True):
            kl = sum(
                p * (math.log(max(p, SMALLEST)) - math.log(max(q, SMALLEST))) for p, q in zip(p_T, q_T, strict=True)
            )
            total += WEIGHTS[b, t].item() * kl / len(student_BHTT[b])
    return total


@pytest.mark.parametrize(
    ("model_type", "own"), [(each, {}) for each in MODEL_TYPES] + [("mistral", {"sliding_window": 4})], ids=str
)
def test_maps_are_those_of_eager_attention(model_type: str, own: dict[str, Any], tmp_path: Path) -> None:
    models, maps = [], []
    for seed in (0, 1):
        folder = make_pico(model_type, tmp_path / str(seed), seed=seed, num_hidden_layers=2, **own)
        models.append(load_model(folder))
        eager = load_model(folder)
        eager.set_attn_implementation("eager")
        maps.append(eager(**batch(), output_attentions=True).attentions)
    before = models[0](**batch())[0]
    student, teacher = (seen(model, [0, 1], []) for model in models)
    for layer in (0, 1):
        expected = naive_divergence(maps[0][layer], maps[1][layer])
        assert expected > 0.01
        divergence = map_divergence(student.scores[layer], teacher.scores[layer], WEIGHTS)
        assert divergence.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(models[0](**batch())[0], before)
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_gradients_are_those_of_the_naive_form(pico: Callable[[str], Path]) -> None:
    models = [load_model(pico("bert")).requires_grad_() for _ in range(2)]
    models[1].set_attn_implementation("eager")
    with torch.no_grad():
        teacher = load_model(make_like(pico("bert")))
        target = seen(teacher, [2], []).scores[2]
        teacher.set_attn_implementation("eager")
        p_BHTT = teacher(**batch(), output_attentions=True).attentions[2].clamp_min(SMALLEST)
    (0.3 * map_divergence(seen(models[0], [2], []).scores[2], target, WEIGHTS)).backward()
    q_BHTT = models[1](**batch(), output_attentions=True).attentions[2].clamp_min(SMALLEST)
    (0.3 * ((p_BHTT * (p_BHTT.log() - q_BHTT.log())).sum(-1).mean(1) * WEIGHTS).sum()).backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    assert any("layer.2.attention.self.key" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def make_like(folder: Path) -> Path:
    """A model like the one in `folder`, with noise in its weights."""
    from compress.models.load import save_model

    model, out = load_model(folder), folder.parent / f"{folder.name}-noisy"
    if not out.exists():
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        save_model(model, folder, out)
    return out


def test_a_few_sequences_at_a_time_give_the_same(pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.train import attention

    student, teacher = (seen(load_model(each), [1], []).scores[1] for each in (pico("llama"), make_like(pico("llama"))))
    whole = map_divergence(student, teacher, WEIGHTS)
    chunked = attention.chunked_sum
    monkeypatch.setattr(attention, "chunked_sum", lambda *args: chunked(*args, num_values=1))
    assert map_divergence(student, teacher, WEIGHTS).item() == pytest.approx(whole.item(), rel=1e-6)
    rows = [map_divergence(student.row(i), teacher.row(i), WEIGHTS[i : i + 1]).item() for i in range(3)]
    assert sum(rows) == pytest.approx(whole.item(), rel=1e-5)


def test_outputs_are_compared_relatively_to_the_teacher(pico: Callable[[str], Path]) -> None:
    student, teacher = (load_model(each) for each in (pico("gpt2"), make_like(pico("gpt2"))))
    attended = [[seen(model, [], [0, 3]).outputs[layer] for layer in (0, 3)] for model in (student, teacher)]
    labels_BT = torch.where(PADDED.bool(), 1, IGNORED)
    objective = Objective(weights(attention_output=0.7), 1.0, "cosine")
    said = [Said(torch.empty(0), False, attended=each) for each in attended]
    total = objective.total(*said, {"labels": labels_BT})
    expected = 0.0
    for ours, theirs in zip(*attended, strict=True):
        error_BT = (ours - theirs).norm(dim=-1) ** 2 / theirs.norm(dim=-1) ** 2
        expected += 0.7 * error_BT[PADDED.bool()].sum().item() / 2
    assert total.item() == pytest.approx(expected, rel=1e-5)
    noted = []
    block = Parts(student).attention(Parts(student).layers[3])
    block.register_forward_hook(lambda _, __, output: noted.append(output[0]))
    student(**batch())
    assert torch.equal(noted[0], attended[0][1])


@pytest.mark.parametrize(
    "loss", [{"attention_map": 1}, {"attention_output": 1}, {"attention_map": 0.5, "kl": 1}], ids=str
)
def test_it_is_learnt_whatever_a_step_is_split_into(loss: dict[str, float], tmp_path: Path) -> None:
    student, teacher = make_pico("llama", tmp_path / "student", seed=1), make_pico("llama", tmp_path / "teacher")
    options = {"loss": {"kl": 0, **loss}, "eval_steps": 4, "tokens": 4 * 4 * LENGTH}
    plain, outcome = train(student, teacher, tmp_path / "plain", **options)
    assert outcome.best["eval_loss"] < outcome.first["eval_loss"]
    for name, way in {"split": {"gradient_accumulation_steps": 4}, "anew": {"gradient_checkpointing": True}}.items():
        weights, _ = train(student, teacher, tmp_path / name, **options, **way)
        moved = max((weights[key] - plain[key]).abs().max().item() for key in plain)
        assert moved < 0.05 * BASE["learning_rate"], name  # AdamW makes a step of the rounding where gradients are 0


def test_layers_that_are_given_the_same_are_compared(tmp_path: Path) -> None:
    teacher = load_model(make_pico("llama", tmp_path / "teacher", num_hidden_layers=6))
    student = load_model(make_pico("llama", tmp_path / "student", num_hidden_layers=4))
    asked = weights(attention_map=1, attention_output=1)
    pruned = watches(student, teacher, asked, layer_map(4, 6, dropped=(2, 4)))
    assert [watch.maps for watch in pruned] == [watch.outputs for watch in pruned] == [[0, 1, 2, 3], [0, 1, 3, 5]]
    assert [watch.maps for watch in watches(student, teacher, asked, layer_map(4, 6))][1] == [0, 2, 3, 4]
    assert not any(watch.maps or watch.outputs for watch in watches(student, teacher, weights(hidden=1), [(1, 1)]))


def test_layers_with_a_mixer_have_outputs_and_no_map(tmp_path: Path) -> None:
    hybrid = load_model(make_hybrid("llama", tmp_path / "hybrid"))
    teacher = load_model(make_pico("llama", tmp_path / "teacher"))
    pair = watches(hybrid, teacher, weights(attention_map=1, attention_output=1), layer_map(4, 4))
    assert [watch.maps for watch in pair] == [[1], [1]]
    with pair[0].noting() as noted:
        hybrid(**batch(), use_cache=False)
    assert list(noted.scores) == [1]
    assert list(noted.outputs) == [0, 1, 2, 3]


def test_what_has_no_map_to_compare_is_refused(tmp_path: Path) -> None:
    teacher = load_model(make_pico("llama", tmp_path / "teacher"))
    narrow = load_model(make_pico("llama", tmp_path / "narrow", num_attention_heads=2, hidden_size=32))
    mixed = load_model(make_hybrid("llama", tmp_path / "mixed", ["linear", "mamba2"]))
    eager = load_model(tmp_path / "teacher")
    eager.set_attn_implementation("eager")
    for student, loss, message in (
        (narrow, {"attention_map": 1}, r"loss\.attention_map: 4 heads a layer in the teacher, and 2 here"),
        (narrow, {"attention_output": 1}, r"loss\.attention_output: the teacher's layers are 64 wide.*32"),
        (narrow, {"hidden": 1}, r"loss\.hidden: "),
        (mixed, {"attention_map": 1}, "every layer has a mixer"),
        (eager, {"attention_map": 1}, "here it is by eager"),
    ):
        with pytest.raises(StageFailed, match=message):
            watches(student, teacher, weights(**loss), layer_map(4, 4))
    with pytest.raises(StageFailed, match="no layer with softmax attention answers"):
        watches(teacher, mixed, weights(attention_map=1), layer_map(4, 2))
    options = TrainingOptions.model_validate({"loss": {"attention_map": 1}})
    assert [problem.where for problem in options.problems(shape_of(mixed.config.to_dict()))] == ["loss.attention_map"]
    assert not list(options.problems(shape_of(teacher.config.to_dict())))
    taught = TaughtOptions.model_validate({"loss": {"attention_map": 1}, "teacher_model": str(tmp_path / "teacher")})
    assert [each.where for each in taught.problems(shape_of(narrow.config.to_dict()))] == ["loss.attention_map"]


def test_a_label_a_sequence_counts_once_whatever_its_length() -> None:
    labelled = {**batch(), "labels": torch.tensor([1, 0, IGNORED])}
    weights_BT = token_weights(labelled)
    assert weights_BT.sum(1).tolist() == pytest.approx([1, 1, 0])
    assert weights_BT[0, :9].tolist() == pytest.approx([1 / 9] * 9)
    assert weights_BT[0, 9:].tolist() == [0, 0, 0]


def test_a_classifier_learns_padded_sentences_with_labels(tmp_path: Path) -> None:
    folders = [
        make_pico("bert", tmp_path / str(seed), seed=seed, architecture="BertForSequenceClassification", num_labels=3)
        for seed in (0, 1)
    ]
    draw = np.random.default_rng(0)
    ids_NT = draw.integers(1, 500, (20, LENGTH))
    mask_NT = (np.arange(LENGTH) < draw.integers(4, LENGTH, (20, 1))).astype(np.int64)
    sentences = Labelled(ids_NT, mask_NT, draw.integers(0, 3, 20))
    loss = {"kl": 1, "ce": 1, "hidden": 1, "attention_map": 1, "attention_output": 1}
    options = TrainingOptions.model_validate({**BASE, "loss": loss})
    student, teacher = (load_model(folder) for folder in folders)
    outcome = recover(student, teacher, sentences, sentences, options, layer_map(4, 4), tmp_path, 0, Reporter())
    assert outcome.best["eval_loss"] < outcome.first["eval_loss"]
    with torch.no_grad():
        outputs = student(input_ids=torch.from_numpy(ids_NT), attention_mask=torch.from_numpy(mask_NT))
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.from_numpy(sentences.labels_N))
    assert outcome.best["eval_ce"] == pytest.approx(expected.item(), rel=1e-4)
