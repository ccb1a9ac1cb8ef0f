"""What the attention of a model's layers computes during a forward pass, and how far a student's is from a teacher's.

B sequences, T tokens, H query heads, G key heads, D features of a head. Queries and keys are noted where transformers
hands them to SDPA, after norms and rotation: the model itself goes on as always, and probabilities are formed of one
layer and a few sequences at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import StageFailed
from compress.models.origins import answering_channels, answering_heads
from compress.models.parts import Parts
from compress.train.losses import chunked_sum
from compress.train.options import LossWeights
from compress.train.teacher import origins_of

SMALLEST = 1e-8
"""Probabilities below it count as it in the divergence, on both sides."""
_SDPA = "sdpa"

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Scores:
    """What a layer's attention probabilities are made of, before dropout.

    visible: true where a query may see a key, (B or 1, 1, T, T); None where it sees all of them or, if `causal`, all up
    to its own.
    """

    query_BHTD: Tensor
    key_BGTD: Tensor
    scaling: float
    visible: Tensor | None
    causal: bool

    def row(self, index: int) -> Self:
        """One sequence's, B = 1."""
        rows = slice(index, index + 1)
        visible = None if self.visible is None else self.mask()[rows]
        return type(self)(self.query_BHTD[rows], self.key_BGTD[rows], self.scaling, visible, self.causal)

    def of(self, heads: Sequence[int] | None) -> Self:
        """Those of some query heads, with keys of their own; of all where they are None, or all of them."""
        num_heads = self.query_BHTD.shape[1]
        if heads is None or list(heads) == list(range(num_heads)):
            return self
        keys_BHTD = self.key_BGTD.repeat_interleave(num_heads // self.key_BGTD.shape[1], 1)
        return replace(self, query_BHTD=self.query_BHTD[:, list(heads)], key_BGTD=keys_BHTD[:, list(heads)])

    def mask(self) -> Tensor:
        """`visible` of every sequence, spelt out: (B, 1, T, T)."""
        batch, _, length, _ = self.query_BHTD.shape
        visible = self.visible
        if visible is None:
            visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query_BHTD.device)
            visible = visible.tril() if self.causal else visible
        return visible.expand(batch, -1, -1, -1)


@dataclass(frozen=True)
class Noted:
    """What a Watch saw, by layer: the makings of probabilities, and the block's output (B, T, hidden)."""

    scores: dict[int, Scores] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Watch:
    """Notes the scores of the layers `maps` and the outputs of the attention blocks of the layers `outputs`.

    heads: by layer, which of its query heads are noted; all where a layer is not named.
    """

    def __init__(
        self, model: nn.Module, maps: Sequence[int], outputs: Sequence[int],
        heads: Mapping[int, Sequence[int] | None] | None = None,
    ) -> None:  # fmt: skip
        parts = Parts(model)
        self.maps, self.outputs, self._heads = maps, outputs, heads or {}
        self._blocks = {layer: parts.attention(parts.layers[layer]) for layer in {*maps, *outputs}}
        self._layer_of = {module: layer for layer in maps for module in self._blocks[layer].modules()}

    @contextmanager
    def noting(self) -> Iterator[Noted]:
        """Within it a forward pass is noted; not so what checkpointing computes anew outside."""
        noted = Noted()

        def note_output(layer: int, _: nn.Module, __: Any, output: Any) -> None:
            noted.outputs[layer] = output[0]

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, None]:
            if module in self._layer_of:
                scaling, causal = options.get("scaling"), options.get("is_causal")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                causal = getattr(module, "is_causal", True) if causal is None else causal
                layer = self._layer_of[module]
                noted.scores[layer] = Scores(query, key, scaling, attention_mask, causal).of(self._heads.get(layer))
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

        with ExitStack() as stack:
            for layer in self.outputs:
                stack.callback(self._blocks[layer].register_forward_hook(partial(note_output, layer)).remove)
            if self.maps:
                ALL_ATTENTION_FUNCTIONS[_SDPA] = attend  # transformers' own way to override, for as long as this takes
                stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, _SDPA)
            yield noted


def watches(
    student: PreTrainedModel, teacher: PreTrainedModel | None, weights: LossWeights, layer_map: Pairs
) -> tuple[Watch, ...]:
    """Of the student and the teacher, for what `weights` ask of their attention; layers in the same order.

    Pairs of layers are those whose inputs `layer_map` compares, and the first ones: so each layer of a pruned student
    answers to the layer that it was. Maps are compared where both have one, which a linear mixer has not. Raises
    StageFailed where there is no map at all, or the models' sizes can't be compared.
    """
    if teacher is None:
        return (Watch(student, (), ()),)
    models = student, teacher
    ours, theirs = (Parts(model).shape for model in models)
    mixers, their_mixers = (each.mixers or (None,) * each.num_hidden_layers for each in (ours, theirs))
    pairs = [(i, j) for i, j in dict.fromkeys([(0, 0), *layer_map]) if i < len(mixers) and j < len(their_mixers)]
    mapped = [(i, j) for i, j in pairs if not (mixers[i] or their_mixers[j])] if weights.attention_map else []
    origins = origins_of(student), origins_of(teacher)
    heads = {j: answering_heads(*origins, i, j) for i, j in mapped}
    known = {"attention_map"} if all(own is not None for own in heads.values()) else set()
    known |= {"hidden", "attention_output"} if answering_channels(*origins) is not None else set()
    for problem in weights.misfits(ours, theirs, known):
        raise StageFailed(problem.where, problem.what, problem.fix)
    if weights.attention_map and not mapped:
        what = "no layer with softmax attention answers to one that has it too, and a mixer has no map"
        raise StageFailed("loss.attention_map", what, "use attention_output")
    for implementation in {model.config._attn_implementation for model in models if mapped} - {_SDPA}:
        what = f"maps are read where attention is computed by {_SDPA}, and here it is by {implementation}"
        raise StageFailed("loss.attention_map", what, f"load the model with attn_implementation={_SDPA!r}")
    compared = pairs if weights.attention_output else []
    return (
        Watch(student, [i for i, _ in mapped], [i for i, _ in compared]),
        Watch(teacher, [j for _, j in mapped], [j for _, j in compared], heads),
    )


def map_divergence(student: Scores, teacher: Scores, weights_BT: Tensor) -> Tensor:
    """Σ_bt weight·KL(P_T ‖ P_S) in nats, the mean over heads, of what token t attends to; differentiable in `student`.

    Kim et al., "Understanding and Improving Knowledge Distillation for Quantization-Aware Training of Large
    Transformer Encoders" (arXiv 2211.11014): there the sum over a sequence's tokens is divided by their number.
    """
    num_values = math.prod(student.query_BHTD.shape[1:3]) * student.key_BGTD.shape[2]
    return chunked_sum(
        partial(_divergence, student.scaling, teacher.scaling), (student.query_BHTD, student.key_BGTD),
        (student.mask(), teacher.query_BHTD, teacher.key_BGTD, teacher.mask(), weights_BT), num_values,
    )  # fmt: skip


def _divergence(
    scaling: float, teacher_scaling: float, query_BHTD: Tensor, key_BGTD: Tensor, mask: Tensor,
    teacher_query_BHTD: Tensor, teacher_key_BGTD: Tensor, teacher_mask: Tensor, weights_BT: Tensor,
) -> Tensor:  # fmt: skip
    with torch.autocast(query_BHTD.device.type, enabled=False):
        log_q_BHTT = _log_probabilities(query_BHTD, key_BGTD, scaling, mask).clamp_min(math.log(SMALLEST))
        log_p_BHTT = _log_probabilities(teacher_query_BHTD, teacher_key_BGTD, teacher_scaling, teacher_mask)
        p_BHTT = log_p_BHTT.exp()
        divergence_BHT = (p_BHTT * (log_p_BHTT.clamp_min(math.log(SMALLEST)) - log_q_BHTT)).sum(-1)
        return divergence_BHT.mean(1) * weights_BT


def _log_probabilities(query_BHTD: Tensor, key_BGTD: Tensor, scaling: float, mask: Tensor) -> Tensor:
    key_BHTD = key_BGTD.float().repeat_interleave(query_BHTD.shape[1] // key_BGTD.shape[1], dim=1)
    scores_BHTT = query_BHTD.float() @ key_BHTD.mT * scaling
    return scores_BHTT.masked_fill(~mask, torch.finfo(torch.float32).min).log_softmax(-1)
