"""Units: what is kept over a kill is read back as it was, and what a crash or another machine spoilt is made again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed

from compress.models.load import load_model
from compress.models.parts import Parts
from compress.quant.apply import quantize_model
from compress.quant.options import QuantizeOptions
from compress.quant.quantized import Quantized
from compress.stage import Reporter
from compress.stages.convert.choose import proxy_scores
from compress.stages.convert.init import new_mixers
from compress.stages.prune import scores
from compress.units import UNKEPT, Unit, Units
from pico import VOCAB_SIZE, make_pico, mixer_spec

IDS = torch.randint(0, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))


def silent(steps: int = 1, note: str = "") -> None:
    pass


def test_a_unit_is_made_once_and_logged_after_it_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"sum": 1 / 3, "none": math.nan, "order": ["b", "a"], "b": 1, "a": 2}

    with caplog.at_level(logging.INFO):
        first = Units("work", tmp_path / "here").once("layer 3", make)
        again = Units("work", tmp_path / "here").once("layer 3", make)
    assert made == [1]
    assert caplog.messages == ["done: work layer 3"]
    assert str(first) == str(again), "to the bit, and in the same order"
    assert UNKEPT.once("layer 3", make) is not None
    assert UNKEPT.once("layer 3", make) is not None
    assert (len(made), len(caplog.messages)) == (3, 1), "without a folder nothing is kept, and nothing said"


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    units = Units("work", tmp_path)
    tensors = {"codes": torch.arange(6, dtype=torch.uint8).view(2, 3).T, "scale": torch.tensor(1 / 3)}
    units.keep("model.embed.weight", Unit([1.5], tensors))
    found = units.find("model.embed.weight")
    assert found is not None
    assert found.figures == [1.5]
    assert {name: (each.dtype, each.tolist()) for name, each in found.tensors.items()} == {
        name: (each.dtype, each.tolist()) for name, each in tensors.items()
    }


@pytest.mark.parametrize("what", ["cut json", "cut tensors", "no tensors", "another json", "of another"])
def test_what_is_not_whole_or_of_something_else_is_made_again(what: str, tmp_path: Path) -> None:
    units = Units("work", tmp_path, of={"cpus": [0, 1]})
    units.keep("round 1", Unit(1, {"x": torch.ones(40)}))
    assert units.find("round 1") is not None
    if what == "another json":
        (tmp_path / "round-1.json").write_text("[]")
    elif what == "of another":
        units = units.made_of({"cpus": [0]})
    elif what == "no tensors":
        (tmp_path / "round-1.safetensors").unlink()
    else:
        file = tmp_path / f"round-1.{'json' if what == 'cut json' else 'safetensors'}"
        file.write_bytes(file.read_bytes()[:-9])
    assert units.find("round 1") is None
    units.keep("round 1", Unit(2, {"x": torch.ones(40)}))
    assert (found := units.find("round 1")) is not None
    assert found.figures == 2


def test_the_first_process_of_a_launch_keeps_and_the_others_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = Units("work", tmp_path)
    units.keep("layer 0", Unit(0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    units.keep("layer 1", Unit(1))
    assert units.find("layer 0") == Unit(0)
    assert units.find("layer 1") is None


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model with one projection whose output is a hundredfold in one channel: it is spared by 8-bit schemes."""
    from safetensors.torch import load_file, save_file

    folder = make_pico("llama", tmp_path_factory.mktemp("outliers"), num_hidden_layers=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] *= 300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "symmetric": False, "act_order": True},
        {"method": "gptq", "scaling": "awq"},
        {"scheme": "w8a8-static", "method": "search", "scaling": "smoothquant"},
        {"method": "rtn"},
    ],
)  # fmt: skip
def test_a_quantisation_goes_on_layer_by_layer(options: dict[str, Any], outliers: Path, tmp_path: Path) -> None:
    given = QuantizeOptions.model_validate(options)

    def quantise(folder: Path, reporter: Reporter) -> tuple[Quantized, dict[str, torch.Tensor]]:
        model: Any = load_model(outliers)
        units = Units("quantize", folder, log=reporter.log)
        text = IDS if given.needs_text else None
        return quantize_model(Parts(model), given, text, keep_latents=True, units=units), model.state_dict()

    expected, weights = quantise(tmp_path / "undisturbed", Reporter())
    (found, left), lines = killed(lambda reporter: quantise(tmp_path / "killed", reporter), 2, 1)
    layers = [f"done: quantize layer {index}" for index in range(3)]
    assert lines == [*layers, "done: quantize model.embed_tokens.weight"]
    for name in ("errors", "rounding", "spared", "smoothing", "unscaled"):
        assert getattr(found, name) == getattr(expected, name)
    assert given.scheme != "w8a8-static" or len(found.spared) > 0
    assert given.scaling == "none" or len(found.smoothing) > 0
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        for part, value in tensor.pack().items():
            assert torch.equal(found.tensors[name].pack()[part], value), (name, part)
        assert torch.equal(found.latents[name], expected.latents[name])
    assert all(torch.equal(left[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("by", "units"), [("block-influence", 3), ("angular", 3), ("leave-one-out", 6)])
def test_scores_of_layers_go_on_batch_by_batch(
    by: Any, units: int, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    parts, batches = Parts(load_model(pico("llama"))), IDS[:6].split(2)

    def choose(folder: Path, reporter: Reporter) -> scores.Choice:
        return scores.choose(by, parts, batches, 2, silent, Units("prune-layers", folder, log=reporter.log))

    expected = choose(tmp_path / "undisturbed", Reporter())
    assert expected == scores.choose(by, parts, batches, 2, silent)
    found, lines = killed(lambda reporter: choose(tmp_path / "killed", reporter), 1, 1)
    assert found == expected
    assert len(lines) == len({*lines}) == units


def test_the_choice_of_a_conversion_goes_on_batch_by_batch(pico: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = load_model(pico("llama"))
    mixers, steps = new_mixers(teacher, [0, 2, 3], mixer_spec("linear")), list[int]()

    def choose(reporter: Reporter) -> dict[int, float]:
        steps.clear()
        units = Units("convert-attention", tmp_path, log=reporter.log)
        advance = lambda number=1, note="": steps.append(number)  # noqa: E731
        return proxy_scores(Parts(teacher), mixers, IDS[:6].split(2), advance, units)

    found, lines = killed(choose, 1, 1)
    assert found == proxy_scores(Parts(teacher), mixers, IDS[:6].split(2), silent)
    assert lines == [f"done: convert-attention batch {number}" for number in range(3)]
    assert steps == [3, 3, 1, 1, 1], "the bar is where it was"
