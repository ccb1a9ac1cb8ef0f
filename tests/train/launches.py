"""Processes of a launch without a launcher: nobody ends those that are left but they themselves."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from compress.errors import CompressError, StageFailed
from compress.stage import Reporter

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "accelerate", "torch.distributed.nn.functional", "compress.train.lifeline"])


def launch(first: Callable[[Path], None], folder: Path, num_processes: int = 2) -> list[BaseProcess]:
    """Start `first` as the first process, and others that follow it. What process N says is in `folder / N`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = range(num_processes)
    processes = [_SERVER.Process(target=_one, args=(first, folder, rank, num_processes, port)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def _one(first: Callable[[Path], None], folder: Path, rank: int, num_processes: int, port: int) -> None:
    os.environ |= {
        "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
    }  # fmt: skip
    os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT), 2)
    from compress.train import lifeline
    from compress.train.distributed import follow, leading

    lifeline._GRACE = 1.0
    try:
        if rank:
            follow()
        else:
            with leading():
                first(folder)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def busy(folder: Path) -> None:
    """Prune, say, until a training begins that never does."""
    (folder / "busy").touch()
    time.sleep(600)


def trains(folder: Path) -> None:
    """Train, with a mean over all processes."""
    from compress.train.distributed import everywhere

    assert everywhere(_mean, folder, Reporter()) == 0.5
    (folder / "busy").touch()
    time.sleep(600)


def is_alone(folder: Path) -> None:
    """A training of which the others die."""
    from compress.train.distributed import everywhere

    everywhere(_die, folder, Reporter())


def is_alone_and_hangs(folder: Path) -> None:
    """The same where nothing fails at once, as on GPUs."""
    from compress.train.distributed import everywhere

    everywhere(_die_and_hang, folder, Reporter())


def waits_for_one_that_hangs(folder: Path) -> None:
    """The first one dies in the midst of a training whose others do not notice, as on GPUs."""
    from compress.train.distributed import everywhere

    everywhere(_hang, folder, Reporter())


def fails(folder: Path) -> None:
    """A training that fails in another process, which has a clear word for it."""
    from compress.train.distributed import everywhere

    everywhere(_fail, folder, Reporter())


def decides(folder: Path) -> None:
    """A decision, by processes that would each decide something else."""
    from compress.train.distributed import everywhere

    assert everywhere(_decide, folder, Reporter()) == [0.0, 0.0]


def _mean(_: Path, __: Reporter) -> float:
    import torch
    from torch import distributed

    rank = torch.tensor(float(os.environ["RANK"]))
    distributed.all_reduce(rank)
    return rank.item() / distributed.get_world_size()


def _decide(_: Path, __: Reporter) -> list[float]:
    from torch import distributed

    from compress.train.distributed import agreed

    mine, all_of_them = agreed(lambda: float(os.environ["RANK"])), [0.0, 0.0]
    distributed.all_gather_object(all_of_them, mine)
    return all_of_them


def _die(job: Path, reporter: Reporter) -> None:
    if os.environ["RANK"] != "0":
        os._exit(9)
    _mean(job, reporter)


def _die_and_hang(job: Path, reporter: Reporter) -> None:
    if os.environ["RANK"] != "0":
        os._exit(9)
    _stuck()


def _hang(folder: Path, reporter: Reporter) -> None:
    _mean(folder, reporter)  # all of them are here
    (folder / "busy").touch()
    _stuck()


def _stuck() -> None:
    """In code that lets other threads run, and no signal through to Python."""
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.get("never")


def _fail(folder: Path, reporter: Reporter) -> None:
    if os.environ["RANK"] != "0":
        np.zeros(10**6).tofile("/dev/full") if (folder / "full").exists() else None
        raise StageFailed("teacher", "is not the one", "take another")
    _mean(folder, reporter)
