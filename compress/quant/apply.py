"""Quantises a whole model in place: rounded to nearest, or layer by layer on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.by_layers import Shelf
from compress.models.parts import Parts
from compress.quant.calibrate import LayerWalk, Moments, Range, RoundingErrors
from compress.quant.modules import set_weight, weight_of
from compress.quant.options import QuantizeOptions
from compress.quant.qtensor import ROWS, QTensor
from compress.quant.quantized import Quantized
from compress.quant.ranges import InputRanges
from compress.quant.rounding import quantize
from compress.quant.scaling import Fold, Magnitudes, awq_factors, folds, smoothquant_factors, unfolded
from compress.quant.schemes import W8_BLOCK32, Scheme
from compress.quant.search import gptq, output_error, search_scales
from compress.quant.targets import WeightTarget, layer_targets, table_targets
from compress.units import UNKEPT, Units

OUTLIER_ERROR = 0.0025
"""Rounding activations per tensor may change a projection's output by this, as a share of its mean square per token.
Measured: benchmarks/results/quantisation_smollm2-135m.md."""
_FACTOR = "factor."
"""What the names of kept factors begin with; the number of their fold in its layer follows."""


def quantize_model(
    parts: Parts, options: QuantizeOptions, ids_BT: Tensor | None = None, advance: Callable[[], None] = lambda: None,
    *, keep_latents: bool = False, units: Units = UNKEPT, shelf: Shelf | None = None,
) -> Quantized:  # fmt: skip
    """Quantise every target of `parts.model`, which is left with the weights that the codes stand for.

    ids_BT: blocks of token ids, of one length; needed where `options.needs_text`. Each layer is fitted to what the
    float layers before it hand on: handing on what the quantised ones make takes a second pass and gains nothing that
    can be measured (benchmarks/results/int4-search_smollm2-135m.md). Peak memory beside the model: the text's hidden
    states and one layer's moments. units: layers and tables that they hold are not fitted again: the text only runs
    through those layers, in float, to reach the next ones. Raises CompressError for missing text and for activations
    that are not finite.
    """
    if ids_BT is None and options.needs_text:
        raise CompressError("quantize", f"{options.scheme} by these options is fitted on text", "give it text")
    walk = LayerWalk(parts, ids_BT) if ids_BT is not None and options.needs_text else None
    work = _Work(parts, options, walk, keep_latents, units.made_of(options.model_dump(mode="json")))
    shelf = shelf or Shelf(parts.model, {})
    for index in range(len(parts.layers)):
        targets = list(layer_targets(parts, index, options.choice))
        with shelf.held(parts.layer_path(index), [target.name for target in targets]):
            work.layer(index, targets)
        advance()
    work.tables()
    return work.result


class _Work:
    """One model on its way through `quantize_model`."""

    def __init__(
        self, parts: Parts, options: QuantizeOptions, walk: LayerWalk | None, keep_latents: bool, units: Units
    ) -> None:
        self.parts, self.options, self.walk, self.keep_latents, self.units = parts, options, walk, keep_latents, units
        self.factors: dict[str, Tensor] = {}  # folded into the layer at hand
        self.result = Quantized(unscaled=unfolded(parts) if options.scaling != "none" else [])

    def layer(self, index: int, targets: Sequence[WeightTarget]) -> None:
        """Quantise the projections of the next layer, or put them back."""
        name = f"layer {index}"
        if (unit := self.units.find(name)) is None:
            self.factors = {}
            self._layer(index, targets)
            self.units.keep(name, self.result.unit(targets, self.factors))
            return
        for number, fold in enumerate(folds(self.parts, index)):
            if (factor_K := unit.tensors.get(f"{_FACTOR}{number}")) is not None:
                fold.apply(factor_K)
        if self.walk is not None:
            self.walk.step(index)
        self.result.take(unit, targets, keep_latents=self.keep_latents)

    def _layer(self, index: int, targets: Sequence[WeightTarget]) -> None:
        if self.walk is None:
            for target in targets:
                self._fit([target], None, None)
            return
        modules = {target.module: target for target in targets}
        if self.options.scaling != "none":
            self._scale(self.walk, index, modules)
        ranges = self._ranges(self.walk, index, [target.module for target in targets if target.scheme.static])
        rounded = {module: target.scheme for module, target in modules.items() if not target.scheme.blockwise}
        moments, rounding = Moments(), RoundingErrors(rounded, ranges)
        with moments.watching(list(modules)), rounding.watching():
            self.walk.step(index)
        self.result.rounding |= {modules[module].name: rounding[module] for module in rounded}
        for group in moments.groups():
            by_scheme: dict[Scheme, list[WeightTarget]] = {}
            for target in map(self._spared, (modules[module] for module in group)):
                by_scheme.setdefault(target.scheme, []).append(target)
            for members in by_scheme.values():
                self._fit(members, moments[group[0]], ranges.get(members[0].module))

    def tables(self) -> None:
        """Quantise the embedding and the output head, or put them back."""
        for target in table_targets(self.parts, self.options.choice):
            if (unit := self.units.find(target.name)) is not None:
                self.result.take(unit, [target], keep_latents=self.keep_latents)
                continue
            self._table(target)
            self.units.keep(target.name, self.result.unit([target], {}))

    def _table(self, target: WeightTarget) -> None:
        if self.walk is None or not _feeds_head(self.parts, target):
            self._fit([target], None, None)
            return
        moments, ranges = Moments(), InputRanges(self.options.ranges)
        norm, probe = cast(nn.Module, self.parts.backbone_module(self.parts.family.final_norm)), nn.Identity()
        with torch.no_grad(), moments.watching([probe]), ranges.watching([probe] if target.scheme.static else []):
            for hidden_BTD in self.walk.hidden:
                probe(norm(hidden_BTD))
        self._fit([target], moments[probe], ranges[probe] if target.scheme.static else None)

    def _scale(self, walk: LayerWalk, index: int, modules: dict[nn.Module, WeightTarget]) -> None:
        """Fold factors of input channels into the layer."""
        magnitudes, moments = Magnitudes(), Moments()
        awq = self.options.scaling == "awq"
        with magnitudes.watching(list(modules)), moments.watching(list(modules) if awq else []):
            walk.look(index)
        for number, fold in enumerate(folds(self.parts, index)):
            readers = [modules[reader] for reader in fold.readers if reader in modules]
            if any(target.scheme.blockwise == awq for target in readers):
                self.factors[f"{_FACTOR}{number}"] = self._fold(fold, readers, magnitudes, moments)

    def _fold(self, fold: Fold, readers: list[WeightTarget], magnitudes: Magnitudes, moments: Moments) -> Tensor:
        """The factors (K,) that were folded in."""
        first, weights = readers[0].module, [weight_of(target.module) for target in readers]
        if self.options.scaling == "awq":
            mean_K = fold.tied(magnitudes.mean(first), "mean")
            factor_K, alpha = awq_factors(mean_K, weights, [target.scheme for target in readers], moments[first])
        else:
            largest_K, alpha = fold.tied(magnitudes.largest(first), "amax"), self.options.smoothing
            factor_K = fold.tied(smoothquant_factors(largest_K, weights, alpha), "amax")
        fold.apply(factor_K)
        self.result.smoothing |= {target.name: alpha for target in readers}
        return factor_K

    def _ranges(self, walk: LayerWalk, index: int, modules: list[nn.Module]) -> dict[nn.Module, Range]:
        if not modules:
            return {}
        ranges = InputRanges(self.options.ranges)
        with ranges.watching(modules):
            walk.look(index)
        return {module: ranges[module] for module in modules}

    def _spared(self, target: WeightTarget) -> WeightTarget:
        """`target` as it is, or with block-wise weights where rounded activations would ruin it."""
        error = self.result.rounding.get(target.name, 0.0)
        if not self.options.finds_exceptions or error <= OUTLIER_ERROR:
            return target
        self.result.spared.append(target.name)
        return replace(target, scheme=W8_BLOCK32)

    def _fit(self, targets: Sequence[WeightTarget], moment_KK: Tensor | None, input_range: Range | None) -> None:
        """Targets that share an input and a scheme, fitted as one matrix: rows do not touch each other."""
        weights, scheme = [weight_of(target.module) for target in targets], targets[0].scheme
        for target, weight_NK in zip(targets, weights, strict=True):
            if not torch.stack(weight_NK.aminmax()).isfinite().all():
                raise CompressError(target.name, "has values that are NaN or infinite", "fetch or train it again")
        whole = self._codes(torch.cat(weights) if len(weights) > 1 else weights[0], scheme, moment_KK)
        parts = whole.split([len(weight_NK) for weight_NK in weights])
        if scheme.static and input_range is not None:  # clones: each is stored on its own
            scale, zero_point = input_range
            parts = [replace(p, input_scale=scale.clone(), input_zero_point=zero_point.clone()) for p in parts]
        for target, weight_NK, part in zip(targets, weights, parts, strict=True):
            rounded_NK = part.dequantize()
            self.result.tensors[target.name] = part
            self.result.errors[target.name] = output_error(weight_NK, rounded_NK, moment_KK)
            if self.keep_latents:
                self.result.latents[target.name] = weight_NK.clone()
            set_weight(target.module, rounded_NK)

    def _codes(self, weight_NK: Tensor, scheme: Scheme, moment_KK: Tensor | None) -> QTensor:
        """Codes and scales by the method; without a moment of the inputs (K, K), those of the weights' least error."""
        if self.options.method == "rtn":
            return QTensor.joined([quantize(rows, scheme) for rows in torch.split(weight_NK, ROWS)])
        if moment_KK is None:
            return search_scales(weight_NK, scheme)
        if self.options.method == "search":
            return search_scales(weight_NK, scheme, moment_KK.diagonal())
        return gptq(weight_NK, scheme, moment_KK, act_order=self.options.act_order)


def _feeds_head(parts: Parts, target: WeightTarget) -> bool:
    """Whether `target` is the weight of a decoder's output head, be it the embedding's too."""
    head = parts.lm_head
    return head is not None and cast(Tensor, head.weight) is cast(Tensor, target.module.weight)
