"""Stage 1 of a conversion: each mixer learns, alone, to give what the attention gives in whose place it will be.

All layers at once: one forward pass of the teacher shows every mixer its layer's input and output, and each one's loss
is propagated back as soon as it is known, so that the activations of one layer at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from compress.models.parts import Parts
from compress.stage import Reporter
from compress.train.checkpoints import WEIGHTS, checkpoint_folder
from compress.train.engine import Ids, place, training_order
from compress.train.options import AlignOptions
from compress.train.resumable import ResumableTrainer, optimizer_with_rates, step_arguments, train
from compress.train.trainer import Blocks, Masked

COPIED_RATE = 0.1
"""The learning rate of the projections, which are the attention's own, beside that of what is new."""
_LAST = 0.1
"""The share of the steps, the last ones, whose mean is a layer's loss."""


@dataclass(frozen=True)
class Aligned:
    """What an alignment did: tokens trained on, each layer's loss at the end, Trainer's log of all steps."""

    num_tokens: int
    losses: Mapping[int, float]
    log: Sequence[Mapping[str, float]]


def align(
    mixers: Mapping[int, nn.Module], teacher: PreTrainedModel, train_NT: Ids | Masked, options: AlignOptions,
    work: Path, seed: int, reporter: Reporter,
) -> Aligned:  # fmt: skip
    """Train `mixers`, by the index of their layer, in place: ‖mixer(x) − attention(x)‖² / ‖attention(x)‖² of a batch.

    x is what the teacher's layer gives its attention; a mixer is called as that attention is. train_NT: sequences of
    tokens, with some hidden of a masked language model. work: survives kills; an alignment that was killed goes on from
    there, to the same weights. Raises StageFailed where the loss diverges. RADLADS' step 1, LoLCATs' attention
    transfer.
    """
    arguments = TrainingArguments(
        **step_arguments(options, work, seed),
        max_grad_norm=0.0,  # the trainer clips each layer's own
        adam_beta2=0.95,
        save_steps=-(-options.num_steps // 4),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    order = training_order(len(train_NT), options.num_steps * options.batch_size, seed)
    trainer = AlignTrainer(mixers, teacher, options, arguments, Blocks(train_NT, order, seed))
    place(teacher, trainer.args.device)
    parts = Parts(teacher)
    hooks = [
        parts.attention(parts.layers[index]).register_forward_hook(partial(trainer.learn, index), with_kwargs=True)
        for index in mixers
    ]
    try:
        state = train(trainer, [], "align", work, reporter)
    finally:
        for hook in hooks:
            hook.remove()
    trainer.accelerator.wait_for_everyone()
    load_weights(trainer.mixers, str(checkpoint_folder(work, state.global_step) / WEIGHTS))
    log = [entry for entry in state.log_history if "loss" in entry]
    last = log[-max(1, round(_LAST * len(log))) :]
    losses = {index: float(np.mean([entry[_name(index)] for entry in last])) for index in mixers}
    return Aligned(state.global_step * options.batch_size * train_NT.shape[1], losses, log)


class AlignTrainer(ResumableTrainer):
    """A Trainer of the mixers alone: the teacher's forward pass is its step, and the hooks in it do the learning."""

    def __init__(
        self, mixers: Mapping[int, nn.Module], teacher: PreTrainedModel, options: AlignOptions,
        args: TrainingArguments, blocks: Blocks,
    ) -> None:  # fmt: skip
        self.mixers = nn.ModuleDict({str(index): mixer for index, mixer in mixers.items()}).requires_grad_()
        self._backbone = Parts(teacher).backbone
        self._max_norm = options.max_grad_norm
        self._losses: dict[int, Tensor] = {}
        rates = _rates(mixers, teacher, options.learning_rate)
        optimizer = optimizer_with_rates(args, rates)
        super().__init__(model=self.mixers, args=args, train_dataset=blocks, optimizer_cls_and_kwargs=optimizer)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The mean of the layers' losses, without dropout: what is learnt has none."""
        self.mixers.eval()
        ids_BT = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad(), self.accelerator.autocast():
            self._backbone(ids_BT, use_cache=False)
        return torch.stack(list(self._losses.values())).mean()

    def learn(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the attention of layer `index`: leaves the gradient of its mixer's loss in its mixer."""
        mixer = self.mixers[str(index)]
        attended_BTD = output[0].float()
        energy = self.accelerator.reduce(attended_BTD.square().sum(), "mean")  # of the whole step, not of this part
        with torch.enable_grad():
            loss = (mixer(*args, **kwargs)[0].float() - attended_BTD).square().sum() / energy
        with torch.autocast(loss.device.type, enabled=False):  # the recurrence's gradient is float32, as it is
            torch.autograd.backward(loss)
        for parameter in mixer.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        nn.utils.clip_grad_norm_(mixer.parameters(), self._max_norm)
        self._losses[index] = self.accelerator.reduce(loss.detach(), "mean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures of a step, and each layer's loss."""
        if "loss" in logs:
            logs |= {_name(index): loss.item() for index, loss in self._losses.items()}
        super().log(logs, start_time)


def _rates(
    mixers: Mapping[int, nn.Module], teacher: PreTrainedModel, rate: float
) -> Iterator[tuple[nn.Parameter, float]]:
    """Each parameter's learning rate: a lower one for what the attention has too."""
    parts = Parts(teacher)
    for index, mixer in mixers.items():
        copied = dict(parts.attention(parts.layers[index]).named_parameters())
        for name, parameter in mixer.named_parameters():
            yield parameter, rate * (COPIED_RATE if name in copied else 1.0)


def _name(index: int) -> str:
    return f"loss_{index}"
