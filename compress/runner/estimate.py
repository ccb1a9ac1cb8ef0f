"""What a plan will cost, roughly: megabytes on disk and in memory, and minutes. Estimates, and called so.

Time is floating-point operations over an assumed speed: 2 per parameter and token forward, 6 forward and backward.
Fitting codes reads its text twice, and makes good what rounding did, for as much again. Text that is written goes
through the model one token at a time, in WRITING times the time of as much that is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InvalidInput
from compress.hardware import this_machine
from compress.models.anatomy import ModelShape
from compress.stage import INPUT

if TYPE_CHECKING:
    from compress.pipeline.graph import GraphNode
    from compress.runner.plan import Step
    from compress.runner.prepare import Prepared

GFLOPS_PER_CPU = 60.0
"""Sustained fp32 speed of one CPU. Measured with SmolLM2-135M and torch on 2 CPUs of an AMD EPYC, blocks of 1024
tokens: 72 forward, 50 to 67 forward and backward."""
WRITING = 1.5
"""Measured there with 64 documents of 40 tokens at a time, where reading is 1."""
BASE_RAM_MB = 700.0
"""A process that has imported torch and transformers."""
FIXED_SECONDS = 5.0
ADAM_BYTES, GRADIENT_BYTES, FP32_BYTES = 8, 4, 4


@dataclass(frozen=True)
class Estimate:
    """What one step is expected to write and need. MB are 1e6 bytes; `disk_mb` is the most it holds at one time."""

    shape: ModelShape
    size_mb: float
    ram_mb: float
    disk_mb: float
    seconds: float

    def figures(self) -> dict[str, float]:
        """The numbers alone."""
        return {"size_mb": self.size_mb, "ram_mb": self.ram_mb, "disk_mb": self.disk_mb, "seconds": self.seconds}


def estimate(prepared: Prepared) -> dict[str, Estimate]:
    """Estimates of all steps by id, cached ones too."""
    shapes = {id: prepared.shape_of(id) for id in prepared.plan.sources}
    bytes_of = {id: shape.weight_bytes for id, shape in shapes.items()}
    in_float32 = {id: shape.in_float32.weight_bytes for id, shape in shapes.items()}  # as a graph has what is no code
    found = {}
    for step in prepared.plan.steps:
        input = step.node.inputs[INPUT]
        before = shapes[input]
        shape = step.stage.shape(before)
        in_float32[step.id] = step.stage.weight_bytes(shape.in_float32, in_float32[input])
        weight_bytes = step.stage.weight_bytes(shape, bytes_of[input])
        if step.stage.returns == "onnx":
            weight_bytes = in_float32[step.id]
        elif step.stage.returns == "measurement":
            shape, weight_bytes = before, 0.0
        shapes[step.id], bytes_of[step.id] = shape, weight_bytes
        read = [bytes_of[of] for of in set(step.node.inputs.values()) if bytes_of[of]]
        found[step.id] = cost(step.node, shape, weight_bytes, read)
    return found


def check_disk(run_dir: Path, todo: Mapping[str, Estimate]) -> None:
    """Raises InvalidInput where the disk of `run_dir` can't hold what `todo` will write."""
    free_mb = shutil.disk_usage(run_dir).free / 1e6
    kept = sum(step.size_mb for step in todo.values())
    passing = max((step.disk_mb - step.size_mb for step in todo.values()), default=0.0)
    if kept + passing > free_mb:
        what = f"has {free_mb:.0f} MB free, and the run needs about {kept + passing:.0f} MB"
        fix = "free some (`compress gc` lists what may go), or choose another with --runs"
        raise InvalidInput(str(run_dir), what, fix)


def todo_estimates(estimates: Mapping[str, Estimate], steps: tuple[Step, ...]) -> dict[str, Estimate]:
    """Those of the steps that are still to run."""
    return {step.id: estimates[step.id] for step in steps}


def cost(node: GraphNode, shape: ModelShape, weight_bytes: float, read: Sequence[float]) -> Estimate:
    """The estimate of a node that works on a model of that shape and writes so many bytes of weights.

    read: the bytes of each model that it reads. What measures them holds them as they are stored, all else as floats.
    """
    options = node.stage.model_dump()
    groups = [each for each in (options, *options.values()) if isinstance(each, dict)]
    trains = any("learning_rate" in group for group in groups)
    written = max((group["tokens"] for group in groups if group.get("data") == "generated"), default=0)
    fits = node.stage.returns == "quantized"
    parameters, num_models = shape.num_parameters, len(read)
    held = node.stage.held_bytes(shape) or float(FP32_BYTES * num_models * parameters)
    if node.stage.measures_hardware:
        held = sum(read)
    checkpoints = 0.0
    if trains:
        held += (ADAM_BYTES + GRADIENT_BYTES) * parameters
        checkpoints = 2.0 * (FP32_BYTES + ADAM_BYTES) * parameters
    flops_per_weight = 2.0 * num_models + (4.0 if trains or fits else 0.0)
    flops = (flops_per_weight * node.stage.forward_tokens(shape) + 2.0 * WRITING * written) * parameters
    seconds = flops / (GFLOPS_PER_CPU * 1e9 * this_machine().num_cpus)
    return Estimate(
        shape=shape,
        size_mb=weight_bytes / 1e6,
        ram_mb=BASE_RAM_MB + held / 1e6,
        disk_mb=(weight_bytes + checkpoints) / 1e6,
        seconds=FIXED_SECONDS + min(seconds, options.get("max_seconds", seconds)),
    )
