"""What a plan will cost, roughly: megabytes on disk and in memory, and minutes. Estimates, and called so.

Time is floating-point operations over an assumed speed: 2 per parameter and token forward, 6 forward and backward.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InvalidInput
from compress.hardware import this_machine
from compress.models.anatomy import ModelShape
from compress.stage import INPUT, SOURCE, Stage

if TYPE_CHECKING:
    from compress.pipeline.graph import GraphNode
    from compress.runner.plan import Step
    from compress.runner.prepare import Prepared

GFLOPS_PER_CPU = 25.0
"""Sustained fp32 speed of one CPU in these models' training and evaluation (measured: 20 to 40)."""
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


def estimate(prepared: Prepared) -> dict[str, Estimate]:
    """Estimates of all steps by id, cached ones too."""
    shapes = {SOURCE: prepared.shape}
    bytes_of = {SOURCE: float(FP32_BYTES * prepared.shape.num_parameters)}
    found = {}
    for step in prepared.plan.steps:
        before = shapes[step.node.inputs[INPUT]]
        shape = step.stage.shape(before)
        weight_bytes = step.stage.weight_bytes(shape, bytes_of[step.node.inputs[INPUT]])
        if step.stage.returns == "measurement":
            shape, weight_bytes = before, 0.0
        shapes[step.id], bytes_of[step.id] = shape, weight_bytes
        found[step.id] = _estimate(step.node, shape, weight_bytes)
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


def _estimate(node: GraphNode, shape: ModelShape, weight_bytes: float) -> Estimate:
    options = node.stage.model_dump()
    trains = "learning_rate" in options
    parameters = shape.num_parameters
    per_parameter = FP32_BYTES * len(set(node.inputs.values()))
    checkpoints = 0.0
    if trains:
        per_parameter += ADAM_BYTES + GRADIENT_BYTES
        checkpoints = 2.0 * (FP32_BYTES + ADAM_BYTES) * parameters
    flops = (8.0 if trains else 2.0 * len(set(node.inputs.values()))) * parameters * num_tokens(node.stage)
    return Estimate(
        shape=shape,
        size_mb=weight_bytes / 1e6,
        ram_mb=BASE_RAM_MB + per_parameter * parameters / 1e6,
        disk_mb=(weight_bytes + checkpoints) / 1e6,
        seconds=FIXED_SECONDS + flops / (GFLOPS_PER_CPU * 1e9 * this_machine().num_cpus),
    )


def num_tokens(stage: Stage) -> float:
    """How many tokens a stage reads, by its option `tokens` where it has one."""
    tokens = stage.model_dump().get("tokens")
    return float(tokens) if isinstance(tokens, int) else 20_000.0 if stage.data else 1_000.0
