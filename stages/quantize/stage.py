"""`quantize`: weights as integer codes and scales, in the arithmetic of the operators that will run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem
from compress.hardware import this_machine
from compress.models.anatomy import ModelShape
from compress.quant.schemes import SCHEMES, W8_BLOCK32, W8_DYNAMIC, Scheme
from compress.stage import Stage, StageContext

if TYPE_CHECKING:
    from compress.models.parts import Parts
    from compress.quant.apply import Quantized

VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Any of these multiplies unsigned by signed bytes without overflow."""


class Quantize(Stage):
    """Replaces weights by codes and scales. What computes with them is chosen by the scheme, when it is exported."""

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "store weights as 4- or 8-bit codes, fitted to least output error"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "quantized"
    data: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train"})

    scheme: Literal["w4-block32", "w8-dynamic"] = Field(
        "w4-block32",
        description="w4-block32: 4-bit weights, a scale for each 32 inputs (MatMulNBits); w8-dynamic: 8-bit weights, a "
        "scale for each output, activations rounded to 8 bits as they come (MatMulInteger)",
    )
    search: Literal["none", "output", "gptq"] = Field(
        "gptq",
        description="how scales and codes are found. none: round to nearest; output: least error of the outputs on "
        "training text; gptq: the same, and each channel's error is made good by later ones",
    )
    tokens: int = Field(8192, ge=1, description="training tokens that output and gptq are fitted on")
    sequence_length: int = Field(256, ge=2, description="tokens of each text block that is fitted on")
    weight_only: Literal["auto"] | tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        "auto",
        description="w8-dynamic: projections to keep from rounded activations, by the end of their names (down_proj); "
        "they get 8-bit block-wise weights. auto: those with outliers, found on training text",
    )
    reduce_range: Literal["auto"] | bool = Field(
        "auto", validate_default=True,
        description="w8-dynamic: 7-bit weights, so that no product overflows; auto: where this CPU has no VNNI",
    )  # fmt: skip

    @field_validator("reduce_range")
    @classmethod
    def _as_this_cpu_needs(cls, value: Literal["auto"] | bool, others: ValidationInfo) -> Literal["auto"] | bool:
        """`auto` becomes what it means here, so that the artifact's key tells one CPU's weights from another's."""
        if value != "auto" or others.data.get("scheme") != W8_DYNAMIC.name:
            return value
        return VNNI_FLAGS.isdisjoint(this_machine().flags)

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the options belong to the scheme, the text blocks fit, and named projections exist."""
        for option in ("weight_only", "reduce_range"):
            if option in self.model_fields_set and not self._scheme.dynamic:
                yield Problem(option, f"has no say where the scheme is {self.scheme}", "remove it")
        attention, mlp = model.family.attention, model.family.mlp
        paths = [f"{attention.path}.{leaf}" for leaf in (attention.q, attention.k, attention.v, attention.qkv) if leaf]
        paths += [f"{attention.path}.{attention.out}", *(path for path in (mlp.gate, mlp.up, mlp.down) if path)]
        layers = [f"{model.family.layers}.{i}.{path}" for i in range(model.num_hidden_layers) for path in paths]
        for name in self.weight_only if self.weight_only != "auto" else ():
            if not any(path.endswith(name) for path in layers):
                yield Problem("weight_only", f"no projection's name ends with {name!r}", f"known: {', '.join(paths)}")
        if self.sequence_length > model.max_position_embeddings:
            what = f"{self.sequence_length} is beyond the model's {model.max_position_embeddings} positions"
            yield Problem("sequence_length", what, f"at most {model.max_position_embeddings}")
        if self.tokens < self.sequence_length:
            what = f"{self.tokens} tokens do not fill one block of sequence_length {self.sequence_length}"
            yield Problem("tokens", what, f"at least {self.sequence_length}")

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Codes and scales of layers and token tables, float32 for positions."""
        table = W8_BLOCK32 if self._scheme.dynamic else self._scheme
        k = model.hidden_size
        layers = model.num_hidden_layers * model.num_layer_parameters
        tables = model.vocab_size * k * (1 if model.tie_word_embeddings else 2)
        positions = max(0, model.num_embedding_parameters - tables)
        return (self._scheme.bits_per_weight(k) * layers + table.bits_per_weight(k) * tables) / 8 + 4.0 * positions

    def twin(self) -> Self:
        """The same, on four short blocks."""
        return self.model_copy(update={"tokens": 64, "sequence_length": 16})

    def run(self, context: StageContext) -> Metrics:
        """Fit codes and scales, and write them with `errors.json` and `errors.png`."""
        from compress.models.load import load_model
        from compress.models.parts import Parts
        from compress.quant.store import save_quantized
        from compress.stages.quantize.plot import plot_errors

        model = load_model(context.input.path)
        parts = Parts(model)
        found = self._quantize(parts, context)
        save_quantized(model, found.tensors, self._scheme, context.input.path, context.out)
        write_json(context.out / "errors.json", {
            "options": self.model_dump(mode="json"), "reduce_range": self._scheme.bits == 7, "errors": found.errors,
            "rounding": found.rounding, "weight_only": found.weight_only,
        })  # fmt: skip
        plot_errors(found.errors, found.rounding, context.out / "errors.png")
        if found.weight_only:
            context.reporter.log.info("quantize: not rounding the activations of %s", ", ".join(found.weight_only))
        num_weights = sum(tensor.codes.numel() for tensor in found.tensors.values())
        num_bits = sum(8 * part.nbytes for tensor in found.tensors.values() for part in tensor.pack().values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"result": {"parameters": parameters, "bits_per_weight": num_bits / num_weights}}

    @property
    def _scheme(self) -> Scheme:
        scheme = SCHEMES[self.scheme]
        return scheme.reduced if scheme.dynamic and self.reduce_range else scheme

    def _quantize(self, parts: Parts, context: StageContext) -> Quantized:
        import torch

        from compress.models.load import load_tokenizer
        from compress.quant.apply import calibrate_model, round_model

        needs_text = self.search != "none" or (self._scheme.dynamic and self.weight_only == "auto")
        if not needs_text:
            return round_model(parts, self._scheme, self.weight_only)
        tokenizer = load_tokenizer(context.input.path)
        ids_BT = torch.from_numpy(context.data.blocks("train", tokenizer, self.sequence_length, self.tokens))
        with context.reporter.progress("fitting layers", len(parts.layers)) as advance:
            return calibrate_model(parts, self._scheme, self.search, ids_BT, self.weight_only, advance)
