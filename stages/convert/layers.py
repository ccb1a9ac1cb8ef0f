"""Which layers of a model can be converted to what, and why not the others. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from compress.errors import Problem
from compress.mixers.spec import FULL, LINEAR, SLIDING, WINDOWED, MixerSpec
from compress.models.anatomy import ModelShape
from compress.models.config import HYBRID
from compress.models.layer_choice import count

To = Literal["linear", "gated-linear", "mamba2", "gated-delta", "sliding"]
Asked = int | float | tuple[int, ...]
_FOLLOWS = {"mamba2": "linear"}
"""Mixers that go on from another one: the second step of Attention to Mamba."""


def kinds(model: ModelShape) -> list[str]:
    """What each layer mixes its tokens with: a mixer's type, `full_attention` or `sliding_attention`."""
    types = model.layer_types or (FULL,) * model.num_hidden_layers
    mixers = model.mixers or (None,) * model.num_hidden_layers
    return [spec.type if spec else kind for kind, spec in zip(types, mixers, strict=True)]


def candidates(model: ModelShape, to: To) -> list[int]:
    """The layers that `to` takes: those with the mixer that it goes on from, else those with softmax attention."""
    found = kinds(model)
    before = _FOLLOWS.get(to)
    wanted = before if before in found else FULL
    return [index for index, kind in enumerate(found) if kind == wanted]


def to_convert(model: ModelShape, to: To, keep: Asked | None, convert: Asked | None) -> list[int] | int:
    """The layers to convert where they are listed or all of them are meant, else how many."""
    free = candidates(model, to)
    if isinstance(convert, tuple):
        return sorted(convert)
    if isinstance(keep, tuple):
        return [index for index in free if index not in keep]
    others = sum(kind == FULL for index, kind in enumerate(kinds(model)) if index not in free)
    number = count(convert, model.num_hidden_layers) if convert is not None else len(free)
    if keep is not None:
        number += others - count(keep, model.num_hidden_layers)
    return free if number == len(free) else number


def converted_shape(model: ModelShape, layers: Sequence[int], mixer: MixerSpec | None, *, guessed: bool) -> ModelShape:
    """`model` with `layers` converted to `mixer`, None for a sliding window. guessed: only their number is known.

    A mixer that goes on from another one has its feature map.
    """
    types = list(model.layer_types or (FULL,) * model.num_hidden_layers)
    mixers = list(model.mixers or (None,) * model.num_hidden_layers)
    for index in layers:
        types[index] = LINEAR if mixer else SLIDING
        before = mixers[index]
        mixers[index] = replace(mixer, feature_map=before.feature_map) if mixer and before else mixer
    return replace(
        model, model_type=HYBRID + model.model_type.removeprefix(HYBRID), layer_types=tuple(types),
        mixers=tuple(mixers), layers_guessed=guessed or model.layers_guessed,
    )  # fmt: skip


def impossible(model: ModelShape, to: To) -> Iterator[Problem]:
    """Why a model can't be converted at all; `where` is the option."""
    if not model.family.takes_mixers:
        what = f"{model.model_type} keeps q, k and v in one fused matrix, which no mixer is made from"
        yield Problem("to", what, "convert a llama, mistral, qwen2, qwen3 or bert model")
        return
    if model.family.kind == "encoder" and to != "linear":
        what = f"{model.model_type} reads text in both directions, and {to} in one"
        yield Problem("to", what, "encoders take to: linear")
    if to in _FOLLOWS and any(spec and spec.window for spec in model.mixers):
        yield Problem(
            "to", f"{to} has no window, and the model's linear layers have one", "convert them with window: 0"
        )
    for feature in model.attention_features:
        yield Problem("to", f"the model's attention has {feature}, which can't be carried over", "take another model")
    if not model.attention_features and not candidates(model, to):
        has = " and ".join(sorted(set(kinds(model))))
        yield Problem("to", f"no layer is left that could be converted: they have {has}", "leave this stage out")


def misfitting_window(model: ModelShape, to: To, window: int, lengths: Mapping[str, int]) -> Iterator[Problem]:
    """Where a window covers all that is there. lengths: of the texts that are trained on, by option."""
    for name, length in {"the model's positions": model.max_position_embeddings, **lengths}.items():
        if window >= length:
            then = "it would change nothing there" if to == "sliding" else "nothing is left for the linear attention"
            what = f"{window} tokens are no fewer than {name}, {length}: {then}"
            yield Problem("window", what, f"at most {length - 1}")
    if to in WINDOWED and window and model.family.kind == "encoder":
        what = f"{model.model_type} reads text in both directions, and a window looks back"
        yield Problem("window", what, "remove it")


def misnumbered(model: ModelShape, to: To, keep: Asked | None, convert: Asked | None) -> Iterator[Problem]:
    """What is wrong with the layers that are asked for, in a model that can be converted."""
    option, asked = ("keep", keep) if keep is not None else ("convert", convert)
    free, found, total = candidates(model, to), kinds(model), model.num_hidden_layers
    chosen = to_convert(model, to, keep, convert)
    number = len(chosen) if isinstance(chosen, list) else chosen
    if isinstance(asked, tuple) and (len(set(asked)) < len(asked) or max(asked) >= total):
        what = f"{list(asked)} has an index twice or beyond the model's {total} layers"
        yield Problem(option, what, f"list different indices from 0 to {total - 1}")
    elif isinstance(asked, tuple) and not model.layers_guessed and not set(asked) <= set(free):
        wrong = ", ".join(f"layer {index} has {found[index]}" for index in asked if index not in free)
        yield Problem(option, f"{wrong}, and {to} is made from {found[free[0]]}", f"choose from {free}")
    elif not 0 < number <= len(free):
        fix = f"choose {f'0 to {len(free) - 1}' if option == 'keep' else f'1 to {len(free)}'}"
        what = f"are {number}, and {len(free)} can be converted" if number > 0 else "leaves none to convert"
        yield Problem(option, f"{asked} of {total} layers {what}", fix)
    elif keep is not None and found[free[0]] != FULL and chosen != free:
        what = f"{keep} is not the number of softmax layers, and {to} is made from the {found[free[0]]} ones"
        yield Problem(option, what, "leave keep out, or say with convert how many of those")


def evenly(layers: Sequence[int], num_kept: int) -> list[int]:
    """`layers` without `num_kept` of them, evenly spaced: the middle one of each of as many equal groups."""
    kept = {(2 * i + 1) * len(layers) // (2 * num_kept) for i in range(num_kept)}
    return [layer for position, layer in enumerate(layers) if position not in kept]


def at_random(layers: Sequence[int], number: int, seed: int) -> list[int]:
    """`number` of `layers` drawn without replacement: the control that every score has to beat."""
    return sorted(random.Random(seed).sample(layers, number))
