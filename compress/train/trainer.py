"""`transformers.Trainer` with a teacher: its loss is exact under accumulation and in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments

from compress.errors import StageFailed
from compress.train.losses import (
    IGNORED,
    HiddenDistance,
    chunked_sum,
    cross_entropy,
    forward_kl,
    hidden_distance,
    skew_kl,
)
from compress.train.options import LossWeights
from compress.train.resumable import ResumableTrainer, optimizer_with_rates

FIGURES = ("loss", "kl", "ce", "top1_agreement")
"""What is evaluated of every sequence, each a mean over its tokens; `nan` for those a model without logits lacks."""


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of tokens (num, T) in the order of `rows`; `labels` hold the token after each one."""

    def __init__(self, ids_NT: np.ndarray[Any, np.dtype[np.int64]], rows: Sequence[int]) -> None:
        self._ids_NT = ids_NT
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = torch.from_numpy(self._ids_NT[self._rows[index]])
        labels_T = torch.cat([ids_T[1:], torch.tensor([IGNORED])])
        return {"input_ids": ids_T, "labels": labels_T}


@dataclass(frozen=True)
class Objective:
    """What is minimised, summed over tokens."""

    weights: LossWeights
    temperature: float
    hidden_distance: HiddenDistance
    layer_map: Sequence[tuple[int, int]] = ()
    """Pairs of (student, teacher) indices into `hidden_states`, where 0 is the embedding's output."""

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> Tensor:
        """(N,): the weighted losses on logits; 0 where the label is IGNORED."""
        loss_N = torch.zeros(len(labels_N), device=student_NV.device)
        if self.weights.kl:
            loss_N = loss_N + self.weights.kl * forward_kl(student_NV, teacher_NV, self.temperature)
        if self.weights.skew_kl:
            loss_N = loss_N + self.weights.skew_kl * skew_kl(student_NV, teacher_NV)
        if self.weights.ce:
            loss_N = loss_N + self.weights.ce * cross_entropy(student_NV, labels_N)
        return loss_N * (labels_N != IGNORED)

    def total(self, student: Any, teacher: Any, labels_BT: Tensor) -> Tensor:
        """The sum over all tokens of one batch, given both models' outputs (`teacher` is None for `ce` alone)."""
        total = torch.zeros((), device=labels_BT.device)
        if self.weights.kl or self.weights.skew_kl or self.weights.ce:
            student_NV = token_logits(student, labels_BT)
            teacher_NV = student_NV.detach() if teacher is None else token_logits(teacher, labels_BT)
            total = total + chunked_sum(self.per_token, student_NV, teacher_NV, labels_BT.flatten())
        if self.weights.hidden:
            counted_BT = labels_BT != IGNORED
            distances_LBT = [
                hidden_distance(student.hidden_states[i], teacher.hidden_states[j], self.hidden_distance)
                for i, j in self.layer_map
            ]
            total = total + self.weights.hidden * (torch.stack(distances_LBT).mean(0) * counted_BT).sum()
        return total


class RecoveryTrainer(ResumableTrainer):
    """Trains a student towards a teacher. The loss is the mean per token of a step, whatever the step is split into."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective,
        args: TrainingArguments, train: Blocks, evaluation: Blocks, rates: Mapping[str, float],
    ) -> None:  # fmt: skip
        optimizer = None
        if rates:
            rated = ((each, rates.get(name, args.learning_rate)) for name, each in student.named_parameters())
            optimizer = optimizer_with_rates(args, rated)
        super().__init__(
            model=student, args=args, train_dataset=train, eval_dataset=evaluation, compute_metrics=_summary,
            optimizer_cls_and_kwargs=optimizer,
        )  # fmt: skip
        self._teacher = teacher
        self._objective = objective
        self._options: dict[str, bool] = {"output_hidden_states": objective.weights.hidden > 0}
        if not student.config.is_encoder_decoder and hasattr(student, "generate"):
            self._options["use_cache"] = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one step and the number of tokens in them, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = sum((batch["labels"] != IGNORED).sum() for batch in batches)
        return batches, self.accelerator.gather(torch.as_tensor(counted, device=device)).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """This part's share of the step's mean per token; DDP averages over processes, which is undone here."""
        student, teacher = self._outputs(model, inputs)
        assert num_items_in_batch is not None
        loss = self._objective.total(student, teacher, inputs["labels"]) / num_items_in_batch
        loss = loss * self.accelerator.num_processes
        return (loss, student) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:  # fmt: skip
        """FIGURES of each sequence, (B, 4), where Trainer expects logits and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            student, teacher = self._outputs(model, inputs)
            figures_BF = torch.stack([
                self._figures(_row(student, i), _row(teacher, i), labels_1T)
                for i, labels_1T in enumerate(inputs["labels"][:, None])
            ])  # fmt: skip
        return None, figures_BF, figures_BF

    def _outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
        student = model(input_ids=inputs["input_ids"], **self._options)
        if self._teacher is None:
            return student, None
        with torch.no_grad(), self.accelerator.autocast():
            return student, self._teacher(input_ids=inputs["input_ids"], **self._options)

    def _figures(self, student: Any, teacher: Any, labels_1T: Tensor) -> Tensor:
        counted_N = labels_1T.flatten() != IGNORED
        loss = self._objective.total(student, teacher, labels_1T) / counted_N.sum()
        kl = ce = agreement = loss.new_tensor(float("nan"))
        if "logits" in student:
            student_NV = token_logits(student, labels_1T)[counted_N]
            if student.logits.dim() == 3:
                ce = cross_entropy(student_NV, labels_1T.flatten()[counted_N]).mean()
            if teacher is not None:
                teacher_NV = token_logits(teacher, labels_1T)[counted_N]
                kl = forward_kl(student_NV, teacher_NV).mean()
                agreement = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).float().mean()
        return torch.stack([loss, kl, ce, agreement])


def token_logits(output: Any, labels_BT: Tensor) -> Tensor:
    """(B·T, V) logits. A classifier's (B, V) count at every token of their sequence.

    Raises StageFailed where the model has no head.
    """
    if "logits" not in output:
        raise StageFailed("loss", "this model has no logits", "use loss: {kl: 0, hidden: 1}, or name its head")
    logits: Tensor = output.logits
    if logits.dim() == 2:
        logits = logits[:, None].expand(-1, labels_BT.shape[1], -1)
    return logits.flatten(0, 1)


def _row(output: Any, index: int) -> Any:
    """One sequence of a batch of outputs."""
    if output is None:
        return None
    part = type(output)()
    for name in ("logits", "last_hidden_state"):
        if output.get(name) is not None:
            part[name] = output[name][index : index + 1]
    if output.get("hidden_states") is not None:
        part["hidden_states"] = tuple(hidden[index : index + 1] for hidden in output["hidden_states"])
    return part


def _summary(prediction: EvalPrediction) -> dict[str, float]:
    """Mean and standard error over sequences of each of FIGURES that is a number."""
    figures_NF = np.asarray(prediction.predictions, dtype=np.float64)
    summary = {}
    for name, values_N in zip(FIGURES, figures_NF.T, strict=True):
        if name == "loss" or not np.isnan(values_N).all():
            summary[name] = float(values_N.mean())
            spread = values_N.std(ddof=1) if len(values_N) > 1 else float("nan")
            summary[f"{name}_se"] = float(spread / np.sqrt(len(values_N)))
    return summary
