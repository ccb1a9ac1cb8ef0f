"""The heads that models may have, told once: for reading, judging, training and exporting. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["decoder", "encoder"]
Task = Literal["causal", "masked", "classification", "embedding"]
"""What a model is judged by: next tokens, hidden tokens, classes, or its hidden states alone."""


@dataclass(frozen=True)
class Head:
    """What the class of a model ends with, and what follows from it.

    suffix: of transformers' class name. auto: transformers' auto class that reads it. export: optimum's name of the
    task. kind: of the families that have it here. modules: what of its weights is the head, by path. per_token: it says
    something of each token, without predicting text. left_over: weights of folders as they are published that are no
    part of such a model, by the beginning of their names: those of the class that it was trained as.
    """

    suffix: str
    task: Task
    auto: str
    export: str
    kind: Kind
    modules: tuple[str, ...]
    per_token: bool = False
    left_over: tuple[str, ...] = ()


BACKBONE = Head("Model", "embedding", "AutoModel", "feature-extraction", "encoder", ())
HEADS = (
    Head("ForCausalLM", "causal", "AutoModelForCausalLM", "text-generation-with-past", "decoder", ("lm_head",)),
    Head("LMHeadModel", "causal", "AutoModelForCausalLM", "text-generation-with-past", "decoder", ("lm_head",)),
    Head(
        "ForMaskedLM", "masked", "AutoModelForMaskedLM", "fill-mask", "encoder", ("cls.predictions",),
        per_token=True, left_over=("bert.pooler.", "cls.seq_relationship."),
    ),
    Head(
        "ForSequenceClassification", "classification", "AutoModelForSequenceClassification", "text-classification",
        "encoder", ("bert.pooler", "classifier"),
    ),
    Head(
        "ForTokenClassification", "classification", "AutoModelForTokenClassification", "token-classification",
        "encoder", ("classifier",), per_token=True, left_over=("bert.pooler.",),
    ),
    BACKBONE,
)  # fmt: skip
_UNREAD = {
    "v_head.": "a value head", "score.": "a classifier of a decoder", "qa_outputs.": "a question answering head",
    "multiple_choice_head.": "a multiple choice head",
}  # fmt: skip
"""Weights, by the beginning of their names, of heads that no class here has."""
_STEMS = {"gpt_neox": "GPTNeoX", "gpt2": "GPT2"}
"""What transformers' classes of a model type begin with, where that is not the type with a capital letter."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a parsed `config.json` names; `""` where it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def named_head(architecture: str) -> Head | None:
    """The head of a class by its name; None for one that is not known here.

    A backbone's name has nothing but the family before `Model`: `GPT2DoubleHeadsModel` is none.
    """
    head = next((head for head in HEADS if architecture.endswith(head.suffix)), None)
    stem = architecture.removesuffix(BACKBONE.suffix)
    return None if head is BACKBONE and ("For" in stem or "Head" in stem) else head


def misfit(config: Mapping[str, Any], kind: Kind | None, names: Collection[str]) -> tuple[str, str] | None:
    """(what is wrong with a model's head, what to do), or None.

    kind: of its family, None where that is not known here. names: of its weights.
    """
    architecture, stem = architecture_of(config), _stem(str(config.get("model_type")))
    if not architecture:
        named = f"{stem}{_guess(kind, stem, names).suffix}" if kind else "…Model"
        return "has a config.json without architectures", f'add "architectures": ["{named}"] to it'
    head = named_head(architecture)
    supported = ", ".join(dict.fromkeys(stem + each.suffix for each in _of(kind, stem)))
    if architecture.endswith("ForPreTraining") and kind == "encoder":
        masked = f'"architectures": ["{stem}ForMaskedLM"]'
        return f"is of the class {architecture}, whose heads are not supported", f"write {masked}, which reads it too"
    if head is None and kind is None:
        return f"has a head that is not supported: {architecture}", f"supported: {', '.join(h.suffix for h in HEADS)}"
    if head is None or head.kind != (kind or head.kind):
        without = kind == "decoder" and head is not None
        what = "is a decoder without a language head, which is" if without else "has a head that is"
        return f"{what} not supported: {architecture}", f"supported: {supported}"
    unread = next((what for start, what in _UNREAD.items() if any(name.startswith(start) for name in names)), None)
    if unread is None:
        return None
    return f"has {unread} beside {architecture}, which is not supported", f"supported: {supported} alone"


def lacks_pooler(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a bare BERT was saved without a pooler, so that it has no pooled output and everything else."""
    bare = str(config.get("model_type")).endswith("bert") and named_head(architecture_of(config)) is BACKBONE
    return bare and bool(names) and not any(name.startswith(("pooler.", "bert.pooler.")) for name in names)


def _of(kind: Kind | None, stem: str) -> list[Head]:
    """The heads that a class of that beginning can have."""
    other = "ForCausalLM" if stem == "GPT2" else "LMHeadModel"
    return [head for head in HEADS if head.kind == kind and head.suffix != other]


def _guess(kind: Kind, stem: str, names: Collection[str]) -> Head:
    """The head that weights of these names are of: of those whose modules they all have, the one with most."""
    modules = [f"{name}." for name in names]
    fits = [
        head for head in _of(kind, stem)
        if kind == "decoder" or all(any(m.startswith(f"{own}.") for m in modules) for own in head.modules)
    ]  # fmt: skip
    return max(fits, key=lambda head: len(head.modules), default=BACKBONE)


def _stem(model_type: str) -> str:
    return _STEMS.get(model_type, model_type.capitalize())
