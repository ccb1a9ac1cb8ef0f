"""Training in several processes, started by `torchrun` or `accelerate launch` around an ordinary command.

The first process runs the whole pipeline, `leading` the others. They `follow`: they wait until it trains, join in, and
end with it. Nothing here imports torch unless there are several processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar, cast

from compress.errors import CompressError, ExitCode, StageFailed, is_full_disk
from compress.stage import Reporter
from compress.train.launch import check_launch, is_follower, num_processes
from compress.train.lifeline import GONE, Peer, Store, gather, join

Job = TypeVar("Job")
Result = TypeVar("Result")

_MEETING = timedelta(minutes=5)
"""How long processes wait for one another at the start."""
_PATIENCE = timedelta(days=30)
"""How long a collective waits for a process that lives: the first one may be quantising. One that died is noticed."""
_OTHERS: ContextVar[Sequence[Peer]] = ContextVar("others")
"""In the first process, the others."""
_INTERRUPTED = "interrupted"
_MOMENT_S = 1.0
"""What a process holds is closed one after the other when it ends: so long may pass between two signs of it."""
_AGAIN = "run again: it goes on from the last checkpoint"


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Around all that the first process does, or the only one: the others end with it, with its exit status.

    Raises InvalidInput for a launch that can't train, StageFailed where the others do not come.
    """
    check_launch()
    if num_processes() == 1:
        yield
        return
    with _met():
        store = _store()
        others = gather(store, os.environ["MASTER_ADDR"], num_processes() - 1, _MEETING.total_seconds())
    token, status = _OTHERS.set(others), 1
    try:
        yield
        status = 0
    except BaseException as error:
        status = getattr(error, "exit_code", 1)
        raise
    finally:
        _OTHERS.reset(token)
        for other in others:
            with contextlib.suppress(OSError):
                other.send(int(status))
        if status == 0:
            _leave()
        for other in others:
            other.close()


def follow() -> None:
    """Take part in every training of the first process, until that ends.

    Raises StageFailed where it dies, SystemExit with its status where it fails: it says why itself.
    """
    check_launch()
    with _met():
        store = _store()
        first = join(store, int(os.environ["RANK"]), _MEETING.total_seconds())
    try:
        while not isinstance(message := first.receive(), int):
            function, job = cast("tuple[Callable[[object, Reporter], object], object]", message)
            with first.needed():
                _take_part(function, job, Reporter())
    except BaseException as error:
        _tell(first, error)
        raise
    if message:
        sys.exit(message)
    _leave()


def everywhere(function: Callable[[Job, Reporter], Result], job: Job, reporter: Reporter) -> Result:
    """`function(job, reporter)` here and, silently, in all processes that follow. Returns this process's result.

    `function` is a module's own, so that the others find it by name; `job` can be pickled. Raises StageFailed where
    another process fails or dies.
    """
    if num_processes() == 1:
        return function(job, reporter)
    others = _OTHERS.get()
    try:
        with contextlib.ExitStack() as all_needed:
            for other in others:
                all_needed.enter_context(other.needed())
                other.send((function, job))
            return _take_part(function, job, reporter)
    except (OSError, EOFError, RuntimeError, KeyboardInterrupt) as error:  # of a broken collective; of the launcher
        _explain(others, error)
        raise


def agreed(decide: Callable[[], Result]) -> Result:
    """What `decide` returns in the first process, which alone calls it: in every process, all of which call this.

    What decides how a training goes on is decided once: figures differ in their last digits between machines, and
    files may have changed by the time that the next process looks.
    """
    if num_processes() == 1:
        return decide()
    from torch import distributed

    decided = [None if is_follower() else decide()]
    distributed.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[return-value]


def _store() -> Store:
    """The launch's own key-value store."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    return store  # type: ignore[no-any-return]


@contextlib.contextmanager
def _met() -> Iterator[None]:
    """Around the meeting of all processes. Raises StageFailed where it does not come about."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:  # torch's are RuntimeErrors
        where = f"process {os.environ['RANK']} of {num_processes()}"
        what = f"did not meet the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        raise StageFailed(where, what, "start all of them together, as torchrun does") from error


def _take_part(function: Callable[[Job, Reporter], Result], job: Job, reporter: Reporter) -> Result:
    """`function(job, reporter)` in a process group; no process leaves before all have done it."""
    import torch
    import torch.distributed.nn.functional  # imported later, its default arguments would keep the group from closing
    from accelerate import PartialState
    from torch import distributed

    if not distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    result = function(job, reporter)
    PartialState().wait_for_everyone()
    return result


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _explain(others: Sequence[Peer], error: BaseException) -> None:
    """Raises what other processes failed of, where that is what `error` comes from.

    A launcher ends the processes that are left, too: not before this one has said why.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + _MOMENT_S
    for other in others:
        other.ended.wait(max(0.0, until - time.monotonic()))
    last_words = {other.name: other.last_word for other in others if other.last_word or other.ended.is_set()}
    if last_words and _INTERRUPTED not in last_words.values():
        what = "; ".join(f"{name}: {word or GONE}" for name, word in last_words.items())
        raise StageFailed("launch", what, _AGAIN) from error
    signal.signal(signal.SIGTERM, before)
    if last_words:
        raise KeyboardInterrupt from error


def _tell(first: Peer, error: BaseException) -> None:
    """Tell the first process what this one fails of; SystemExit where that one says it, or failed first itself.

    Raises StageFailed where the first process died.
    """
    if first.ended.wait(_MOMENT_S):
        if isinstance(first.last_word, int):
            sys.exit(first.last_word)
        raise StageFailed(first.name, GONE, _AGAIN) from error
    expected = isinstance(error, CompressError)
    told, status = str(error) if expected else f"{type(error).__name__}: {error}", 1
    if is_full_disk(error):
        expected, told = True, "no space is left on its disk"
    elif isinstance(error, KeyboardInterrupt):
        expected, told, status = True, _INTERRUPTED, ExitCode.INTERRUPTED
    with contextlib.suppress(OSError):
        first.send(told)
        if expected:
            sys.exit(status)
