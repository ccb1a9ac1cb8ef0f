"""What `compress.benchmarks.quantisation` compares: each arm is one stage of a pipeline, as a user would write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from compress.errors import InvalidInput
from compress.quant.options import QuantizeOptions

PLAIN = "rtn"
"""Rounding to nearest: what most arms of a scheme are held against."""
CROSS_ENTROPY: Mapping[str, float] = {"kl": 0.0, "ce": 1.0}
"""The losses of arms that train without a teacher; others have the stage's own, or those of the command line."""


@dataclass(frozen=True)
class Arm:
    """One way to quantise: the stage, its options, and those of the export where what it writes is judged too.

    against: how the arm of the same scheme is called that it is held against.
    """

    scheme: str
    how: str
    options: Mapping[str, Any]
    stage: str = "quantize"
    export: Mapping[str, Any] = field(default_factory=dict)
    against: str = PLAIN

    @property
    def name(self) -> str:
        """As it is called on the command line."""
        return f"{self.scheme}-{self.how}"

    @property
    def plain(self) -> str:
        """The name of the arm that it is held against."""
        return f"{self.scheme}-{self.against}"

    def stages(self, calibration: Mapping[str, Any], training: Mapping[str, Any], *, export: bool) -> list[Any]:
        """The pipeline's stages. calibration, training: options of `quantize` where it reads text, and of `qat`.

        What training starts from is calibrated on as many tokens.
        """
        options = {"scheme": self.scheme.removesuffix("-asymmetric"), **self.options}
        common: Mapping[str, Any] = {}
        if self.stage == "qat":
            start = {f"calibration_{name}": value for name, value in calibration.items() if name == "tokens"}
            common = {**start, **training}
        elif QuantizeOptions.model_validate(options).needs_text:
            common = calibration
        options = {**common, **options}
        exports = [{"export-onnx": dict(self.export)}] if export or self.export else []
        return [{self.stage: options}, *exports]


def select(patterns: Sequence[str]) -> list[Arm]:
    """The arms that match one of `patterns`, in their own order. Raises InvalidInput for a pattern that none does."""
    for pattern in patterns:
        if not any(fnmatchcase(arm.name, pattern) for arm in ARMS):
            raise InvalidInput("--arms", f"no arm is called {pattern!r}", f"known: {', '.join(a.name for a in ARMS)}")
    return [arm for arm in ARMS if any(fnmatchcase(arm.name, pattern) for pattern in patterns)]


def _blockwise(scheme: str) -> Iterator[Arm]:
    yield Arm(scheme, PLAIN, {"method": "rtn"})
    yield Arm(scheme, "search", {"method": "search"})
    yield Arm(scheme, "gptq", {"method": "gptq"})


def _trained(scheme: str) -> Iterator[Arm]:
    yield Arm(scheme, "qat", {"method": "gptq"}, "qat")
    yield Arm(scheme, "qat-ce", {"method": "gptq", "loss": CROSS_ENTROPY}, "qat")


def _four_bit(scheme: str) -> Iterator[Arm]:
    yield from _blockwise(scheme)
    yield Arm(scheme, "gptq-act-order", {"method": "gptq", "act_order": True})
    yield Arm(scheme, "awq", {"method": "rtn", "scaling": "awq"})
    yield Arm(scheme, "awq-gptq", {"method": "gptq", "scaling": "awq"})
    yield from _trained(scheme)


def _dynamic() -> Iterator[Arm]:
    scheme, everywhere = "w8a8-dynamic", {"method": "rtn", "exceptions": {}}
    yield Arm(scheme, PLAIN, {**everywhere, "reduce_range": False})
    seven = {**everywhere, "reduce_range": True}
    yield Arm(scheme, "7-bit", seven)
    yield Arm(scheme, "7-bit-smoothquant", {**seven, "scaling": "smoothquant"})
    spared = {**seven, "exceptions": "auto"}
    yield Arm(scheme, "7-bit-exceptions", spared)
    yield Arm(scheme, "7-bit-smoothquant-exceptions", {**spared, "scaling": "smoothquant"})
    best = {**spared, "scaling": "smoothquant", "method": "gptq"}
    yield Arm(scheme, "7-bit-smoothquant-exceptions-gptq", best)
    yield Arm(scheme, "7-bit-qat", {**best, "scaling": "none"}, "qat")
    yield Arm(scheme, "7-bit-qat-smoothquant", best, "qat")


def _static() -> Iterator[Arm]:
    scheme, everywhere = "w8a8-static", {"method": "rtn", "exceptions": {}, "reduce_range": True}
    yield Arm(scheme, PLAIN, {**everywhere, "ranges": "minmax"})
    yield Arm(scheme, "percentile", {**everywhere, "ranges": "percentile"})
    yield Arm(scheme, "entropy", {**everywhere, "ranges": "entropy"})
    spared = {**everywhere, "ranges": "minmax", "exceptions": "auto"}
    yield Arm(scheme, "exceptions", spared)
    smooth = {**spared, "ranges": "percentile", "scaling": "smoothquant"}
    yield Arm(scheme, "percentile-smoothquant-exceptions", smooth)
    yield Arm(scheme, "qat", {**spared, "method": "gptq"}, "qat")


def _arms() -> Iterator[Arm]:
    for scheme in ("w4-block32", "w4-block128"):
        yield from _four_bit(scheme)
    yield Arm("w4-block32-asymmetric", PLAIN, {"method": "rtn", "symmetric": False})
    yield Arm("w4-block32-asymmetric", "gptq", {"method": "gptq", "symmetric": False})
    calibration = {"method": "gptq", "tokens": 128 * 512, "sequence_length": 512}
    yield Arm("w4-block32", "gptq-128-samples", calibration)
    yield Arm("w4-block32", "gptq-onnx", {"method": "gptq"}, export={"kv_cache": "float32"})
    yield Arm("w4-block32", "gptq-kv-int8", {"method": "gptq"}, export={"kv_cache": "int8"}, against="gptq-onnx")
    yield from _dynamic()
    yield from _static()
    for scheme in ("w2-block32", "ternary"):
        yield from (*_blockwise(scheme), *_trained(scheme))
    yield from _blockwise("w8-block32")


ARMS: tuple[Arm, ...] = tuple(_arms())
"""All of them, in the order of the report. What options mean: `compress stages quantize`, `compress stages qat`."""
