"""`export-onnx`: a model as a folder that ONNX Runtime and onnxruntime-genai run as it is, proved equal to torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.artifact import Format, Metrics
from compress.errors import Problem, StageFailed
from compress.exports.onnx import ACTIVATIONS, FEW, ROPE_TYPES, padded_width
from compress.exports.onnx.genai import room
from compress.models.anatomy import ModelShape, shape_of
from compress.options import counted
from compress.quant import bnb
from compress.quant.choice import matches, projections
from compress.quant.schemes import SCHEMES, Scheme
from compress.stage import INPUT, Given, Stage, StageContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.artifact import Artifact
    from compress.exports.onnx.parity import Expectations
    from compress.exports.onnx.weights import Model

_SCHEMES = {"int4": "w4-block32", "int8": "w8a8-dynamic"}


class ExportOnnx(Stage):
    """Build the graph from the family's anatomy, store the tensors untouched, and compare with torch.

    Padding: `fused: true` (`GroupQueryAttention`) takes right-padded batches only, and none where a linear layer has a
    convolution or a window; `fused: false` left-padded ones, as optimum's `ORTModelForCausalLM` feeds them. Encoders
    take both.
    """

    name: ClassVar[str] = "export-onnx"
    version: ClassVar[int] = 7
    summary: ClassVar[str] = "Write a folder that ONNX Runtime and onnxruntime-genai run, checked against torch"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch", "quantized"})
    returns: ClassVar[Format] = "onnx"
    reads_target: ClassVar[bool] = True
    libraries: ClassVar[frozenset[str]] = frozenset(
        {"torch", "transformers", "optimum", "onnx", "onnxruntime", "python"}  # whose documentation is compared on
    )

    format: Literal["auto", "fp32", "int8", "int4"] = Field(
        "auto",
        description="auto: as the artifact is; int8, int4: short for quantize before it (w8a8-dynamic, w4-block32)",
    )
    fused: bool = Field(
        True, description="ONNX Runtime's fused operators; false: standard operators, for left-padded batches"
    )
    kv_cache: Literal["float32", "int8"] = Field(
        "float32",
        description="int8: keys and values are cached in a quarter of the bytes, with a scale for each channel, from "
        "training text; what that costs is among the figures",
    )
    chunk_size: int | None = Field(
        256, ge=1,
        description="tokens of a prompt that are read in one call, by onnxruntime-genai and by this tool: attention's "
        "masks and a layer's activations stay small; null: all at once (decoders, fused)",
    )  # fmt: skip
    max_length: int | None = Field(
        None, ge=1,
        description="tokens, prompt and answer, that onnxruntime-genai makes room for where its user gives no length; "
        "null: all that the model reads, or what 1 GiB of keys and values holds (decoders, fused)",
    )  # fmt: skip
    prompt: Literal["int8"] | None = Field(
        None,
        description="int8: more than 8 new tokens at once are read by int8 weights that stand for the same values, "
        "activations rounded per call, in the same file; what that costs is among the figures (weights in blocks)",
    )
    prompt_exceptions: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="prompt: int8: projections that read prompts by the weights that write, by the path of the module "
        "or its end; auto: those that rounded activations harm, found on training text; []: none",
    )
    logits: Literal["last", "all"] = Field(
        "last",
        description="all: those of every token that is read, by which speculation judges drafts; a chunk's take 4 "
        "bytes for each token and entry of the vocabulary (decoders, fused)",
    )
    parity_tolerance: float = Field(
        1e-3, gt=0, le=1,
        description="largest difference of an output from torch's, as a share of the spread (standard deviation) of "
        "torch's outputs, activations unrounded",
    )  # fmt: skip

    def before(self, accepted: Format) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The quantize stage that `format` is short for."""
        if accepted == "torch" and self.format in _SCHEMES:
            return (("quantize", {"scheme": _SCHEMES[self.format]}),)
        return ()

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Formats, sizes and caches that the operators can't do."""
        has_softmax = None in (model.mixers or (None,))
        yield from no_operators(model, fused=self.fused)
        if any(spec and spec.window for spec in model.mixers or ()) and (problem := _missing_window()):
            yield problem
        if self.max_length is not None and not self._is_fused_decoder(model):
            yield Problem("max_length", "only onnxruntime-genai reads it, which runs fused decoders", "remove it")
        elif self.max_length is not None and self.max_length > (longest := model.max_position_embeddings):
            yield Problem("max_length", f"{self.max_length} tokens, but the model reads at most {longest}", "lower it")
        if "logits" in self.model_fields_set and model.family.kind != "decoder":
            yield Problem("logits", f"{model.model_type} is an encoder, which gives all that it has", "remove it")
        elif "logits" in self.model_fields_set and not self.fused:
            yield Problem("logits", "standard operators give those of every token", "remove it, or set fused: true")
        yield from self._prompt_problems(model)
        if self.kv_cache == "float32":
            return
        if model.family.kind != "decoder" or not has_softmax:
            yield Problem("kv_cache", "no layer of this model caches keys and values", "remove it")
        elif not self.fused:
            yield Problem("kv_cache", "standard operators can't read an int8 cache", "set fused: true")
        elif problem := _missing_cache():
            yield problem

    def _prompt_problems(self, model: ModelShape) -> Iterator[Problem]:
        """Why this model's prompts can't be read by other weights."""
        if self.prompt is None:
            if "prompt_exceptions" in self.model_fields_set:
                yield Problem("prompt_exceptions", "prompts are not read in int8", "set prompt: int8, or remove it")
            return
        if model.family.kind != "decoder":
            yield Problem("prompt", f"{model.model_type} is an encoder, which reads all at once", "format: int8")
        elif not self.fused:
            yield Problem("prompt", "standard operators compute one body", "set fused: true")
        elif self.chunk_size is not None and self.chunk_size <= FEW:
            what = f"chunks of {self.chunk_size} are read by the weights that write: prompts begin above {FEW} tokens"
            yield Problem("chunk_size", what, "256")
        elif problem := _missing_int8():
            yield problem
        for pattern in self.prompt_exceptions if self.prompt_exceptions != "auto" else ():
            if not any(matches(path, pattern) for path, _, _ in projections(model)):
                yield Problem("prompt_exceptions", f"no projection's path is or ends with {pattern!r}")

    def check_input(self, previous: Stage) -> Iterator[Problem]:
        """What was quantised before by a scheme that `format` does not mean or that has no standard operator.

        Whether the installed runtime has a fused one is found out by the dry run, which opens it.
        """
        name = getattr(previous, "scheme", None)
        if name in bnb.BITS:
            yield Problem("", bnb.PYTORCH_ONLY, "quantize by another scheme, as w4-block32")
        if self.prompt and (previous.returns != "quantized" or name not in SCHEMES or not SCHEMES[name].blockwise):
            what = "is of a model whose weights are in blocks, and this one's are not"
            yield Problem("prompt", what, "quantize or qat before it, as w4-block32")
        if previous.returns != "quantized" or name not in SCHEMES:
            return
        if problem := _other_format(self.format, name):
            yield problem
        if not self.fused and (problem := _no_standard_operator(SCHEMES[name])):
            yield problem

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The text that an int8 cache and int8 prompts are fitted to, and that which their loss is measured on."""
        if self.prompt is not None and self.prompt_exceptions != "auto" and self.kv_cache != "int8":
            return frozenset({"eval"})
        return frozenset({"train", "eval"}) if self.kv_cache == "int8" or self.prompt else self.splits

    def settled(self, given: Given) -> Mapping[str, Any]:
        """Floats have one format; of quantised weights the format is the input's."""
        is_float = given.formats[INPUT] == "torch"
        chunked = self._is_fused_decoder(given.shape)
        return counted(self, {
            "format": "fp32" if is_float else None if self.format == "auto" else self.format,
            "chunk_size": self.chunk_size if chunked else None,
            "max_length": self._room(given.shape) if chunked else None,
            "logits": self.logits if chunked else None,
            "prompt_exceptions": self.prompt_exceptions if self.prompt else None,
        })  # fmt: skip

    def _is_fused_decoder(self, model: ModelShape) -> bool:
        return self.fused and model.family.kind == "decoder"

    def _room(self, model: ModelShape) -> int:
        """What `max_length` means for that model."""
        return self.max_length or room(model, num_bytes=1 if self.kv_cache == "int8" else 4)

    def rounds_activations(self, given: Given) -> bool:
        return super().rounds_activations(given) or self.kv_cache == "int8" or self.prompt is not None

    def depends_on_cpu(self, given: Given) -> bool:
        """Where what is rounded is compared with torch."""
        return self.rounds_activations(given)

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Estimated bytes: float32 of what was not quantised before."""
        return 4.0 * model.num_parameters if self.format == "fp32" else before

    def run(self, context: StageContext) -> Metrics:
        """Export, compare and describe. Raises StageFailed beyond the tolerance, saying by how much."""
        from compress.exports.onnx.kv_cache import cache_loss
        from compress.exports.onnx.parity import verify
        from compress.exports.onnx.prompt import prompt_loss

        start = time.perf_counter()
        _refuse_other_format(context.input, self.format)
        for problem in no_operators(shape_of(context.input.config), fused=self.fused):
            raise StageFailed(self.name, problem.what, problem.fix)
        with context.reporter.progress("export", 3) as advance:
            expected, held_out = self._export(context)
            advance(1, "written")
            threads = context.target.threads
            parity, shipped = verify(context.out, expected, self.parity_tolerance, threads)
            losses = {"kv_cache": cache_loss, "prompt": prompt_loss}
            lost = {name: value for what, ids_BT in held_out.items()
                    for name, value in losses[what](context.out, ids_BT, threads).items()}  # fmt: skip
            advance(2, "compared")
        if shipped is not parity:
            what = "what is rounded moves logits by %.2g at most, whole against step by step by %.2g"
            context.reporter.log.info(what, shipped.max_error, shipped.own_step_error)
        seconds = time.perf_counter() - start
        if self.logits == "all":
            num_read = self.chunk_size or 1024
            lost[f"logits_mb@{num_read}"] = 4e-6 * num_read * context.input.config["vocab_size"]
        figures = {"parity_max_error": parity.max_error, "parity_relative_error": parity.relative_error,
                   "greedy_mismatches": float(parity.mismatches), **lost}  # fmt: skip
        if shipped.num_tokens:
            figures["greedy_agreement"] = shipped.greedy_agreement
        return {"result": {**figures, "export_seconds": seconds}}

    def _export(self, context: StageContext) -> tuple[Expectations, dict[str, NDArray[np.int64]]]:
        """Write all but `parity.json`; what torch computes, for the comparison, and text `(B, T)` for options' losses.

        Torch's weights are freed here.
        """
        from compress.exports.onnx import prompt
        from compress.exports.onnx.describe import load
        from compress.exports.onnx.folder import write_folder
        from compress.exports.onnx.kv_cache import cache_scales, text_blocks
        from compress.exports.onnx.parity import expectations
        from compress.models.load import load_tokenizer
        from compress.models.pooling import read_pooling

        tokenizer = load_tokenizer(context.input.path)
        model, described = load(context.input)
        _refuse_missing(described, fused=self.fused)
        held_out: dict[str, NDArray[np.int64]] = {}
        if self.kv_cache == "int8":
            fitted, held_out["kv_cache"] = text_blocks(context.data, tokenizer, described)
            described = replace(described, cache_scales=cache_scales(model, described, fitted))
        if self.prompt is not None:
            scored, held_out["prompt"] = prompt.text_blocks(context.data, tokenizer, described, self.prompt_exceptions)
            weights = prompt.prompt_weights(model, described.tensors, self.prompt_exceptions, scored)
            described = replace(described, prompt=weights)
            what = "prompts: %d projections in int8, the others by the weights that write"
            context.reporter.log.info(what, len(weights))
        pooling = None if described.shape.has_head else read_pooling(context.input.path)
        task = write_folder(
            context, model, described, pooling, fused=self.fused, chunk_size=self.chunk_size,
            max_length=self._room(described.shape), all_logits=self.logits == "all",
        )  # fmt: skip
        return expectations(model, tokenizer, task, pooling, described, self.chunk_size), held_out


def no_operators(model: ModelShape, *, fused: bool) -> Iterator[Problem]:
    """What of a model, whatever its weights' format, no operators compute."""
    if model.hidden_act not in ACTIVATIONS:
        what = f"activation {model.hidden_act!r} has no ONNX operators here"
        yield Problem("", what, f"supported: {', '.join(ACTIVATIONS)}")
    if model.rotary_dim and model.rope_type not in ROPE_TYPES:
        what = f"rotary embeddings of type {model.rope_type!r} depend on the text's length, which a table can't"
        yield Problem("", what, f"supported: {', '.join(ROPE_TYPES)}")
    if not fused or model.family.kind != "decoder" or None not in (model.mixers or (None,)):
        return
    half = (model.rotary_dim + 1) // 2
    width = padded_width(half)
    what = ""
    if model.head_dim % 8:
        what = f"needs heads of a multiple of 8, these have {model.head_dim}"
    elif 2 * width > model.head_dim:
        what = f"can't rotate {2 * half} of {model.head_dim} lanes"
    elif width != half and model.model_type.endswith("qwen3"):  # whose q and k are normed apart
        what = "can't rotate heads of this width where q and k stand apart"
    if what:
        yield Problem("fused", f"GroupQueryAttention {what}", "set fused: false")


def _refuse_other_format(artifact: Artifact, wanted: str) -> None:
    if artifact.format != "quantized":
        return
    scheme = artifact.config.get("quantization_config", {}).get("scheme", "")
    if scheme in SCHEMES and (problem := _other_format(wanted, scheme)):
        raise StageFailed(f"export-onnx.{problem.where}", problem.what, problem.fix)


def _other_format(wanted: str, scheme: str) -> Problem | None:
    """What is wrong where `wanted` is asked of weights of `scheme`."""
    if wanted == "auto" or (wanted in _SCHEMES and SCHEMES[_SCHEMES[wanted]].bits == SCHEMES[scheme].bits):
        return None
    what = f"format {wanted!r} was asked of weights that are quantised as {scheme!r} already"
    return Problem("format", what, "leave format out, or change the stage that quantised them")


def _refuse_missing(described: Model, *, fused: bool) -> None:
    """Raises StageFailed for a tensor that no operator can hold, before anything is written."""
    from compress.quant.qtensor import QTensor

    table = f"{described.prefix}{described.shape.family.token_embedding}.weight"
    schemes = {(one.scheme, name == table) for name, one in described.tensors.items() if isinstance(one, QTensor)}
    for scheme, is_table in schemes:
        if problem := _cannot_hold(scheme, fused=fused, is_table=is_table):
            raise StageFailed(f"export-onnx.{problem.where}", problem.what, problem.fix)


def _cannot_hold(scheme: Scheme, *, fused: bool, is_table: bool = False) -> Problem | None:
    """What is wrong with `scheme` where ONNX Runtime, or the standard, has no operators for it."""
    if not fused:
        return _no_standard_operator(scheme)
    from compress.exports.onnx.operators import lacking, missing_for

    operator = missing_for(scheme, is_table=is_table)
    return lacking("format", operator, "upgrade onnxruntime, or choose another scheme") if operator else None


def _no_standard_operator(scheme: Scheme) -> Problem | None:
    what = f"{scheme.name} weights have no standard operator: DequantizeLinear takes 4 bits or 8"
    return Problem("fused", what, "leave fused: true") if scheme.bits == 2 else None


def _missing_window() -> Problem | None:
    from compress.exports.onnx.operators import WINDOW, lacking, missing

    fix = "upgrade onnxruntime, or convert without window"
    return lacking("", f"{WINDOW} of opset 23", fix) if missing([WINDOW]) else None


def _missing_int8() -> Problem | None:
    from compress.exports.onnx.operators import lacking, missing

    operator = "DynamicQuantizeMatMul"
    return lacking("prompt", operator, "upgrade onnxruntime, or remove it") if missing([operator]) else None


def _missing_cache() -> Problem | None:
    from compress.exports.onnx.operators import INT8_CACHE, lacking, missing

    return lacking("kv_cache", INT8_CACHE, "upgrade onnxruntime, or remove it") if missing([INT8_CACHE]) else None
