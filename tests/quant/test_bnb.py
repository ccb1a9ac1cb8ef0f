"""bitsandbytes' weights: what is stored, that it is read again as it was, and who can do with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compress.benchmarks.judging import judge
from compress.benchmarks.text import OneText
from compress.errors import CompressError, InvalidInput
from compress.models.anatomy import shape_of
from compress.models.load import load_model
from compress.models.sources import parse_source
from compress.pipeline.check import check_file, valid_pipeline
from compress.quant import bnb
from compress.quant.load import load_any
from compress.quant.store import read_quantized
from compress.report.figures import figures_of
from compress.runner.run import run_pipeline
from compress.stage import Reporter
from compress.stages.quantize.stage import Quantize
from pico import make_pico

Made = Callable[[str, str], Path]
IDS_BT = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`wide(model_type)`: a pico model whose rows are whole blocks of 64."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            size = {"n_inner": 128} if model_type == "gpt2" else {"intermediate_size": 128}
            made[model_type] = make_pico(model_type, tmp_path_factory.mktemp(model_type), num_hidden_layers=2, **size)
        return made[model_type]

    return folder


@pytest.fixture(scope="module")
def made(wide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(model_type, scheme)`: what the stage writes."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(model_type: str, scheme: str) -> Path:
        if (model_type, scheme) not in folders:
            runs = tmp_path_factory.mktemp("runs")
            file = write(runs, wide(model_type), {"quantize": {"scheme": scheme}})
            record = run_pipeline(valid_pipeline(file), runs=runs, reporter=Reporter(), twin=False)
            folders[model_type, scheme] = runs / "p" / record.stage("quantize").directory
        return folders[model_type, scheme]

    return folder


def write(folder: Path, model: Path, *stages: Any) -> Path:
    head = {"name": "p", "model": str(model), "data": {"train": "python-docs"}}
    (folder / "p.yaml").write_text(yaml.safe_dump({**head, "stages": list(stages)}), "utf-8")
    return folder / "p.yaml"


def says(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS_BT)[0]
    return found


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-int8"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_read_again_it_says_the_same(model_type: str, scheme: str, wide: Callable[[str], Path], made: Made) -> None:
    import transformers

    library: Any = transformers
    folder = made(model_type, scheme)
    fresh = bnb.load_in_bits(wide(model_type), bnb.BITS[scheme])
    assert torch.equal(says(load_any(folder)), says(fresh))
    auto = library.AutoModel if model_type == "bert" else library.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder, local_files_only=True)
    assert torch.allclose(says(theirs), says(fresh), atol=1e-5), "and transformers alone reads it"
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "LICENSE").is_file()
    float_model = says(load_model(wide(model_type)))
    error = (says(fresh) - float_model).norm() / float_model.norm()
    assert 0 < error < (0.1 if scheme == "bnb-int8" else 0.6)


def test_nf4_is_the_nearest_of_16_levels_in_blocks_of_64(wide: Callable[[str], Path], made: Made) -> None:
    from bitsandbytes.functional import dequantize_4bit

    name = "model.layers.1.mlp.down_proj"
    stored = load_file(made("llama", "bnb-nf4") / "model.safetensors")
    levels = stored[f"{name}.weight.quant_map"]
    weight_NK: Any = load_model(wide("llama")).get_submodule(name).weight
    blocks_GB = weight_NK.detach().reshape(-1, bnb.BLOCK_SIZE)
    absmax_G1 = blocks_GB.abs().amax(1, keepdim=True)
    nearest = levels[(blocks_GB[..., None] / absmax_G1[..., None] - levels).abs().argmin(-1)] * absmax_G1
    module: Any = load_any(made("llama", "bnb-nf4")).get_submodule(name)
    read = dequantize_4bit(module.weight.data, module.weight.quant_state)
    torch.testing.assert_close(read, nearest.reshape(weight_NK.shape), rtol=1e-6, atol=1e-7)
    assert len(levels) == 16


def test_int8_is_a_scale_for_each_row(wide: Callable[[str], Path], made: Made) -> None:
    name = "model.layers.0.self_attn.o_proj"
    stored = load_file(made("llama", "bnb-int8") / "model.safetensors")
    weight_NK: Any = load_model(wide("llama")).get_submodule(name).weight
    scale_N = weight_NK.detach().abs().amax(1)
    assert torch.allclose(stored[f"{name}.SCB"].flatten(), scale_N, rtol=1e-3)
    naive = torch.round(weight_NK.detach() * 127 / scale_N[:, None])
    assert (stored[f"{name}.weight"].float() - naive).abs().max() <= 1, "half precision may tip a tie"


@pytest.mark.parametrize(("scheme", "bits"), [("bnb-nf4", 4.5), ("bnb-int8", 8.0)])
def test_sizes_are_as_estimated(scheme: str, bits: float, wide: Callable[[str], Path], made: Made) -> None:
    folder, shape = made("llama", scheme), shape_of(json.loads((wide("llama") / "config.json").read_text()))
    estimated = Quantize.model_validate({"scheme": scheme}).weight_bytes(shape, math.nan)
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(estimated, rel=0.15)
    metrics = json.loads((folder / "artifact.json").read_text())["metrics"]["result"]
    assert bits < metrics["bits_per_weight"] < bits + 1
    assert metrics["parameters"] == sum(parameter.numel() for parameter in load_model(wide("llama")).parameters())


def test_it_is_evaluated_like_any_other(wide: Callable[[str], Path], made: Made, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and so did the dog. " * 40)
    kl = {}
    for scheme in bnb.BITS:
        found = judge(
            made("llama", scheme), wide("llama"), OneText(str(text)),
            sequence_length=32, max_tokens=128, threads=1, reporter=Reporter(),
        ).result()  # fmt: skip
        assert math.isfinite(found["perplexity"])
        kl[scheme] = found["kl"]
    assert 0 < kl["bnb-int8"] < kl["bnb-nf4"]


def test_it_teaches(wide: Callable[[str], Path], made: Made, tmp_path: Path) -> None:
    teacher = made("llama", "bnb-int8")
    options = {"teacher_model": str(teacher), "tokens": 256, "sequence_length": 32, "batch_size": 2, "eval_tokens": 64}
    file = write(tmp_path, wide("llama"), {"distill": options})
    record = run_pipeline(valid_pipeline(file), runs=tmp_path, reporter=Reporter(), twin=False)
    first = record.stage("distill").metrics["input"]
    assert 0 < first["kl_to_teacher"] < 0.1, "the student begins as what the teacher was made from"
    assert figures_of(record)["result"]["kl_to_teacher"] <= first["kl_to_teacher"]
    with pytest.raises(CompressError, match="is quantised already"):
        bnb.load_in_bits(teacher, 4)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("export-onnx", "bitsandbytes weights run in PyTorch only"), ("quantize", "'quantize' hands on is quantized"),
        ({"prune-layers": {"keep": 1}}, "'quantize' hands on is quantized"),
        ({"convert-attention": {"to": "linear"}}, "'quantize' hands on is quantized"),
        ({"distill": {}}, "'quantize' hands on is quantized"), ({"choose-format": {"prompts": [8]}}, "is quantized"),
    ],
)  # fmt: skip
def test_what_can_not_read_it_refuses_by_name(
    after: Any, said: str, wide: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write(tmp_path, wide("llama"), {"quantize": {"scheme": "bnb-nf4"}}, after)
    (problem, *_) = check_file(file).problems
    assert said in str(problem)
    assert "stages[1]" in problem.where


def test_folders_are_refused_by_name(made: Made) -> None:
    folder = made("llama", "bnb-nf4")
    with pytest.raises(CompressError, match="bitsandbytes weights run in PyTorch only"):
        read_quantized(folder)
    with pytest.raises(CompressError, match="is quantised already"):
        load_model(folder)
    with pytest.raises(InvalidInput, match=r"is quantised already \(bitsandbytes\)"):
        parse_source(str(folder))


def test_bad_options(pico: Callable[[str], Path], wide: Callable[[str], Path]) -> None:
    def wheres(folder: Path, **options: Any) -> list[str]:
        shape = shape_of(json.loads((folder / "config.json").read_text()))
        return [problem.where for problem in Quantize.model_validate(options).check(shape)]

    assert wheres(wide("llama"), scheme="bnb-nf4") == []
    assert wheres(pico("llama"), scheme="bnb-nf4") == ["scheme"], "rows of 96 are no whole blocks"
    assert wheres(pico("llama"), scheme="bnb-int8") == []
    assert wheres(wide("llama"), scheme="bnb-int8", method="rtn", symmetric=False) == ["method", "symmetric"]
