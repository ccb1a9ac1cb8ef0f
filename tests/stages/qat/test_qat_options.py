"""What the stage `qat` refuses before it runs, and what it says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.models.anatomy import shape_of
from compress.stage import Ref
from compress.stages.qat.stage import Qat

Pico = Callable[[str], Path]


def test_what_check_refuses(pico: Pico) -> None:
    llama = shape_of(json.loads((pico("llama") / "config.json").read_text()))

    def wheres(**options: Any) -> list[str]:
        return [problem.where for problem in Qat(sequence_length=128, **options).check(llama)]

    assert wheres() == []
    assert wheres(warm_start=("w8-block32", "w4-block128"), scheme="ternary") == []
    assert wheres(warm_start=("w4-block32",)) == ["warm_start"]
    assert wheres(warm_start=("w4-block32", "w8-block32"), scheme="w2-block32") == ["warm_start"]
    assert wheres(warm_start=("w8a8-dynamic",)) == ["warm_start"]
    assert wheres(warm_start=("w8-block32",), learn="scales") == ["warm_start"]
    assert wheres(warm_start=("w8-block32",), tokens=600, batch_size=4) == ["tokens"]
    assert wheres(learn="weights", scale_learning_rate=1e-3) == ["scale_learning_rate"]
    assert wheres(scheme="w8a8-dynamic", accuracy_level=4) == ["accuracy_level"]
    assert wheres(calibration_tokens=100) == ["calibration_tokens"]
    assert wheres(method="rtn", calibration_tokens=1024) == ["calibration_tokens"]
    assert wheres(method="rtn", act_order=True) == ["act_order"]
    assert wheres(teacher_bits=4) == ["teacher_bits"]
    assert wheres(teacher_model=str(pico("mistral"))) == []
    assert wheres(teacher_model=str(pico("bert"))) == ["teacher_model"]
    assert [problem.where for problem in Qat(sequence_length=512).check(llama)] == ["sequence_length"]
    with pytest.raises(ValidationError):
        Qat(warm_start=("w3-block32",))  # type: ignore[arg-type]


def test_whom_it_asks_and_its_twin() -> None:
    assert Qat().inputs() == {"teacher": Ref("source")}
    assert Qat(loss={"kl": 0, "ce": 1}).inputs() == {}  # type: ignore[arg-type]
    twin = Qat(scheme="w2-block32", warm_start=("w4-block32",), tokens=10**9, teacher_model="org/name").twin()
    assert [options.num_steps for _, options in twin.phases()] == [2, 2]
    assert twin.teacher_model is None


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys; import compress.stages.qat.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
