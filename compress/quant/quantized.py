"""What quantising a model finds, and how what was found of some weights is kept over a kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from compress.quant.modules import set_weight, weight_of
from compress.quant.qtensor import PARTS, QTensor
from compress.quant.schemes import W8_BLOCK32
from compress.quant.targets import WeightTarget
from compress.units import Unit


@dataclass
class Quantized:
    """tensors: by weight name. errors: each one's mean square error, relative: of its output on the calibration text,
    or of the weight itself where there was none. rounding: what rounding the activations alone does to a projection's
    output, by weight name. spared: the projections that got block-wise weights for it. smoothing: the exponent that
    scaled a projection's input, by weight name. unscaled: the paths of those whose input can't be scaled. latents:
    float32 weights (N, K) before rounding and after scaling, by name, where they were to be kept.
    """

    tensors: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    spared: list[str] = field(default_factory=list)
    smoothing: dict[str, float] = field(default_factory=dict)
    unscaled: list[str] = field(default_factory=list)
    latents: dict[str, Tensor] = field(default_factory=dict)

    def unit(self, targets: Sequence[WeightTarget], factors: Mapping[str, Tensor]) -> Unit:
        """All that was found of `targets` but their latents, with the `factors` that were folded in before."""
        names = [target.name for target in targets]
        packed = {
            f"{name}.{part}": value for name in names for part, value in self.tensors[name].pack().items()
        }  # fmt: skip
        figures = {"spared": [name for name in self.spared if name in names]} | {
            of: {name: value for name, value in getattr(self, of).items() if name in names}
            for of in ("errors", "rounding", "smoothing")
        }
        return Unit(figures, {**packed, **factors})

    def take(self, unit: Unit, targets: Sequence[WeightTarget], *, keep_latents: bool) -> None:
        """Put back what `unit` found of `targets`, whose modules have the weights from before the rounding."""
        self.spared += unit.figures["spared"]
        for of in ("errors", "rounding", "smoothing"):
            getattr(self, of).update(unit.figures[of])
        for target in targets:
            weight_NK = weight_of(target.module)
            if keep_latents:
                self.latents[target.name] = weight_NK.clone()
            stored = {part: unit.tensors[key] for part in PARTS if (key := f"{target.name}.{part}") in unit.tensors}
            scheme = W8_BLOCK32 if target.name in self.spared else target.scheme
            self.tensors[target.name] = QTensor.unpack(stored, scheme, weight_NK.shape[1])
            set_weight(target.module, self.tensors[target.name].dequantize())
