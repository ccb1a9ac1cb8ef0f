"""How this process was launched, and what of a launch can't be trained in. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from compress.errors import ExitCode, InvalidInput, Problem

_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""Switches of accelerate's, by what they are called."""
_DECIDED = {
    "ACCELERATE_MIXED_PRECISION": ("--mixed_precision", "stages have `precision` for that"),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "nothing here is compiled"),
}
"""Options of `accelerate launch` that change what a training computes, which is for the pipeline file to say."""
_ON = {"1", "true", "yes", "y", "on", "t"}
_NEEDED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_processes() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_follower() -> bool:
    """Whether this process is to call `follow` and nothing else."""
    return num_processes() > 1 and os.environ["RANK"] != "0"


def check_launch() -> None:
    """Raises InvalidInput for a launch that no stage can train in; in processes that follow, SystemExit in silence."""
    problems = list(_problems())
    if problems and is_follower():
        raise SystemExit(ExitCode.INVALID_INPUT)
    if problems:
        raise InvalidInput.of(problems)


def _problems() -> Iterator[Problem]:
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "").lower() in _ON:
            what = f"{name} is switched on ({variable}), and a training under it could not be gone on with after a kill"
            yield Problem("launch", what, "each process trains a whole copy: use torchrun, or accelerate without it")
    for variable, (option, instead) in _DECIDED.items():
        value = os.environ.get(variable, "no")
        if value.lower() != "no":
            what = f"{option} {value} ({variable}) changes what is computed, which the pipeline file decides"
            yield Problem("launch", what, f"launch with {option} no: {instead}")
    for variable in _NEEDED if num_processes() > 1 else ():
        if variable not in os.environ:
            yield Problem("launch", f"RANK is set and {variable} is not", "start the processes with torchrun")
