"""Keys: each thing that a result depends on changes them, and nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fakes
import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.errors import CompressError
from compress.hardware import Machine
from compress.models.anatomy import shape_of
from compress.models.stored import stored_tensors
from compress.runner.key import ingredients_of, key_of
from compress.runner.twin import twin_config
from compress.runner.weights import own_figures
from compress.stage import Given, Target

SHRINK, MEASURE = fakes.FakeShrink(), fakes.FakeMeasure()
KEYS = {"input": "a" * 64, "teacher": "b" * 64}
DATA = {"train": "c" * 64}
GIVEN = Given(shape_of(fakes.CONFIG), {"input": "torch", "teacher": "torch"})


def key(
    stage: fakes.Stage = SHRINK, inputs: dict[str, str] = KEYS, data: dict[str, str] = DATA, seed: int = 0,
    threads: int = 2,
) -> str:  # fmt: skip
    return key_of(ingredients_of(stage, GIVEN, inputs, text=data, seed=seed, target=Target(threads=threads)))


class Newer(fakes.FakeShrink):
    version: ClassVar[int] = 2


class Other(fakes.FakeShrink):
    name: ClassVar[str] = "other"


@pytest.mark.parametrize(
    "changed",
    [
        key(fakes.FakeShrink(by=3.0)), key(Newer()), key(Other()), key(seed=1),
        key(inputs={**KEYS, "input": "d" * 64}), key(inputs={**KEYS, "teacher": "d" * 64}),
        key(inputs={"input": KEYS["teacher"], "teacher": KEYS["input"]}), key(inputs={"input": "a" * 64}),
        key(data={"train": "d" * 64}), key(data={"eval": "c" * 64}),
    ],
    ids=["option", "version", "stage", "seed", "input", "teacher", "roles", "no teacher", "text", "split"],
)  # fmt: skip
def test_every_ingredient_changes_the_key(changed: str) -> None:
    assert changed != key()


def test_what_does_not_matter_does_not_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key(fakes.FakeShrink(by=2.0)) == key()
    assert key(inputs=dict(reversed(KEYS.items()))) == key()
    assert key(MEASURE, seed=1) == key(MEASURE)  # not seeded
    slower = key(threads=7)
    monkeypatch.setattr("compress.runner.key.this_machine", lambda: Machine("other", (), 1, 1.0, "Linux"))
    assert slower == key()  # measures nothing


def test_a_measurement_belongs_to_machine_target_and_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(MEASURE)
    assert key(MEASURE, threads=7) != before
    with monkeypatch.context() as patch:
        patch.setattr("compress.runner.key.this_machine", lambda: Machine("other", (), 1, 1.0, "Linux"))
        assert key(MEASURE) != before
    monkeypatch.setattr("compress.hardware.version", lambda package: "0.0")
    assert key(MEASURE) != before


def test_what_is_written_for_a_target_belongs_to_it() -> None:
    class ForTarget(fakes.FakeShrink):
        reads_target: ClassVar[bool] = True

    assert key(ForTarget(), threads=2) != key(ForTarget(), threads=7)


def test_keys_are_the_same_in_every_process() -> None:
    code = "import test_plan; print(test_plan.key(test_plan.MEASURE), test_plan.key())"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{Path(__file__).parents[1]}"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [key(MEASURE), key()]


def test_the_twin_config_is_shallow_and_narrow_with_whole_heads() -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 576, "intermediate_size": 1500,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 99, "head_dim": 64, "eos_token_id": [1, 2],
        "layer_types": ["full_attention"] * 6,
    }  # fmt: skip
    narrow = {"hidden_size": 288, "intermediate_size": 768, "head_dim": 32}
    shallow = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    assert twin_config(config) == {**config, **narrow, **shallow}


def test_a_small_model_is_its_own_twin() -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 99}
    assert twin_config(config) == config


def test_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "model.safetensors")
    size_mb = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert own_figures(tmp_path, "torch", None) == {"parameters": 22, "size_mb": size_mb}
    assert own_figures(tmp_path, "quantized", 40.0) == {"parameters": 40, "size_mb": size_mb}
    assert own_figures(tmp_path, "onnx", None) == {"size_mb": size_mb}


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"\xff" * 64, json.dumps([1]).encode()])
def test_a_cut_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CompressError, match=r"model\.safetensors: is not a whole safetensors file"):
        stored_tensors(file)
