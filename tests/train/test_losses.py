"""Each loss against its definition, and the chunked sum's gradient against autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from compress.train.losses import IGNORED, chunked_sum, cross_entropy, forward_kl, hidden_distance, skew_kl

NUM_TOKENS, VOCAB = 7, 11


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(NUM_TOKENS, VOCAB, generator=generator) for _ in range(2))


def probabilities(logits_V: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits_V]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_is_its_definition(logits, temperature):
    student, teacher = logits
    for row, value in enumerate(forward_kl(student, teacher, temperature).tolist()):
        q = probabilities(student[row].tolist(), temperature)
        p = probabilities(teacher[row].tolist(), temperature)
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert value == pytest.approx(expected, rel=1e-5)


def test_skew_kl_is_its_definition(logits):
    student, teacher = logits
    for row, value in enumerate(skew_kl(student, teacher, alpha=0.1).tolist()):
        q, p = probabilities(student[row].tolist()), probabilities(teacher[row].tolist())
        expected = sum(a * math.log(a / (0.1 * a + 0.9 * b)) for a, b in zip(p, q, strict=True))
        assert value == pytest.approx(expected, rel=1e-5)


def test_skew_kl_stays_finite_where_the_student_gives_nothing():
    student, teacher = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert skew_kl(student, teacher).item() == pytest.approx(math.log(10), rel=1e-5)


def test_cross_entropy_leaves_ignored_labels_out(logits):
    student, _ = logits
    labels = torch.tensor([3, IGNORED, 0, 1, 2, 4, 5])
    values = cross_entropy(student, labels)
    assert values[1] == 0
    assert values[0].item() == pytest.approx(-math.log(probabilities(student[0].tolist())[3]), rel=1e-5)


def test_hidden_distances():
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    student = torch.tensor([[[6.0, 8.0], [0.0, 1.0]]])
    assert torch.allclose(hidden_distance(student, teacher, "cosine"), torch.tensor([[0.0, 1.0]]), atol=1e-6)
    assert torch.allclose(hidden_distance(student, teacher, "mse"), torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("loss", [forward_kl, skew_kl])
@pytest.mark.parametrize("num_values", [1, 3 * VOCAB, 1 << 20])
def test_chunked_sum_has_the_naive_value_and_gradient(logits, loss, num_values):
    student, teacher = logits
    naive, chunked = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = loss(naive, teacher).sum()
    value = chunked_sum(loss, [chunked], [teacher], VOCAB, num_values)
    (0.3 * expected).backward()
    (0.3 * value).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(chunked.grad, naive.grad, atol=1e-6)


def test_chunked_sum_without_a_gradient(logits):
    student, teacher = logits
    with torch.no_grad():
        value = chunked_sum(forward_kl, [student], [teacher], VOCAB, 1)
    assert not value.requires_grad
    assert value.item() == pytest.approx(forward_kl(student, teacher).sum().item(), rel=1e-6)


def test_chunked_sum_in_low_precision_computes_in_float32(logits):
    student, teacher = (tensor.bfloat16() for tensor in logits)
    expected = forward_kl(student.float(), teacher.float()).sum().item()
    value = chunked_sum(forward_kl, [student.requires_grad_()], [teacher], VOCAB, 2 * VOCAB)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad.dtype == torch.bfloat16
