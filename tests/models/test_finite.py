"""Weights that are no numbers are named where they are read, before any stage blames something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.models.load import load_model

UP, DOWN = (f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj"))


def with_values(folder: Path, out: Path, values: dict[str, list[float]]) -> Path:
    """A copy whose tensors of these names begin with these values."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    weights = load_file(file)
    for name, given in values.items():
        weights[name].view(-1)[: len(given)] = torch.tensor(given)
    save_file(weights, file, {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({UP: [float("nan")]}, f"{UP} holds 1 NaN or infinite values;"),
        ({UP: [float("inf"), -float("inf")], DOWN: [float("nan")]}, f"{UP} holds 2 .*, and there are more in 1 other"),
    ],
)
def test_the_first_tensor_and_how_many_are_named(
    values: dict[str, list[float]], said: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=said):
        load_model(with_values(pico("llama"), tmp_path / "broken", values))


def test_finite_weights_whose_sum_is_not_are_read(pico: Callable[[str], Path], tmp_path: Path) -> None:
    load_model(with_values(pico("llama"), tmp_path / "large", {UP: [3e38, 3e38]}))
