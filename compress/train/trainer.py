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

from compress.data.masking import Masking
from compress.train.attention import Watch, watches
from compress.train.distributed import agreed
from compress.train.losses import IGNORED, common, cross_entropy, forward_kl
from compress.train.objective import Objective, Said, item_logits, taught
from compress.train.resumable import ResumableTrainer, optimizer_with_rates
from compress.train.vocabularies import THEIRS, TwoWays, in_students_tokens

FIGURES = ("loss", "kl", "ce", "top1_agreement")
"""What is evaluated of every sequence, each a mean over its items; `nan` for those a model without logits lacks."""

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Labelled:
    """Padded sequences (num, T), 1 in `mask_NT` where a token is no padding, and each one's class (num,)."""

    ids_NT: Ids
    mask_NT: Ids
    labels_N: Ids

    @property
    def shape(self) -> tuple[int, ...]:
        """(num, T)."""
        return tuple(self.ids_NT.shape)

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, rows: slice) -> Labelled:
        return Labelled(self.ids_NT[rows], self.mask_NT[rows], self.labels_N[rows])


@dataclass(frozen=True)
class Masked:
    """Sequences of text (num, T) that a masked language model reads with some of their tokens hidden.

    Which ones is drawn when they are read, each time anew.
    """

    ids_NT: Ids
    masking: Masking

    @property
    def shape(self) -> tuple[int, ...]:
        """(num, T)."""
        return tuple(self.ids_NT.shape)

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, rows: slice) -> Masked:
        return Masked(self.ids_NT[rows], self.masking)

    def read(self, row: int, seed: tuple[int, ...]) -> dict[str, Tensor]:
        """The columns of one sequence; `labels` are the tokens that it is asked for, and IGNORED elsewhere."""
        ids_T = self.ids_NT[row]
        shown_T, asked_T = self.masking.hide(ids_T, seed)
        labels_T = np.where(asked_T, ids_T, IGNORED)
        columns = {"input_ids": shown_T, "attention_mask": np.ones_like(ids_T), "labels": labels_T}
        return {name: torch.from_numpy(column) for name, column in columns.items()}


Sequences = Ids | Labelled | TwoWays | Masked


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences in the order of `rows`: of text (num, T), whose `labels` are the token after each one, or Labelled.

    pieces_W: of text in two vocabularies, see TwoWays. seed: of what is hidden of Masked ones: by it and the place in
    the order, so that a training that goes on hides what it would have hidden, and another pass hides other tokens.
    """

    def __init__(self, sequences: Sequences, rows: Sequence[int], seed: int = 0) -> None:
        self._sequences = sequences
        self.pieces_W = torch.from_numpy(sequences.pieces_W) if isinstance(sequences, TwoWays) else None
        self._rows = rows
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, sequences = self._rows[index], self._sequences
        if isinstance(sequences, Masked):
            return sequences.read(row, (self._seed, index))
        if isinstance(sequences, Labelled):
            columns = {"input_ids": sequences.ids_NT, "attention_mask": sequences.mask_NT, "labels": sequences.labels_N}
            return {name: torch.as_tensor(column[row]) for name, column in columns.items()}
        theirs: dict[str, Tensor] = {}
        if isinstance(sequences, TwoWays):
            theirs, sequences = sequences.theirs(row), sequences.ids_NT
        ids_T = torch.from_numpy(sequences[row])
        return {"input_ids": ids_T, "labels": torch.cat([ids_T[1:], torch.tensor([IGNORED])]), **theirs}


def _batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows together, without the columns at the end that are padding in all of them."""
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if "attention_mask" in columns:
        length = int(columns["attention_mask"].any(0).nonzero().max()) + 1
        columns = {name: each[:, :length] if each.dim() == 2 else each for name, each in columns.items()}
    return columns


class RecoveryTrainer(ResumableTrainer):
    """Trains a student towards a teacher. The loss is the mean per item of a step, whatever the step is split into."""

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
            model=student, args=args, train_dataset=train, eval_dataset=evaluation, data_collator=_batch,
            compute_metrics=_agreed_summary, optimizer_cls_and_kwargs=optimizer,
        )  # fmt: skip
        self._teacher = teacher
        self._pieces_W = train.pieces_W
        self._objective = objective
        self._watches = watches(student, teacher, objective.weights, objective.layer_map)
        self._options: dict[str, bool] = {"output_hidden_states": objective.weights.hidden > 0}
        if not student.config.is_encoder_decoder and hasattr(student, "generate"):
            self._options["use_cache"] = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one step and the number of items in them, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = sum((batch["labels"] != IGNORED).sum() for batch in batches)
        return batches, self.accelerator.gather(torch.as_tensor(counted, device=device)).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """This part's share of the step's mean per item; DDP averages over processes, which is undone here."""
        student, teacher = self._outputs(model, inputs)
        assert num_items_in_batch is not None
        loss = self._objective.total(student, teacher, inputs) / num_items_in_batch
        loss = loss * self.accelerator.num_processes
        if self.accelerator.num_processes > 1:
            loss = loss + 0 * student.last.sum()  # DDP waits for a gradient of every parameter
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
                self._figures(
                    student.row(i), teacher and teacher.row(i), {name: each[i : i + 1] for name, each in inputs.items()}
                )
                for i in range(len(inputs["labels"]))
            ])  # fmt: skip
        return None, figures_BF, figures_BF

    def _outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Said, Said | None]:
        student = self._said(model, self._watches[0], inputs)
        if self._teacher is None:
            return student, None
        with torch.no_grad(), self.accelerator.autocast():
            if self._pieces_W is None:
                return student, self._said(self._teacher, self._watches[1], inputs)
            theirs = self._said(self._teacher, self._watches[1], {"input_ids": inputs["their_ids"]})
            pieces_W, num_tokens = self._pieces_W.to(theirs.last.device), student.last.shape[-1]
            last = in_students_tokens(theirs.last, inputs["places"], pieces_W, num_tokens)
            return student, Said(last, theirs.has_logits)

    def _said(self, model: nn.Module, watch: Watch, inputs: dict[str, Tensor]) -> Said:
        given = {name: each for name, each in inputs.items() if name not in ("labels", *THEIRS)}
        with watch.noting() as noted:
            output = model(**given, **self._options)
        scores = [noted.scores[layer] for layer in watch.maps]
        attended = [noted.outputs[layer] for layer in watch.outputs]
        return Said(output[0], "logits" in output, output.get("hidden_states") or (), scores, attended)

    def _figures(self, student: Said, teacher: Said | None, batch: dict[str, Tensor]) -> Tensor:
        labels_N = batch["labels"].flatten()
        counted_N = labels_N != IGNORED
        loss = self._objective.total(student, teacher, batch) / counted_N.sum()
        kl = ce = agreement = loss.new_tensor(float("nan"))
        if student.has_logits:
            student_NV = item_logits(student, batch["labels"])[counted_N]
            if student.last.dim() == batch["labels"].dim() + 1:
                ce = cross_entropy(student_NV, labels_N[counted_N]).mean()
            if teacher is not None:
                taught_N = taught(batch)[counted_N]
                teacher_NV = item_logits(teacher, batch["labels"])[counted_N][taught_N]
                student_NV, teacher_NV = common(student_NV[taught_N], teacher_NV)
                kl = forward_kl(student_NV, teacher_NV).mean()
                agreement = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).float().mean()
        return torch.stack([loss, kl, ce, agreement])


def _agreed_summary(prediction: EvalPrediction) -> dict[str, float]:
    """The first process's: what is best, and when to stop, is decided by it, and must be the same in all of them."""
    return agreed(lambda: _summary(prediction))


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
