"""Stages that do next to nothing, a model of two tensors and a pipeline of them: the runner without any torch.

`python fakes.py run …` is the command line with these stages registered, for tests that kill it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save_file

from compress import registry, stage
from compress.artifact import Metrics, write_json
from compress.errors import StageFailed
from compress.models.anatomy import ModelShape
from compress.stage import SOURCE, Ref, Stage, StageContext

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 8,
    "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


class FakeShrink(Stage):
    """Halves the numbers of a model, one at a time, with a checkpoint after each."""

    name: ClassVar[str] = "fake-shrink"
    summary: ClassVar[str] = "halves"
    accepts = frozenset({"torch"})
    returns = "torch"
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"train"})
    seeded: ClassVar[bool] = True

    by: float = Field(2.0, gt=0)
    steps: int = 3
    sleep: float = 0.0
    fail: Literal["", "user", "bug", "disk", "interrupt"] = ""
    fail_on_twin: bool = False
    teacher_model: str | None = None

    def inputs(self) -> Mapping[str, Ref | stage.OtherModel]:
        return {"teacher": stage.OtherModel(self.teacher_model)} if self.teacher_model else {}

    def settled(self, given: stage.Given) -> Mapping[str, Any]:
        return {name: value for name, value in super().settled(given).items() if name != "teacher_model"}

    def twin(self) -> FakeShrink:
        return self.model_copy(update={"fail": "user" if self.fail_on_twin else ""})

    def run(self, context: StageContext) -> Metrics:
        assert [path.name for path in context.out.iterdir()] == ["checkpoints"]
        (context.out / "half-written").write_text("as if killed here")
        checkpoint = context.work / "step.json"
        done = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
        with context.reporter.progress("shrinking", self.steps) as advance:
            for step in range(done, self.steps):
                time.sleep(self.sleep)
                with (context.out.parent / "steps.txt").open("a") as file:  # only a test may write there
                    file.write(f"{step}\n")
                write_json(checkpoint, step + 1)
                advance()
        _fail(self.fail)
        (context.out / "half-written").unlink()
        tensors = load_file(context.input.path / "model.safetensors")
        halved = {name: value / np.float32(self.by) for name, value in tensors.items()}
        save_file(halved, context.out / "model.safetensors")
        (context.out / "config.json").write_text((context.input.path / "config.json").read_text())
        if self.teacher_model:
            assert (context.inputs["teacher"].path / "model.safetensors").is_file()
        return {"result": {"steps_done": float(self.steps)}, "input": {"loss": 3.0}}


def _fail(how: str) -> None:
    if how == "user":
        raise StageFailed("fake-shrink", "can't shrink this", "use another")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "interrupt":
        raise KeyboardInterrupt


class FakeExport(Stage):
    """Writes a model.onnx that is none."""

    name: ClassVar[str] = "fake-export"
    summary: ClassVar[str] = "exports"
    accepts = frozenset({"torch"})
    returns = "onnx"

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        return before / 8

    def run(self, context: StageContext) -> Metrics:
        tensors = load_file(context.input.path / "model.safetensors")
        (context.out / "model.onnx").write_bytes(b"".join(value.tobytes() for value in tensors.values()))
        return {}


class FakeMeasure(Stage):
    """Calls the sum of a model's bytes its perplexity."""

    name: ClassVar[str] = "fake-measure"
    summary: ClassVar[str] = "measures"
    accepts = frozenset({"torch", "onnx"})
    returns = "measurement"
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"eval"})
    measures_hardware: ClassVar[bool] = True

    value: float = 10.0

    def inputs(self) -> Mapping[str, Ref]:
        return {SOURCE: Ref(SOURCE, via=(("fake-export", {}),))}

    def produces(self) -> Sequence[str]:
        return ("perplexity", "perplexity_se", "tpot_ms@128")

    def run(self, context: StageContext) -> Metrics:
        (context.out / "measured.json").write_text("{}")
        return {
            "result": {"perplexity": self.value, "perplexity_se": 0.25, "tpot_ms@128": 5.0},
            "source": {"perplexity": 8.0, "perplexity_se": 0.2, "tpot_ms@128": 20.0},
        }


STAGES: tuple[type[Stage], ...] = (FakeShrink, FakeExport, FakeMeasure)


def points() -> dict[str, EntryPoint]:
    """The fakes as entry points."""
    return {stage.name: EntryPoint(stage.name, f"fakes:{stage.__name__}", registry.GROUP) for stage in STAGES}


def make_model(folder: Path) -> Path:
    """A model's folder without a model in it: 8 × 8 and 4 numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"a.weight": np.ones((8, 8), np.float32), "b.weight": np.arange(4, dtype=np.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_pipeline(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a pipeline of fakes: shrink, measure, export, measure. `shrink=` are its options, `require=` and so on."""
    import yaml

    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for split in ("train", "eval"):
            (text / f"{split}.txt").write_text("".join(f"{split} line {i} of some text, {i * i}.\n" for i in range(50)))
    shrink = {"fake-shrink": changes.pop("shrink", {})}
    default: dict[str, Any] = {
        "name": "pico",
        "model": str(model),
        "data": {"train": f"{text}/train.txt", "eval": f"{text}/eval.txt", "max_overlap": 1.0},
        "stages": [shrink, "fake-measure", "fake-export", {"fake-measure": {"value": 12.0}}],
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({**default, **changes}, sort_keys=False))
    return file


if __name__ == "__main__":
    os.environ.setdefault("NO_COLOR", "1")
    registry._points = points
    from compress.cli.main import main

    main()
