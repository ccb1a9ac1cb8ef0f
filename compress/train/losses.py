"""Distillation losses, one value per token, and a sum over many tokens that is lean on memory.

N tokens, V vocabulary, B sequences, T positions, D hidden size; p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a position that does not count."""
HiddenDistance = Literal["cosine", "mse"]
PerRow = Callable[..., Tensor]

_NUM_CHUNK_VALUES = 1 << 24  # 64 MB in float32: what one chunk of logits may hold


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(p^{1/T} ‖ q^{1/T}) in nats, (N,). Hinton et al., "Distilling the Knowledge in a Neural Network"."""
    log_q_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)


def skew_kl(student_NV: Tensor, teacher_NV: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ αp + (1−α)q) in nats, (N,), the mixture formed from float32 logarithms. Ko et al., "DistiLLM"."""
    log_q_NV = F.log_softmax(student_NV.float(), dim=-1)
    log_p_NV = F.log_softmax(teacher_NV.float(), dim=-1)
    alpha_ = log_p_NV.new_tensor(alpha)
    log_mixture_NV = torch.logaddexp(log_p_NV + alpha_.log(), log_q_NV + (-alpha_).log1p())
    return F.kl_div(log_mixture_NV, log_p_NV, reduction="none", log_target=True).sum(-1)


def common(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits without the rows that only one vocabulary is padded with: no token of the tokenizer is there."""
    size = min(student_NV.shape[-1], teacher_NV.shape[-1])
    return student_NV[..., :size], teacher_NV[..., :size]


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """−log q(label) in nats, (N,); 0 where the label is IGNORED."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="none", ignore_index=IGNORED)


def hidden_distance(student_BTD: Tensor, teacher_BTD: Tensor, distance: HiddenDistance) -> Tensor:
    """(B, T): 1 − cosine (DistilBERT), or the squared error over the teacher's squared norm (Puzzle)."""
    student_BTD, teacher_BTD = student_BTD.float(), teacher_BTD.float()
    if distance == "cosine":
        return 1 - F.cosine_similarity(student_BTD, teacher_BTD, dim=-1)
    error_BT = (student_BTD - teacher_BTD).square().sum(-1)
    return error_BT / teacher_BTD.square().sum(-1).clamp_min(1e-12)


def chunked_sum(
    per_row: PerRow, learning: Sequence[Tensor], others: Sequence[Tensor], row_values: int,
    num_values: int = _NUM_CHUNK_VALUES,
) -> Tensor:  # fmt: skip
    """`per_row(*learning, *others).sum()` a few rows at a time, differentiable in each of `learning` alone.

    Each chunk's gradient is taken at once, so that beside `learning` and one gradient of its size nothing of the size
    of all rows' softmax is ever held. All tensors have as many rows; `row_values` is how many float32 values one row
    takes to compute, `num_values` about how many a chunk may.
    """
    num_rows = max(1, num_values // row_values)
    total: Tensor = cast(Any, _ChunkedSum).apply(per_row, tuple(others), num_rows, *learning)
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_row: PerRow, others: tuple[Tensor, ...], num_rows: int, *learning: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=learning[0].device)
        gradients = [torch.empty_like(each) for each in learning] if wanted else []
        for start in range(0, len(learning[0]), num_rows):
            rows = slice(start, start + num_rows)
            with torch.set_grad_enabled(wanted):
                chunks = [each[rows].detach().requires_grad_(wanted) for each in learning]
                loss = per_row(*chunks, *(other[rows] for other in others)).sum()
            total += loss.detach()
            if wanted:
                for gradient, chunk in zip(gradients, torch.autograd.grad(loss, chunks), strict=True):
                    gradient[rows] = chunk
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(each * gradients[0] for each in ctx.saved_tensors)
