"""`quantize`: weights as integer codes and scales, in the arithmetic of the operators that will run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import counted
from compress.quant import bnb
from compress.quant.options import QuantizeOptions, SchemeKey
from compress.stage import Given, Stage, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from compress.quant.quantized import Quantized


_BYTES_OF_A_FIT = 4 + 3 * 8


class Quantize(QuantizeOptions, Stage):
    """Replaces weights by codes and scales. What computes with them is chosen by the scheme, when it is exported."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 5
    summary: ClassVar[str] = "store weights as 2-, 4- or 8-bit codes, fitted to least output error"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "quantized"
    plots: ClassVar[Mapping[str, str]] = {"errors.png": "what rounding does to the output of each projection"}

    scheme: SchemeKey | bnb.BnbScheme = Field(  # type: ignore[assignment]  # more than what can be trained
        "w4-block32",
        description=f"{QuantizeOptions.model_fields['scheme'].description}; bnb-nf4, bnb-int8: bitsandbytes' 4 and 8 "
        "bits, for PyTorch only",
    )

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the options belong together and to the model, and the text is enough."""
        if self.scheme in bnb.BITS:
            yield from bnb.misfits("scheme", bnb.BITS[self.scheme], model)
            for option in sorted(self.model_fields_set - {"scheme"}):
                yield Problem(option, f"has no say where the scheme is {self.scheme}", "remove it")
            return
        yield from self.problems(model)
        for option in ("tokens", "sequence_length"):
            if option in self.model_fields_set and not self.needs_text:
                yield Problem(option, "has no say where weights are rounded to nearest without text", "remove it")

    @property
    def needs_text(self) -> bool:
        """Whether any option has to see activations."""
        return self.scheme not in bnb.BITS and super().needs_text

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The text that weights and ranges are fitted on, where any is."""
        return frozenset({"train"}) if self.needs_text else frozenset()

    def settled(self, given: Given) -> Mapping[str, Any]:
        return {"scheme": self.scheme} if self.scheme in bnb.BITS else counted(self, self.meant(given.shape))

    def computes_with(self, given: Given) -> frozenset[str]:
        return self.libraries | ({bnb.METHOD} if self.scheme in bnb.BITS else set())

    def rounds_activations(self, given: Given) -> bool:
        return self.scheme not in bnb.BITS and self.rounds

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """What is written with these options."""
        bits = bnb.BITS.get(self.scheme)
        return self.stored_bytes(model) if bits is None else bnb.stored_bytes(bits, model)

    def held_bytes(self, model: ModelShape) -> float | None:
        """All codes, a byte each, scales, and token tables in float32; beside them a rounded one, or a layer's fit.

        A fit holds the inputs' second moments (K, K), and them and two factors of theirs in float64.
        """
        if self.scheme in bnb.BITS:
            return None
        table = 4.0 * model.vocab_size * model.hidden_size
        tables = table if model.tie_word_embeddings or not model.has_head else 2 * table
        widest = max(model.hidden_size, model.intermediate_size)
        text = 4.0 * self.tokens * model.hidden_size if self.needs_text else 0.0
        fit = text + _BYTES_OF_A_FIT * widest**2 if self.needs_text else 0.0
        return 1.125 * model.num_parameters + tables + max(table, fit)

    def twin(self) -> Self:
        """The same, on four short blocks where it reads any."""
        if not self.needs_text:
            return self
        return self.model_copy(update={"tokens": 64, "sequence_length": 16})

    def run(self, context: StageContext) -> Metrics:
        """Fit codes and scales, and write them with `errors.json` and `errors.png`; bitsandbytes' come alone."""
        if self.scheme in bnb.BITS:
            return bnb.quantize_folder(context.input.path, bnb.BITS[self.scheme], context.out)
        from compress.models.by_layers import load_by_layers
        from compress.models.parts import Parts
        from compress.quant.apply import quantize_model
        from compress.quant.store import save_quantized
        from compress.stages.quantize.plot import plot_errors
        from compress.units import Units

        model, shelf = load_by_layers(context.input.path)
        parts = Parts(model)
        ids_BT = self._text(context)
        units = Units("quantize", context.work / "layers", log=context.reporter.log)
        with context.reporter.progress("fitting layers", len(parts.layers)) as advance:
            found = quantize_model(parts, self, ids_BT, advance, units=units, shelf=shelf)
        save_quantized(model, found.tensors, self.base, context.input.path, context.out)
        write_json(context.out / "errors.json", {
            "options": self.model_dump(mode="json"), "errors": found.errors, "rounding": found.rounding,
            "spared": found.spared, "smoothing": found.smoothing, "unscaled": found.unscaled,
        })  # fmt: skip
        plot_errors(found.errors, found.rounding, context.out / "errors.png")
        _log(found, context)
        num_weights = sum(tensor.codes.numel() for tensor in found.tensors.values())
        num_bits = sum(8 * part.nbytes for tensor in found.tensors.values() for part in tensor.pack().values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"result": {"parameters": parameters, "bits_per_weight": num_bits / num_weights}}

    def _text(self, context: StageContext) -> Tensor | None:
        if not self.needs_text:
            return None
        import torch

        from compress.models.load import load_tokenizer

        tokenizer = load_tokenizer(context.input.path)
        return torch.from_numpy(context.data.blocks("train", tokenizer, self.sequence_length, self.tokens))


def _log(found: Quantized, context: StageContext) -> None:
    log = context.reporter.log
    if found.spared:
        log.info("quantize: not rounding the activations of %s", ", ".join(found.spared))
    if found.unscaled:
        log.info("quantize: nothing to fold a scale into before %s", ", ".join(found.unscaled))
