"""The options of `choose-format`, and the candidates that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from compress.pipeline.wording import validate
from compress.quant.schemes import SCHEMES
from compress.registry import did_you_mean, stage_class
from compress.stage import SOURCE
from compress.stages.choose.budget import Budget

FLOAT = "fp32"
Options = dict[str, Any]
Way = tuple[tuple[str, Mapping[str, Any]], ...]
"""The hidden stages that lead to a candidate, with their options."""
_CHOSEN = {"quantize": "scheme", "export-onnx": "format"}
"""The option of each hidden stage that tells candidates apart."""
_OF_EXPORT = ("prompt", "prompt_exceptions", "chunk_size", "kv_cache")
"""Options of a scheme that are the export's."""


def _of_known_scheme(entry: str | dict[str, Options]) -> str | dict[str, Options]:
    if isinstance(entry, dict) and len(entry) != 1:
        raise ValueError("is not one scheme with its options; write `- scheme: {option: value}`")
    if (name := _named(entry)[0]) not in (FLOAT, *SCHEMES):
        raise ValueError(f"is no scheme that ONNX Runtime can run; {did_you_mean(name, (FLOAT, *SCHEMES))}")
    return entry


Entry = Annotated[str | dict[str, Options], AfterValidator(_of_known_scheme)]


class Weights(BaseModel):
    """How often each phase counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: float = Field(0, ge=0, description="prompts read")
    decode: float = Field(0, ge=0, description="tokens written")


class ChooseOptions(BaseModel):
    """What is tried, what quality it may cost, and what is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantize: Options = Field({}, description="options of the quantize stage that all schemes share")
    export: Options = Field({}, description="options of the export-onnx stage")
    schemes: tuple[Entry, ...] = Field(
        (FLOAT, "w8a8-dynamic", "w8-block32", "w4-block32", "w4-block128"), min_length=1,
        description="what is tried: fp32 and quantize's schemes; one with options of its own as {scheme: {option: …}}: "
        "quantize's, or prompt, prompt_exceptions, chunk_size and kv_cache of export-onnx",
    )  # fmt: skip
    budget: Budget | None = Field(
        None, description="what quality it may cost; left out: perplexity 1.05, or cosine 0.99, or top1_agreement 0.98"
    )
    max_size_mb: float | None = Field(None, gt=0, description="the largest export that may be chosen")
    against: str = Field(SOURCE, description="the model that quality is held against: source, or an earlier stage's id")
    tokens: int = Field(8192, ge=8, description="tokens of the eval split: half of the blocks choose, half are told")
    sequence_length: int = Field(256, ge=4, description="tokens of each block of them")
    prefer: Literal["both", "prefill", "decode"] | Weights = Field(
        "both",
        description="what is to be fast. prefill: the prompt; decode: each new token; both: a prompt and new_tokens "
        "tokens; or so many of each, {prefill: 1, decode: 200}",
    )
    prompts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128, 1024), min_length=1, description="prompt lengths in tokens; what counts is the mean over them"
    )
    new_tokens: int = Field(32, ge=1, description="tokens decoded after each prompt")
    repeats: int = Field(10, ge=3, description="rounds after the warm-up, each measuring every candidate once")
    max_seconds: float = Field(300, gt=0, description="begin no round that would end later, but run at least 3")

    @field_validator("quantize", "export")
    @classmethod
    def _can_be_shared(cls, options: Options, info: ValidationInfo) -> Options:
        name = "quantize" if info.field_name == "quantize" else "export-onnx"
        if (chosen := _CHOSEN[name]) in options:
            raise ValueError(f"{chosen} is what this stage chooses; name what is tried in schemes")
        _refuse_misfits(name, options)
        return options

    @field_validator("schemes")
    @classmethod
    def _can_be_made(cls, entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
        for entry in entries:
            name, own = _named(entry)
            if entries.count(entry) > 1:
                raise ValueError(f"{name} is there twice; remove one")
            if name == FLOAT and own:
                raise ValueError(f"{FLOAT} has no options; write it alone")
            if name != FLOAT:
                quantize, export = _parted(own)
                _refuse_misfits("quantize", {**info.data.get("quantize", {}), **quantize, "scheme": name}, f"{name}: ")
                _refuse_misfits("export-onnx", {**info.data.get("export", {}), **export}, f"{name}: ")
        return entries

    @field_validator("prefer")
    @classmethod
    def _prefers_something(cls, prefer: str | Weights) -> str | Weights:
        if isinstance(prefer, Weights) and not prefer.prefill + prefer.decode:
            raise ValueError("nothing counts; give a number above 0, as in {prefill: 1, decode: 200}")
        return prefer

    def ways(self) -> Mapping[str, Way]:
        """How each candidate is made, by its name: the scheme's, numbered where there are several of one.

        What reads prompts in another way is named by it too: `w4-block32-int8-prompt`.
        """
        seen: Counter[str] = Counter()
        found: dict[str, Way] = {}
        for scheme, own in map(_named, self.schemes):
            quantize, export = _parted(own)
            prompt = {**self.export, **export}.get("prompt")
            name = f"{scheme}-{prompt}-prompt" if prompt and scheme != FLOAT else scheme
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name}-{seen[name]}"
            if scheme == FLOAT:
                shared = {key: value for key, value in self.export.items() if not key.startswith("prompt")}
                found[name] = (("export-onnx", {**shared, "format": FLOAT}),)
            else:
                how = {**self.quantize, **quantize, "scheme": scheme}
                found[name] = ("quantize", how), ("export-onnx", {**self.export, **export})
        return found


def _named(entry: str | dict[str, Options]) -> tuple[str, Options]:
    return (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))


def _parted(own: Options) -> tuple[Options, Options]:
    """A scheme's own options: those of quantize, and those of export-onnx."""
    return (
        {key: value for key, value in own.items() if key not in _OF_EXPORT},
        {key: value for key, value in own.items() if key in _OF_EXPORT},
    )


def _refuse_misfits(name: str, options: Options, prefix: str = "") -> None:
    """Raises ValueError for options that the stage called `name` does not take."""
    for steps, what, fix in validate(stage_class(name), options)[1]:
        raise ValueError(f"{prefix}{'.'.join(map(str, steps))} {what}; {fix}")
