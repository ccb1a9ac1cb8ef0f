"""`export-onnx`: a model as a folder that ONNX Runtime and onnxruntime-genai run as it is, proved equal to torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.artifact import Format, Metrics
from compress.errors import Problem, StageFailed
from compress.models.anatomy import ModelShape
from compress.stage import Stage, StageContext

if TYPE_CHECKING:
    from compress.artifact import Artifact
    from compress.exports.onnx.parity import Expectations

_SCHEMES = {"int4": "w4-block32", "int8": "w8-dynamic"}


class ExportOnnx(Stage):
    """Build the graph from the family's anatomy, store the tensors untouched, and compare with torch.

    Padding: `fused: true` (`GroupQueryAttention`) takes right-padded batches only, and none where a linear layer has a
    convolution; `fused: false` left-padded ones, as optimum's `ORTModelForCausalLM` feeds them. Encoders take both.
    """

    name: ClassVar[str] = "export-onnx"
    summary: ClassVar[str] = "Write a folder that ONNX Runtime and onnxruntime-genai run, checked against torch"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch", "quantized"})
    returns: ClassVar[Format] = "onnx"
    reads_target: ClassVar[bool] = True

    format: Literal["auto", "fp32", "int8", "int4"] = Field(
        "auto",
        description="auto: as the artifact is; int8, int4: short for a quantize stage before (w8-dynamic, w4-block32)",
    )
    fused: bool = Field(
        True, description="ONNX Runtime's fused operators; false: standard operators, for left-padded batches"
    )
    parity_tolerance: float = Field(
        1e-3, gt=0, le=1, description="largest difference of a logit from torch's, activations unrounded"
    )

    def before(self, accepted: Format) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The quantize stage that `format` is short for."""
        if accepted == "torch" and self.format in _SCHEMES:
            return (("quantize", {"scheme": _SCHEMES[self.format]}),)
        return ()

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Formats and sizes that the operators can't do."""
        if self.format == "int4" and not self.fused:
            yield Problem("fused", "4-bit weights have no standard operator", "leave fused: true")
        has_softmax = None in (model.mixers or (None,))
        if self.fused and model.family.kind == "decoder" and has_softmax and model.head_dim % 8:
            what = f"GroupQueryAttention needs heads of a multiple of 8, these have {model.head_dim}"
            yield Problem("fused", what, "set fused: false")

    def check_input(self, previous: Stage) -> Iterator[Problem]:
        """What was quantised before by a scheme that `format` does not mean or that `fused` leaves no operators for."""
        scheme = getattr(previous, "scheme", None)
        if previous.returns != "quantized" or scheme is None:
            return
        if problem := _other_format(self.format, scheme):
            yield problem
        if self.format != "int4" and scheme == _SCHEMES["int4"] and not self.fused:
            yield Problem("fused", f"{scheme} weights have no standard operator", "leave fused: true")

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Estimated bytes: float32 of what was not quantised before."""
        return 4.0 * model.num_parameters if self.format == "fp32" else before

    def run(self, context: StageContext) -> Metrics:
        """Export, compare and describe. Raises StageFailed beyond the tolerance, saying by how much."""
        from compress.exports.onnx.parity import verify

        start = time.perf_counter()
        _refuse_other_format(context.input, self.format)
        with context.reporter.progress("export", 3) as advance:
            expected = self._export(context)
            advance(1, "written")
            parity, shipped = verify(context.out, expected, self.parity_tolerance, context.target.threads)
            advance(2, "compared")
        if shipped is not parity:
            what = "activations are rounded: logits move by %.2g at most, whole against step by step by %.2g"
            context.reporter.log.info(what, shipped.max_error, shipped.own_step_error)
        seconds = time.perf_counter() - start
        figures = {"parity_max_error": parity.max_error, "greedy_mismatches": float(parity.mismatches)}
        return {"result": {**figures, "export_seconds": seconds}}

    def _export(self, context: StageContext) -> Expectations:
        """Write all but `parity.json`; what torch computes, for the comparison. Torch's weights are freed here."""
        from compress.exports.onnx.describe import load
        from compress.exports.onnx.encoder import read_pooling
        from compress.exports.onnx.folder import write_folder
        from compress.exports.onnx.parity import expectations
        from compress.models.load import load_tokenizer

        tokenizer = load_tokenizer(context.input.path)
        model, described = load(context.input)
        pooling = read_pooling(context.input.path) if described.shape.family.kind == "encoder" else None
        task = write_folder(context, model, described, pooling, fused=self.fused)
        return expectations(model, tokenizer, task, pooling)


def _refuse_other_format(artifact: Artifact, wanted: str) -> None:
    if artifact.format != "quantized":
        return
    if problem := _other_format(wanted, artifact.config.get("quantization_config", {}).get("scheme", "")):
        raise StageFailed(f"export-onnx.{problem.where}", problem.what, problem.fix)


def _other_format(wanted: str, scheme: str) -> Problem | None:
    """What is wrong where `wanted` is asked of weights of `scheme`."""
    if wanted == "auto" or _SCHEMES.get(wanted) == scheme:
        return None
    what = f"format {wanted!r} was asked of weights that are quantised as {scheme!r} already"
    return Problem("format", what, "leave format out, or change the stage that quantised them")
