"""Teachers: loading them, also in 4 or 8 bits, and which of their layers a shorter student's layers answer to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compress.errors import StageFailed
from compress.models.origins import Origins, places_in
from compress.train.options import HEADLESS_LOSS, TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Options = TypeVar("Options", bound=TrainingOptions)


def load_teacher(folder: Path, bits: int | None = None, *, bf16: bool = False) -> PreTrainedModel:
    """The model in `folder` as it is stored, or its matrices in 4 (NF4) or 8 bits through bitsandbytes.

    bf16: it is only asked where matrix products are in bfloat16, so its matrices are kept in that: half the memory, and
    to the bit what casting them for every product gives.
    """
    from compress.quant.bnb import device, load_in_bits
    from compress.quant.load import load_any

    teacher = load_any(folder, device=device()) if bits is None else load_in_bits(folder, bits)
    if bf16 and bits is None:
        _matrices_in_bf16(teacher)
    return teacher


def _matrices_in_bf16(model: PreTrainedModel) -> None:
    """A head that is tied to the embedding stays: what is looked up is not cast."""
    import torch
    from transformers.pytorch_utils import Conv1D

    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in tables:
            module.to(torch.bfloat16)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises StageFailed where a token of one is not the same of the other: logits can't be compared then."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        token = min(dict(ours.items() ^ theirs.items()), key=lambda token: (len(token), token))
        what = f"its tokenizer is not the student's: {token!r} is {theirs.get(token)} there and {ours.get(token)} here"
        fix = "choose a teacher with the same tokenizer, or none: loss: {kl: 0, ce: 1}"
        raise StageFailed("teacher", what, fix)


def fitting_loss(options: Options, *, has_logits: bool) -> Options:
    """A backbone without a head has no logits to compare: where no loss was asked for, its layers are."""
    if has_logits or not (options.loss.kl or options.loss.skew_kl or options.loss.ce):
        return options
    if "loss" in options.model_fields_set:
        raise StageFailed("loss", "the model is a backbone without logits", "use loss: {kl: 0, hidden: 1}")
    return options.model_copy(update={"loss": HEADLESS_LOSS})


def layer_map(num_student: int, num_teacher: int, dropped: Collection[int] = ()) -> Sequence[tuple[int, int]]:
    """Which teacher's hidden state each student layer's output shall be like, as indices into `hidden_states`.

    Where the student is the teacher without the layers `dropped`, a layer answers to what the next kept layer was
    given in the teacher, so that the layer before a gap learns to bridge it. Otherwise layers answer in proportion.
    """
    kept = [layer for layer in range(num_teacher) if layer not in dropped]
    if len(kept) == num_student:
        return [(i + 1, j) for i, j in enumerate([*kept[1:], num_teacher])]
    return [(i, round(i * num_teacher / num_student)) for i in range(1, num_student + 1)]


def answering_layers(student: PreTrainedModel, teacher: PreTrainedModel | None) -> list[tuple[int, int]]:
    """Which of the teacher's hidden states each of the student's shall be like: see `layer_map`.

    Where both come from one source, as their configs say, a layer answers to the one that it was.
    """
    if teacher is None:
        return []
    ours, theirs = origins_of(student), origins_of(teacher)
    kept = places_in(ours.layers, theirs.layers) if ours.num_layers == theirs.num_layers else None
    num_theirs = len(theirs.layers)
    dropped = set(range(num_theirs)) - set(kept) if kept is not None else ()
    return list(layer_map(len(ours.layers), num_theirs, dropped))


def origins_of(model: PreTrainedModel) -> Origins:
    """What the model's config says of where its parts come from."""
    return Origins.of(model.config.to_dict())
