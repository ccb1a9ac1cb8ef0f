"""How a stage's options say which layers: a number of them, a share, or a list of indices. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def _one_message(least: int) -> WrapValidator:
    """One message for the whole union, where pydantic has one for each branch."""

    def in_one_message(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(tuple(value) if isinstance(value, list) else value)  # behind us, strict refuses a JSON list
        except ValidationError as error:
            what = f"expected a number of layers from {least}, a share between 0 and 1, or a list of layer indices"
            raise ValueError(what) from error

    return WrapValidator(in_one_message)


Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Indices = Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(min_length=1)]
Layers = Annotated[Annotated[int, Field(strict=True, ge=1)] | Share | Indices, _one_message(1)]
"""Layers, at least one."""
LayersOrNone = Annotated[Annotated[int, Field(strict=True, ge=0)] | Share | Indices, _one_message(0)]
"""Layers, or 0 for none."""


def count(asked: int | float | tuple[int, ...], total: int) -> int:
    """How many of `total` layers are meant."""
    if isinstance(asked, tuple):
        return len(asked)
    return round(asked * total) if isinstance(asked, float) else asked
