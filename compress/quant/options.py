"""What every stage that quantises lets a user choose. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.errors import Problem
from compress.hardware import this_machine
from compress.models.anatomy import ModelShape
from compress.quant.choice import MixedSchemes, matches, projections
from compress.quant.schemes import BLOCK_SIZES, SCHEMES, Scheme, SchemeName, not_gathered
from compress.registry import did_you_mean

Method = Literal["rtn", "search", "gptq"]
Scaling = Literal["none", "awq", "smoothquant"]
Ranges = Literal["minmax", "percentile", "entropy"]
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Any of these multiplies unsigned by signed bytes without overflow."""


def _with_blocks_that_run(value: object) -> object:
    """Tells a block size that there is not from a misspelt scheme."""
    found = re.fullmatch(r"w[248]-block(\d+)", value) if isinstance(value, str) else None
    if found and int(found[1]) not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"weights for MatMulNBits are stored in blocks of {sizes}")
    return value


SchemeKey = Annotated[SchemeName, BeforeValidator(_with_blocks_that_run)]
SchemeOrFloat = SchemeKey | Literal["float32"]
Exceptions = dict[Annotated[str, Field(min_length=1)], SchemeOrFloat]


class QuantizeOptions(BaseModel):
    """How weights become codes and scales, and activations' ranges are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: SchemeKey = Field(
        "w4-block32",
        description="w4-blockN, w8-blockN, w2-blockN: weights of so many bits, a scale for each N inputs "
        "(MatMulNBits); ternary: -1, 0, 1 times a scale for each 64 inputs, stored in 2 bits; w8a8-dynamic: 8-bit "
        "weights, a scale for each output, activations rounded to 8 bits as they come (MatMulInteger); w8a8-static: "
        "the same with ranges of activations found on text (QDQ)",
    )
    symmetric: bool = Field(True, description="false: block-wise weights have a zero point for each block")
    method: Method = Field(
        "gptq",
        description="how scales and codes are found. rtn: round to nearest; search: scales of the least error of the "
        "outputs on training text; gptq: the same, and each channel's error is made good by later ones",
    )
    act_order: bool = Field(False, description="gptq: channels with the largest activations first, scales before codes")
    scaling: Scaling = Field(
        "none",
        description="factors of input channels, folded into what is before them so that the float model stays the "
        "same. awq: weights of channels with large activations are rounded finer (block-wise schemes); smoothquant: "
        "outliers of activations move into the weights (w8a8)",
    )
    smoothing: float = Field(0.5, ge=0, le=1, description="smoothquant: share of the outliers that moves")
    exceptions: Literal["auto"] | Exceptions = Field(
        "auto",
        description="schemes, or float32, of other projections than most, by the path of the module or its end "
        "(`layers.0.*`, down_proj): of several that match, the longest. auto: with w8a8, projections that rounded "
        "activations harm get w8-block32, found on training text; else none",
    )
    embeddings: SchemeOrFloat | None = Field(
        None, description="scheme of the token embedding, or float32; left out: block-wise, of 4 or 8 bits"
    )
    head: SchemeOrFloat | None = Field(None, description="the same of an output head with weights of its own")
    reduce_range: Literal["auto"] | bool = Field(
        "auto", validate_default=True,
        description="w8a8: 7-bit weights, so that no product overflows; auto: where this CPU has no VNNI",
    )  # fmt: skip
    ranges: Ranges = Field(
        "minmax",
        description="w8a8-static: the ends of what is seen; percentile: without its outermost 0.01 %; entropy: where "
        "rounding keeps most of the distribution (KL)",
    )
    tokens: int = Field(8192, ge=0, description="training tokens that weights and ranges are fitted on")
    sequence_length: int = Field(256, ge=2, description="tokens of each text block that is fitted on")

    @model_validator(mode="after")
    def _as_this_cpu_needs(self) -> Self:
        """`auto` becomes what it means here, so that the artifact's key tells one CPU's weights from another's."""
        if self.reduce_range == "auto" and any(not scheme.blockwise for scheme in self._named()):
            object.__setattr__(self, "reduce_range", VNNI_FLAGS.isdisjoint(this_machine().flags))
        return self

    @property
    def base(self) -> Scheme:
        """The scheme of most projections, with the zero points or the range that the options ask for."""
        return self._own(SCHEMES[self.scheme])

    @property
    def finds_exceptions(self) -> bool:
        """Whether projections to except are to be found on text."""
        return self.exceptions == "auto" and not self.base.blockwise

    @property
    def needs_text(self) -> bool:
        """Whether any option has to see activations."""
        static = any(scheme.static for scheme in self._named())
        return self.method != "rtn" or self.scaling != "none" or self.finds_exceptions or static

    @property
    def choice(self) -> MixedSchemes:
        """The scheme of each weight, but for the exceptions that are found on text."""
        named: dict[str, Scheme | None] = {}
        if self.exceptions != "auto":  # by length: the order of a mapping is no part of an artifact's key
            by_length = sorted(self.exceptions.items(), key=lambda item: (-len(item[0]), item[0]))
            named = {pattern: self._given(name) for pattern, name in by_length}
        embeddings: Scheme | Literal["table"] | None = self._given(self.embeddings) if self.embeddings else "table"
        head: Scheme | Literal["table"] | None = self._given(self.head) if self.head else "table"
        return MixedSchemes(self.base, named, embeddings, head)

    @property
    def rounds(self) -> bool:
        """Whether ONNX Runtime rounds activations before any of the weights."""
        return any(scheme.rounds_activations(4) for scheme in (*self._named(), self.base.table))

    def meant(self, model: ModelShape) -> dict[str, Any]:
        """What null and auto mean for that model, and None for what has no say, by option: for a stage's key."""
        found: dict[str, Any] = {option: None for option, has_a_say in self._says().items() if not has_a_say}
        if self.exceptions == "auto" and not self.finds_exceptions:
            found["exceptions"] = None
        if not self.needs_text:
            found |= {"tokens": None, "sequence_length": None}
        has_own_head = model.family.kind == "decoder" and not model.tie_word_embeddings
        return {
            **found, "embeddings": _name(self.choice.of("", "embedding")),
            "head": _name(self.choice.of("", "head")) if has_own_head else None,
        }  # fmt: skip

    def stored_bytes(self, model: ModelShape) -> float:
        """Codes and scales of the layers and token tables of a quantised `model`, and what else there is as floats."""
        choice, k, vocabulary = self.choice, model.hidden_size, model.vocab_size
        embedding, head = choice.of("", "embedding"), choice.of("", "head")
        sizes = [(choice.of(path, "projection"), n, k) for path, n, k in projections(model)]
        sizes.append((embedding and embedding.filling(k), vocabulary, k))
        if not model.tie_word_embeddings and model.family.kind == "decoder":
            sizes.append((head, vocabulary, k))
        quantised = [(scheme.bits_per_weight(k), n * k) for scheme, n, k in sizes if scheme]
        num_quantised = sum(size for _, size in quantised)
        floats = model.bytes_per_weight * (model.num_parameters - num_quantised)
        return sum(bits * size for bits, size in quantised) / 8 + floats

    def problems(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit together, or does not fit `model`; `where` is the option's name."""
        yield from self._without_a_say()
        yield from self._unknown_paths(model)
        yield from self._unsupported(model)
        if self.sequence_length > model.max_position_embeddings:
            what = f"{self.sequence_length} is beyond the model's {model.max_position_embeddings} positions"
            yield Problem("sequence_length", what, f"at most {model.max_position_embeddings}")
        if self.needs_text and self.tokens < self.sequence_length:
            static = ", and static ranges are found on text" if any(s.static for s in self._named()) else ""
            what = f"{self.tokens} tokens do not fill one block of sequence_length {self.sequence_length}{static}"
            yield Problem("tokens", what, f"at least {self.sequence_length}")

    def _says(self) -> dict[str, bool]:
        """Whether each option that may have no say has one."""
        named = self._named()
        rounds = any(not scheme.blockwise for scheme in named)
        return {
            "symmetric": any(scheme.blockwise and not scheme.ternary for scheme in named),
            "act_order": self.method == "gptq",
            "smoothing": self.scaling == "smoothquant",
            "exceptions": self.exceptions != "auto" or rounds,
            "reduce_range": rounds,
            "ranges": any(scheme.static for scheme in named),
        }

    def _without_a_say(self) -> Iterator[Problem]:
        rounds = any(not scheme.blockwise for scheme in self._named())
        for option, has_a_say in self._says().items():
            if option in self.model_fields_set and not has_a_say:
                yield Problem(option, f"has no say where {self._summary(option)}", "remove it")
        if self.scaling == "smoothquant" and not rounds:
            what = f"smoothquant spares rounded activations, and {self.scheme} rounds none"
            yield Problem("scaling", what, "use scaling: awq")
        if self.scaling == "awq" and not self.base.blockwise:
            what = f"awq leaves the activations' outliers, which {self.scheme} rounds"
            yield Problem("scaling", what, "use scaling: smoothquant")

    def _summary(self, option: str) -> str:
        if option == "act_order":
            return f"the method is {self.method}"
        return f"scaling is {self.scaling}" if option == "smoothing" else f"the scheme is {self.scheme}"

    def _unknown_paths(self, model: ModelShape) -> Iterator[Problem]:
        paths = [path for path, _, _ in projections(model)]
        first = f"{model.family.backbone}.{model.family.layers}.0."
        for pattern in self.exceptions if self.exceptions != "auto" else ():
            if not any(matches(path, pattern) for path in paths):
                fix = did_you_mean(pattern, (path.removeprefix(first) for path in paths if path.startswith(first)))
                yield Problem("exceptions", f"no projection's path is or ends with {pattern!r}", fix)

    def _unsupported(self, model: ModelShape) -> Iterator[Problem]:
        if self.head and (model.tie_word_embeddings or model.family.kind == "encoder"):
            yield Problem("head", "this model has no output head with weights of its own", "use embeddings")
        table = self._given(self.embeddings) if self.embeddings else None
        if table and (what := not_gathered(table)):
            yield Problem("embeddings", what, "use a block-wise scheme, or float32")

    def _named(self) -> list[Scheme]:
        """Every scheme that the options name."""
        others = self.exceptions.values() if self.exceptions != "auto" else ()
        names = {self.scheme, *others, self.embeddings, self.head} - {None, "float32"}
        return [SCHEMES[name] for name in names if name in SCHEMES]

    def _given(self, name: str) -> Scheme | None:
        return None if name == "float32" else self._own(SCHEMES[name])

    def _own(self, scheme: Scheme) -> Scheme:
        if not scheme.blockwise:
            return scheme.reduced if self.reduce_range is True else scheme
        return scheme if self.symmetric or scheme.ternary else scheme.asymmetric


def _name(scheme: Scheme | None) -> str:
    """What tells a table's scheme from others."""
    return "float32" if scheme is None else scheme.name + ("" if scheme.symmetric else " with zero points")
