"""Training in several processes, started by `torchrun` or `accelerate launch` around an ordinary command.

The first process runs the whole pipeline. The others `follow`: they wait until it trains, join in, and end with it.
Nothing here imports torch unless there are several processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from compress.stage import Reporter

Job = TypeVar("Job")
Result = TypeVar("Result")

_PATIENCE = timedelta(days=30)
"""How long the others wait for the first process, which may be pruning or exporting."""


def num_processes() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_follower() -> bool:
    """Whether this process is to call `follow` and nothing else."""
    return num_processes() > 1 and os.environ["RANK"] != "0"


def everywhere(function: Callable[[Job, Reporter], Result], job: Job, reporter: Reporter) -> Result:
    """`function(job, reporter)` here and, silently, in all processes that follow. Returns this process's result.

    `function` is a module's own, so that the others find it by name; `job` can be pickled.
    """
    if num_processes() > 1:
        _exchange((function, job))
    return function(job, reporter)


def follow() -> None:
    """Take part in every training of the first process until it calls `release`."""
    while (work := _exchange(None)) is not None:
        function, job = work
        function(job, Reporter())
    _leave()


def release() -> None:
    """Let the processes that follow end: what the first one calls at the end of its run."""
    if num_processes() > 1:
        _exchange(None)
        _leave()


def _exchange(work: object) -> tuple[Callable[[object, Reporter], object], object] | None:
    """The first process's `work`, in every process."""
    import torch
    import torch.distributed.nn.functional  # imported later, its default arguments would keep the group from closing
    from accelerate import PartialState
    from torch import distributed

    if not distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    message = [work]
    distributed.broadcast_object_list(message, src=0)
    received: tuple[Callable[[object, Reporter], object], object] | None = message[0]  # type: ignore[assignment]
    return received


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()
