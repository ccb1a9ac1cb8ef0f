"""What a training minimises, of what a student and its teacher say of the same batch.

B sequences, T tokens, V vocabulary or classes. A batch has `input_ids` (B, T) and `labels`: of tokens, (B, T), or of
whole sequences, (B,). What has a label is an item. `attention_mask` (B, T) says which tokens are no padding, where
there is any or where not every token has a label: layers are compared at all of those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from compress.errors import StageFailed
from compress.train.attention import Scores, map_divergence
from compress.train.losses import (
    IGNORED,
    HiddenDistance,
    chunked_sum,
    common,
    cross_entropy,
    forward_kl,
    hidden_distance,
    skew_kl,
)
from compress.train.options import LossWeights
from compress.train.vocabularies import NOWHERE

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Said:
    """What a model says of a batch, as far as the losses ask: `scores` and `attended` of the compared layers, in order.

    last: the logits, (B, T, V) or a classifier's (B, V); of a backbone, its last hidden state.
    """

    last: Tensor
    has_logits: bool
    hidden_states: Sequence[Tensor] = ()
    scores: Sequence[Scores] = ()
    attended: Sequence[Tensor] = ()

    def row(self, index: int) -> Self:
        """Of one sequence, B = 1."""
        rows = slice(index, index + 1)
        hidden_states, attended = [each[rows] for each in self.hidden_states], [each[rows] for each in self.attended]
        scores = [each.row(index) for each in self.scores]
        return type(self)(self.last[rows], self.has_logits, hidden_states, scores, attended)


@dataclass(frozen=True)
class Objective:
    """What is minimised, summed over items."""

    weights: LossWeights
    temperature: float
    hidden_distance: HiddenDistance
    layer_map: Sequence[tuple[int, int]] = ()
    """Pairs of (student, teacher) indices into `hidden_states`, where 0 is the embedding's output."""
    channels: Sequence[int] | None = None
    """Which of the teacher's channels the student's are; None where both have the same."""

    def per_item(self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, taught_N: Tensor) -> Tensor:
        """(N,): the weighted losses on logits; 0 where the label is IGNORED.

        taught_N: where the teacher says something. Elsewhere it counts as sure of the text: KL is cross-entropy then.
        """
        weights, loss_N = self.weights, torch.zeros(len(labels_N), device=student_NV.device)
        both = common(student_NV, teacher_NV)
        if weights.kl:
            loss_N = loss_N + weights.kl * forward_kl(*both, self.temperature)
        if weights.skew_kl:
            loss_N = loss_N + weights.skew_kl * skew_kl(*both)
        if weights.ce or not taught_N.all():
            text_N = cross_entropy(student_NV, labels_N)
            loss_N = torch.where(taught_N, loss_N, (weights.kl + weights.skew_kl) * text_N) + weights.ce * text_N
        return loss_N * (labels_N != IGNORED)

    def total(self, student: Said, teacher: Said | None, batch: Batch) -> Tensor:
        """The sum over all items of one batch (`teacher` is None for `ce` alone)."""
        weights, labels = self.weights, batch["labels"]
        total = torch.zeros((), device=labels.device)
        if weights.kl or weights.skew_kl or weights.ce:
            student_NV = item_logits(student, labels)
            teacher_NV = student_NV.detach() if teacher is None else item_logits(teacher, labels)
            others = teacher_NV, labels.flatten(), taught(batch)
            total = total + chunked_sum(self.per_item, [student_NV], others, student_NV.shape[-1])
        return total if teacher is None else total + self._between_layers(student, teacher, token_weights(batch))

    def _between_layers(self, student: Said, teacher: Said, weights_BT: Tensor) -> Tensor:
        """The weighted losses that compare layers, each the mean over the layers that it compares."""
        total = torch.zeros((), device=weights_BT.device)
        if self.weights.hidden:
            distances_LBT = [
                hidden_distance(student.hidden_states[i], self._ours(teacher.hidden_states[j]), self.hidden_distance)
                for i, j in self.layer_map
            ]
            total = total + self.weights.hidden * (torch.stack(distances_LBT).mean(0) * weights_BT).sum()
        if self.weights.attention_output:
            distances_LBT = [
                hidden_distance(ours, self._ours(theirs), "mse")
                for ours, theirs in zip(student.attended, teacher.attended, strict=True)
            ]
            total = total + self.weights.attention_output * (torch.stack(distances_LBT).mean(0) * weights_BT).sum()
        if self.weights.attention_map:
            pairs = zip(student.scores, teacher.scores, strict=True)
            divergences_L = torch.stack([map_divergence(*pair, weights_BT) for pair in pairs])
            total = total + self.weights.attention_map * divergences_L.mean()
        return total

    def _ours(self, teacher_BTD: Tensor) -> Tensor:
        """Those of the teacher's channels that the student has."""
        return teacher_BTD if self.channels is None else teacher_BTD[..., list(self.channels)]


def taught(batch: Batch) -> Tensor:
    """(N,), one a label: whether the teacher says something there; everywhere, if its vocabulary is the same."""
    if "places" in batch:
        return (batch["places"] != NOWHERE).flatten()
    return torch.ones_like(batch["labels"], dtype=torch.bool).flatten()


def token_weights(batch: Batch) -> Tensor:
    """(B, T): how much a loss on each token counts.

    As an item where each token is one. Otherwise a sequence's tokens share the weight of its items: 1 of a sequence
    with a class, their number of one with hidden tokens.
    """
    is_item = batch["labels"] != IGNORED
    if is_item.dim() == 2 and "attention_mask" not in batch:
        return is_item.float()
    mask_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).float()
    num_items_B = is_item.view(len(is_item), -1).sum(1)
    return mask_BT / mask_BT.sum(1, keepdim=True) * num_items_B[:, None]


def item_logits(said: Said, labels: Tensor) -> Tensor:
    """(N, V) logits, one row a label. Where tokens have labels, a classifier's logits count at every one of them.

    Raises StageFailed where the model has no head, or none for these labels.
    """
    if not said.has_logits:
        raise StageFailed("loss", "this model has no logits", "use loss: {kl: 0, hidden: 1}, or name its head")
    logits = said.last
    if labels.dim() == 2:
        logits = logits if logits.dim() == 3 else logits[:, None].expand(-1, labels.shape[1], -1)
        return logits.flatten(0, 1)
    if logits.dim() == 3:
        raise StageFailed("loss", "sequences have labels, and this model's head is one of tokens", "use a classifier")
    return logits
