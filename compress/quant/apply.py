"""Quantises a whole model: plain rounding, or layer by layer on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from compress.models.parts import Parts
from compress.quant.calibrate import LayerWalk, Moments
from compress.quant.modules import set_weight, weight_of
from compress.quant.qtensor import QTensor
from compress.quant.schemes import W8_BLOCK32, Scheme, quantize, round_activations
from compress.quant.search import gptq, output_error, search_scales
from compress.quant.targets import WeightTarget, layer_targets, table_targets

Search = Literal["none", "mse", "output", "gptq"]
OUTLIER_ERROR = 0.02
"""A projection whose output changes by more than this (mean square, relative) where its activations are rounded per
tensor has outliers that this rounding can't hold."""


@dataclass
class Quantized:
    """tensors: by weight name. errors: each one's mean square error, relative: of its output on the calibration text,
    or of the weight itself where there was none. weight_only: projections that a dynamic scheme could not hold.
    """

    tensors: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    weight_only: list[str] = field(default_factory=list)

    def add(self, target: WeightTarget, qtensor: QTensor, moment_KK: Tensor | None) -> None:
        """Note `qtensor`, and put the weight that it stands for into the model."""
        weight_NK = weight_of(target.module)
        self.tensors[target.name] = qtensor
        self.errors[target.name] = output_error(weight_NK, qtensor, moment_KK)
        set_weight(target.module, qtensor.dequantize())


def round_model(parts: Parts, scheme: Scheme, weight_only: Collection[str] = ()) -> Quantized:
    """Round-to-nearest of every target, in place; no text needed. weight_only: projections by the end of their path."""
    result = Quantized()
    for index in range(len(parts.layers)):
        for target in layer_targets(parts, index, scheme):
            own = W8_BLOCK32 if _is_named(target, weight_only) else target.scheme
            result.add(target, quantize(weight_of(target.module), own), None)
            if own is not scheme:
                result.weight_only.append(target.name)
    for target in table_targets(parts, scheme):
        result.add(target, quantize(weight_of(target.module), target.scheme), None)
    return result
