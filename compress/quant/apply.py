"""Quantises a whole model: plain rounding, or layer by layer on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from compress.models.parts import Parts
from compress.quant.calibrate import LayerWalk, Moments, RoundingErrors
from compress.quant.modules import set_weight, weight_of
from compress.quant.qtensor import QTensor
from compress.quant.schemes import W8_BLOCK32, Scheme, quantize
from compress.quant.search import gptq, output_error, search_scales
from compress.quant.targets import WeightTarget, layer_targets, table_targets

Search = Literal["none", "output", "gptq"]
WeightOnly = Literal["auto"] | Collection[str]
"""Projections whose activations a dynamic scheme must not round: by the ends of their paths, or found on the text."""
OUTLIER_ERROR = 0.01
"""Rounding activations per tensor may change a projection's output by this, as a share of its mean square per token."""


@dataclass
class Quantized:
    """tensors: by weight name. errors: each one's mean square error, relative: of its output on the calibration text,
    or of the weight itself where there was none. rounding: what rounding the activations alone does to a projection's
    output, by weight name. weight_only: the projections that the dynamic scheme was not used for.
    """

    tensors: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    weight_only: list[str] = field(default_factory=list)

    def add(self, target: WeightTarget, qtensor: QTensor, moment_KK: Tensor | None) -> None:
        """Note `qtensor`, and put the weight that it stands for into the model."""
        weight_NK = weight_of(target.module)
        self.tensors[target.name] = qtensor
        self.errors[target.name] = output_error(weight_NK, qtensor, moment_KK)
        set_weight(target.module, qtensor.dequantize())

    def choose(self, target: WeightTarget, weight_only: WeightOnly) -> Scheme:
        """The scheme that `target` gets."""
        if not target.scheme.dynamic:
            return target.scheme
        if weight_only == "auto":
            spared = self.rounding.get(target.name, 0.0) > OUTLIER_ERROR
        else:
            spared = target.name.removesuffix(".weight").endswith(tuple(weight_only)) if weight_only else False
        if spared:
            self.weight_only.append(target.name)
        return W8_BLOCK32 if spared else target.scheme


def round_model(parts: Parts, scheme: Scheme, weight_only: WeightOnly = ()) -> Quantized:
    """Round every target to the nearest in place; needs no text."""
    result = Quantized()
    layers = [target for index in range(len(parts.layers)) for target in layer_targets(parts, index, scheme)]
    for target in (*layers, *table_targets(parts, scheme)):
        weight_NK, own = weight_of(target.module), result.choose(target, weight_only)
        result.add(target, quantize(weight_NK, own), None)
    return result


def calibrate_model(
    parts: Parts, scheme: Scheme, search: Search, ids_BT: Tensor, weight_only: WeightOnly = "auto",
    advance: Callable[[], None] = lambda: None,
) -> Quantized:  # fmt: skip
    """Quantise every target in place, one layer after another on the text `ids_BT` (blocks of token ids).

    Each layer is fitted to what the float layers before it hand on: handing on what the quantised ones make takes a
    second pass and gains nothing that can be measured (benchmarks/results/int4-search_smollm2-135m.md). Peak memory
    beside the model: the text's hidden states and one layer's moments.
    """
    result = Quantized()
    walk = LayerWalk(parts, ids_BT)
    for index in range(len(parts.layers)):
        targets = list(layer_targets(parts, index, scheme))
        modules = {target.module: target for target in targets}
        moments, rounding = Moments(), RoundingErrors(scheme)
        with moments.watching(list(modules)), rounding.watching(list(modules) if scheme.dynamic else []):
            walk.step(index)
        result.rounding |= {target.name: rounding[module] for module, target in modules.items() if scheme.dynamic}
        for group in moments.groups():
            _fit_group([modules[module] for module in group], moments[group[0]], search, weight_only, result)
        advance()
    for target in table_targets(parts, scheme):
        moment_KK = _head_moment(parts, walk.hidden) if _feeds_head(parts, target) else None
        result.add(target, find(weight_of(target.module), target.scheme, search, moment_KK), moment_KK)
    return result


def find(weight_NK: Tensor, scheme: Scheme, search: Search, moment_KK: Tensor | None = None) -> QTensor:
    """Codes and scales by `search`; without a moment of the inputs (K, K), scales of the weights' least error."""
    if search == "none":
        return quantize(weight_NK, scheme)
    if moment_KK is None:
        return quantize(weight_NK, scheme, search_scales(weight_NK, scheme))
    if search == "output":
        return quantize(weight_NK, scheme, search_scales(weight_NK, scheme, moment_KK.diagonal()))
    return gptq(weight_NK, scheme, moment_KK)


def _fit_group(
    targets: Sequence[WeightTarget], moment_KK: Tensor, search: Search, weight_only: WeightOnly, result: Quantized
) -> None:
    """Targets that share an input, fitted as one matrix where they share a scheme: rows do not touch each other."""
    by_scheme: dict[Scheme, list[WeightTarget]] = {}
    for target in targets:
        by_scheme.setdefault(result.choose(target, weight_only), []).append(target)
    for scheme, members in by_scheme.items():
        weights = [weight_of(target.module) for target in members]
        whole = find(torch.cat(weights), scheme, search, moment_KK)
        for target, part in zip(members, whole.split([len(weight) for weight in weights]), strict=True):
            result.add(target, part, moment_KK)


def _feeds_head(parts: Parts, target: WeightTarget) -> bool:
    """Whether `target` is the weight of a decoder's output head, be it the embedding's too."""
    head = parts.lm_head
    return head is not None and cast(Tensor, head.weight) is cast(Tensor, target.module.weight)


def _head_moment(parts: Parts, hidden: Sequence[Tensor]) -> Tensor:
    """E[x xᵀ] (hidden, hidden) of the final norm's output."""
    norm = cast(nn.Module, parts.backbone_module(parts.family.final_norm))
    moments = Moments()
    probe = nn.Identity()
    with torch.no_grad(), moments.watching([probe]):
        for hidden_BTD in hidden:
            probe(norm(hidden_BTD))
    return moments[probe]
