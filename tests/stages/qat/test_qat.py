"""The stage `qat`: what it writes is what it trained, survives kills and export, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from teaching import context
from trained import qat

from compress.errors import CompressError, StageFailed
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.options import QuantizeOptions
from compress.quant.qtensor import QTensor
from compress.quant.store import load_quantized_model, read_quantized
from compress.train.losses import forward_kl
from pico import make_hybrid, make_pico

Pico = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = make_pico("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    return {"input": folder, "teacher": folder}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, metrics) of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, qat(folder, models)


def codes(folder: Path) -> dict[str, QTensor]:
    return {name: tensor for name, tensor in read_quantized(folder)[1].items() if isinstance(tensor, QTensor)}


def test_it_writes_a_model_that_is_nearer_to_its_teacher(models: dict[str, Path], alone: tuple[Path, Any]) -> None:
    folder, metrics = alone
    assert metrics["result"]["kl_to_teacher"] < metrics["start"]["kl_to_teacher"]
    assert metrics["result"]["train_tokens"] == 6 * 64
    assert metrics["result"]["bits_per_weight"] == 5.0
    found = quantize_model(Parts(load_model(models["input"])), QuantizeOptions(method="rtn"))
    trained = codes(folder / "out")
    assert trained.keys() == found.tensors.keys()
    assert all(not torch.equal(trained[name].scale, tensor.scale) for name, tensor in found.tensors.items())
    blocks = context(folder, models).data.blocks("eval", load_tokenizer(models["input"]), 16, 96)
    with torch.no_grad():
        teacher, student = (
            model(torch.from_numpy(blocks)).logits[:, :-1].flatten(0, 1)
            for model in (load_model(models["teacher"]), load_quantized_model(folder / "out", accuracy_level=4))
        )
    assert forward_kl(student, teacher).mean().item() == pytest.approx(metrics["result"]["kl_to_teacher"], rel=1e-4)
    assert {"history.json", "loss.png", "tensorboard", "LICENSE", "tokenizer.json"} <= {
        file.name for file in (folder / "out").iterdir()
    }


def test_where_training_does_not_help_the_start_comes_out(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = qat(tmp_path, models, method="gptq", learning_rate=0.9, scale_learning_rate=0.9, warmup_ratio=0)
    assert metrics["result"]["kl_to_teacher"] == metrics["start"]["kl_to_teacher"]
    assert "did not help" in caplog.text
    plain = QuantizeOptions(method="gptq", tokens=64, sequence_length=16)
    blocks = context(tmp_path, models).data.blocks("train", load_tokenizer(models["input"]), 16, 64)
    found = quantize_model(Parts(load_model(models["input"])), plain, torch.from_numpy(blocks))
    trained = codes(tmp_path / "out")
    for name, tensor in found.tensors.items():
        assert torch.equal(trained[name].codes, tensor.codes), name
        assert torch.equal(trained[name].scale, tensor.scale), name


@pytest.mark.parametrize("mode", ["start", "within"])
def test_killed_it_ends_with_the_same_codes(
    mode: str, models: dict[str, Path], alone: tuple[Path, Any], tmp_path: Path
) -> None:
    script = str(Path(__file__).with_name("trained.py"))
    command = [sys.executable, script, str(tmp_path), str(models["input"]), str(models["teacher"]), mode]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((tmp_path / "out").iterdir())
    assert qat(tmp_path, models) == alone[1]
    one, two = (load_file(folder / "out" / "model.safetensors") for folder in (alone[0], tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_equal_one(models: dict[str, Path], alone: tuple[Path, Any], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(Path(__file__).with_name("trained.py")), str(tmp_path), str(models["input"]), str(models["teacher"]),
    ]  # fmt: skip
    launched = subprocess.run(command, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr
    one, two = codes(alone[0] / "out"), codes(tmp_path / "out")
    assert max((one[name].scale - two[name].scale).abs().max().item() for name in one) <= 1e-6
    assert sum((one[name].codes != two[name].codes).sum().item() for name in one) <= 3


def test_through_wider_schemes_first(models: dict[str, Path], tmp_path: Path) -> None:
    """Each phase starts from the float weights that the one before left, and has its own record."""
    metrics = qat(
        tmp_path, models, scheme="w2-block32", warm_start=("w8-block32", "w4-block32"), tokens=9 * 64, method="search"
    )
    assert metrics["result"]["train_tokens"] == 9 * 64
    assert (tmp_path / "out" / "1-w4-block32" / "history.json").is_file()
    second, third = (tmp_path / "work" / f"{i}-{name}" for i, name in ((1, "w4-block32"), (2, "w2-block32")))
    history = json.loads((tmp_path / "out" / "1-w4-block32" / "history.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    given = load_file(third / "start" / "float.safetensors")[name]
    best = second / f"checkpoint-{history['best_step']}" if history["best_step"] else second
    file = "model.safetensors" if history["best_step"] else "start.safetensors"
    assert torch.equal(load_file(best / file)[name], given)
    projection = codes(tmp_path / "out")[name]
    assert (projection.scheme.bits, projection.codes.max().item()) == (2, 3)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"scheme": "w4-block16", "symmetric": False, "learn": "both"}),
        ("bert", {"scheme": "w8a8-static", "reduce_range": False}),
        ("bert", {"scheme": "w8a8-dynamic", "exceptions": {"output.dense": "w8-block32"}}),
        ("qwen3", {"scheme": "w4-block32", "learn": "scales", "method": "gptq"}),
        ("mistral", {"scheme": "w4-block32", "data": "generated", "method": "search"}),
    ],
)
def test_other_families_and_schemes(model_type: str, options: dict[str, Any], pico: Pico, tmp_path: Path) -> None:
    models = {"input": pico(model_type), "teacher": pico(model_type)}
    metrics = qat(tmp_path, models, **options)
    assert metrics["result"]["eval_loss"] <= metrics["start"]["eval_loss"]
    with torch.no_grad():
        load_quantized_model(tmp_path / "out")(torch.arange(1, 17)[None])


def test_converted_models(tmp_path: Path) -> None:
    folder = make_hybrid("llama", tmp_path / "hybrid", ("gated-delta", None))
    metrics = qat(tmp_path / "q", {"input": folder, "teacher": folder})
    assert metrics["result"]["kl_to_teacher"] < metrics["start"]["kl_to_teacher"]
    assert load_quantized_model(tmp_path / "q" / "out").config.model_type == "hybrid_llama"


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize(("model_type", "scheme"), [("llama", "w4-block32"), ("bert", "w8a8-static")])
def test_exported_it_is_the_same_to_the_bit(model_type: str, scheme: str, pico: Pico, tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx.numpy_helper import to_array

    from compress.artifact import Artifact
    from compress.exports.onnx.stage import ExportOnnx
    from compress.stage import StageContext, Target

    models = {"input": pico(model_type), "teacher": pico(model_type)}
    qat(tmp_path / "q", models, scheme=scheme, tokens=4 * 64)
    (tmp_path / "onnx").mkdir()
    data: Any = None
    inputs = {"input": Artifact(tmp_path / "q" / "out", "quantized", "qat", "key")}
    context = StageContext(tmp_path / "onnx", tmp_path / "onnx", inputs, data, seed=0, target=Target(threads=1))
    figures = ExportOnnx().run(context)["result"]
    assert figures["parity_max_error"] < 1e-3
    assert figures["greedy_mismatches"] == 0
    stored = onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer
    arrays = [array for array in map(to_array, stored) if array.dtype in (np.uint8, np.int8)]
    name = "mlp.down_proj" if model_type == "llama" else "output.dense"
    for path, tensor in codes(tmp_path / "q" / "out").items():
        if path.endswith(f"{name}.weight"):
            wanted = tensor.pack()["codes"].numpy()
            found = [a for a in arrays if a.size == wanted.size and (np.array_equal(a.reshape(wanted.shape), wanted)
                     or (wanted.ndim == 2 and a.shape == wanted.T.shape and np.array_equal(a, wanted.T)))]  # fmt: skip
            assert found, path


@pytest.mark.parametrize("level", [0, 4])
def test_its_figures_are_those_of_the_exported_graph(models: dict[str, Path], tmp_path: Path, level: int) -> None:
    """Whatever level it was trained at: what was judged is what runs, to less than its activations' rounding costs."""
    from exporting import export

    from compress.runtime.session import OnnxModel

    metrics = qat(tmp_path / "q", models, accuracy_level=level)
    export(tmp_path / "q" / "out", tmp_path / "onnx", "quantized")
    graph = OnnxModel(tmp_path / "onnx", threads=1)
    blocks = context(tmp_path, models).data.blocks("eval", load_tokenizer(models["input"]), 16, 96)
    with torch.no_grad():
        said, twin, exact = (
            model(torch.from_numpy(blocks)).logits[:, :-1].flatten(0, 1)
            for model in (load_model(models["teacher"]), load_quantized_model(tmp_path / "q" / "out", accuracy_level=4),
                          load_quantized_model(tmp_path / "q" / "out"))
        )  # fmt: skip
    run = torch.from_numpy(graph.forward(blocks)[0][:, :-1]).flatten(0, 1)
    assert (run - twin).square().mean() < 0.1 * (run - exact).square().mean()
    assert forward_kl(run, said).mean().item() == pytest.approx(metrics["result"]["kl_to_teacher"], rel=1e-2)


def test_a_bare_encoder_has_no_logits(pico: Pico, tmp_path: Path) -> None:
    models = {"input": pico("bert"), "teacher": pico("bert")}
    with pytest.raises(StageFailed, match="without logits"):
        qat(tmp_path, models, loss={"kl": 1})


def test_weights_that_are_no_numbers_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(models["input"], tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        qat(tmp_path / "q", {"input": tmp_path / "nan", "teacher": models["teacher"]})
    trained = load_model(models["input"])  # that a training left so, for the next scheme to start from
    with torch.no_grad():
        trained.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(CompressError, match=r"layers\.1\.mlp\.up_proj\.weight: has values that are NaN"):
        quantize_model(Parts(trained), QuantizeOptions(scheme="w4-block32", method="rtn"), None)
