"""Pooling as sentence-transformers writes it: one set of rules, and what is not supported is named by `check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CompressError, InvalidInput
from compress.models.pooling import Pooling, read_pooling
from compress.models.sources import parse_source

HIDDEN = np.array([[[1.0, 2.0], [3.0, 6.0]]], np.float32)
NAMES = {"T": "", "P": "1_Pooling", "D": "2_Dense", "N": "3_Normalize"}
TYPES = {"T": "Transformer", "P": "Pooling", "D": "Dense", "N": "Normalize"}


def write(folder: Path, config: dict[str, object], modules: str = "TP", place: str = "1_Pooling") -> Path:
    """A folder of sentence-transformers with these modules, whose pooling is at `place`."""
    (folder / place).mkdir(parents=True)
    (folder / place / "config.json").write_text(json.dumps(config))
    listed = [
        {"path": place if kind == "P" else NAMES[kind], "type": f"sentence_transformers.models.{TYPES[kind]}"}
        for kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({}, Pooling()),
        ({"word_embedding_dimension": 2, "include_prompt": True}, Pooling()),
        ({"pooling_mode": "mean", "include_prompt": True}, Pooling()),
        ({"pooling_mode": ["cls"]}, Pooling("cls")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Pooling()),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling("cls")),
    ],
)
def test_a_mode_is_read_as_every_version_writes_it(
    config: dict[str, object], pooling: Pooling, tmp_path: Path
) -> None:
    assert read_pooling(write(tmp_path / "a", config)) == pooling
    assert read_pooling(write(tmp_path / "b", config, "TPN", "pool")) == Pooling(pooling.mode, normalize=True)


def test_without_modules_the_usual_folder_counts_and_without_pooling_nothing_does(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    write(tmp_path / "a", {"pooling_mode": "cls"})
    (tmp_path / "a" / "modules.json").write_text("[]")
    assert read_pooling(tmp_path / "a") is None
    (tmp_path / "a" / "modules.json").unlink()
    assert read_pooling(tmp_path / "a") == Pooling("cls")


def test_sequences_become_vectors() -> None:
    assert Pooling().of(HIDDEN).tolist() == [[2.0, 4.0]]
    assert Pooling("cls").of(HIDDEN).tolist() == [[1.0, 2.0]]
    assert np.linalg.norm(Pooling("cls", normalize=True).of(HIDDEN)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "modules", "said"),
    [
        ({"pooling_mode_max_tokens": True}, "TP", "'max_tokens'"),
        ({"pooling_mode_weightedmean_tokens": True}, "TP", "'weightedmean_tokens'"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "TP", "'mean_sqrt_len_tokens'"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "TP", "'cls_token' and 'mean_tokens'"),
        ({"pooling_mode": "lasttoken"}, "TPN", "'lasttoken'"),
        ({"pooling_mode": 3}, "TPN", "'3'"),
        ({"pooling_mode": "mean"}, "TPDN", "a module Dense"),
    ],
)
def test_what_would_be_another_vector_is_refused_before_anything(
    config: dict[str, object], modules: str, said: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico("bert"), tmp_path / "model"))
    write(folder, config, modules)
    with pytest.raises(InvalidInput, match=f"{said}.* not supported"):
        parse_source(str(folder))


@pytest.mark.parametrize("modules", ["{}", "3", "[3]", "null", '[{"path": "x"}]', '[{"type": "a.Pooling", "path": 3}]'])
def test_modules_of_a_wrong_type_are_one_sentence(modules: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(CompressError, match=r"modules\.json"):
        read_pooling(tmp_path)
