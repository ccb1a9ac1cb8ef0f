"""The session opens any folder, gives the same whole and step by step, and says clearly what it can't open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest

from compress.artifact import Artifact
from compress.errors import CompressError
from compress.exports.onnx.stage import ExportOnnx
from compress.runtime.session import OnnxModel
from compress.stage import StageContext, Target

IDS = np.arange(40, 60, dtype=np.int64)[None]
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "handed-on"])
def folder(
    request: pytest.FixtureRequest, pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("session")
    data: Any = None
    inputs = {"input": Artifact(pico("llama"), "torch", "test", "key")}
    context = StageContext(out=out, work=out, inputs=inputs, data=data, seed=0, target=Target(threads=1))
    ExportOnnx(fused=request.param).run(context)
    return out


def test_steps_are_the_whole(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    whole, present = model.forward(IDS)
    assert whole.shape == (1, 20, 512)
    assert present[0].shape == (1, 2, 20, 16)
    decoder = model.decoder(20)
    rows = [decoder.prefill(IDS[:, :7]), *(decoder.step(int(token)) for token in IDS[0, 7:])]
    np.testing.assert_allclose(np.concatenate(rows), whole[0, 6:], atol=1e-4)
    assert decoder.length == 20
    with pytest.raises(ValueError, match="do not fit"):
        decoder.step(1)


@pytest.mark.parametrize("alone", [False, True])
def test_the_calling_thread_keeps_its_denormals_unless_it_is_alone(folder: Path, alone: bool) -> None:
    script = f"""
import numpy as np
from pathlib import Path
from compress.runtime.session import OnnxModel
model = OnnxModel(Path({str(folder)!r}), threads=1, alone={alone})
print(float(np.full(4, 1e-39, np.float32).__mul__(np.float32(1.5))[0]))
print(model.decoder(20).prefill(np.arange(40, 60)).argmax(-1).tolist())
"""
    value, best = subprocess.run([sys.executable, "-c", script], stdout=PIPE, text=True, check=True).stdout.splitlines()
    assert (float(value) == 0) == alone
    assert best == str(OnnxModel(folder, threads=1).decoder(20).prefill(IDS).argmax(-1).tolist())


def test_rows_of_a_batch_are_alike(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    one = model.decoder(64).greedy(IDS, 8)
    three = model.decoder(64, batch_size=3).greedy(np.repeat(IDS, 3, axis=0), 8)
    assert (three == one).all()


def test_forward_goes_on_from_a_past(folder: Path) -> None:
    model = OnnxModel(folder, threads=1)
    whole, _ = model.forward(IDS)
    _, past = model.forward(IDS[:, :12])
    rest, _ = model.forward(IDS[:, 12:], None, past)
    np.testing.assert_allclose(rest[0], whole[0, 12:], atol=1e-4)


def test_what_it_cannot_open(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"has no model\.onnx"):
        OnnxModel(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"this is no graph")
    with pytest.raises(CompressError, match="can't open it"):
        OnnxModel(tmp_path)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())  # without its data
    with pytest.raises(CompressError, match="can't open it"):
        OnnxModel(tmp_path)
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(CompressError, match="is not JSON"):
        OnnxModel(tmp_path)


def test_the_file_that_genai_config_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes((folder / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "decoder.onnx"}}}))
    assert OnnxModel(tmp_path, threads=1).is_decoder
