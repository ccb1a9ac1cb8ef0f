"""Several models measured against each other: a process each, one computing at a time, in turns that rotate.

Interleaving (ABC, BCA, CAB …) gives every model the same share of whatever else the machine does, and a ratio is
taken within a round, so slow drift cancels.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

from compress.errors import StageFailed
from compress.stage import Progress

COMMAND = (sys.executable, "-P", "-m", "compress.benchmarks.worker")
"""-P: no module of the working directory, which may be a stranger's folder, stands in for one of ours."""
Runtime = Literal["ort", "genai"]
MIN_ROUNDS = 3
SETTLE_SECONDS = 0.05
"""Pause between turns: ONNX Runtime's threads spin for up to 30 ms after a run before they sleep."""


@dataclass(frozen=True)
class Contestant:
    """A folder with an ONNX model and the runtime that it is measured in."""

    folder: Path
    runtime: Runtime = "ort"


@dataclass(frozen=True)
class Workload:
    """A prompt of `tokens` tokens in each of `batch` rows, then `new_tokens` decoding steps."""

    tokens: int
    batch: int
    new_tokens: int

    def figure(self, what: str) -> str:
        """The name of a figure at this workload: `tpot_ms@128`, `tpot_ms@128,batch=4`."""
        return f"{what}@{self.tokens}" + (f",batch={self.batch}" if self.batch != 1 else "")


@dataclass(frozen=True)
class Budget:
    """At most `rounds` rounds, and none begun that would end after `seconds`, but at least MIN_ROUNDS."""

    rounds: int
    seconds: float


@dataclass
class Measured:
    """What was seen of one model. samples[figure][round] are the times in ms of that round."""

    kind: str
    load_ms: float
    rss_before_load_mb: float
    pinned: bool
    peak_rss_mb: float = 0.0
    samples: dict[str, list[list[float]]] = field(default_factory=dict)


class Worker:
    """A fresh process with one model. Its errors become StageFailed."""

    def __init__(self, name: str, command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends this one
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise StageFailed("latency", f"the process that measures {self.name} died: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StageFailed(**answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait(timeout=30)
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return (
            f"exit status {status}"
            + (f", {lines[-1]}" if lines else "")
            + ("; was there enough memory?" if status == -9 else "")
        )


def hold(
    contestants: Mapping[str, Contestant], workloads: Sequence[Workload], budget: Budget,
    *, threads: int, cpus: Sequence[int], vocab_size: int, advance: Progress,
) -> dict[str, Measured]:  # fmt: skip
    """Load every model, warm all of them up with every workload, then measure in rounds.

    Raises StageFailed where a model can't be loaded or run or its process dies.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in contestants}
        measured = {}
        for name, worker in workers.items():
            _read_into_page_cache(contestants[name].folder)
            loaded = worker.ask(
                do="load", folder=str(contestants[name].folder), runtime=contestants[name].runtime,
                threads=threads, cpus=list(cpus),
            )  # fmt: skip
            measured[name] = Measured(**loaded)
        names = list(workers)
        started = time.monotonic()
        for number in rounds(budget, time.monotonic):
            for workload in workloads:
                for name in rotated(names, number):
                    time.sleep(SETTLE_SECONDS)
                    answer = workers[name].ask(do="measure", vocab_size=vocab_size, **vars(workload))
                    measured[name].peak_rss_mb = answer["peak_rss_mb"]
                    if number > 0:
                        for what, times_ms in answer["times"].items():
                            measured[name].samples.setdefault(workload.figure(what), []).append(times_ms)
            advance(1, f"round {number}, {time.monotonic() - started:.0f} s")
        return measured


def rounds(budget: Budget, clock: Callable[[], float]) -> Iterator[int]:
    """0 for the warm-up, then 1, 2, … as far as the budget goes, taking each round to be as long as the one before."""
    started = last = clock()
    for number in range(max(budget.rounds, MIN_ROUNDS) + 1):
        now = clock()
        if number > MIN_ROUNDS and now - started + (now - last) > budget.seconds:
            return
        last = now
        yield number


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another model."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def _read_into_page_cache(folder: Path) -> None:
    """So that loading times compare the models and not which was read from disk last."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
