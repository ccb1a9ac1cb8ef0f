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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from compress.benchmarks.rounds import Budget as Budget
from compress.benchmarks.rounds import Measured as Measured
from compress.benchmarks.rounds import Round, finished, gathered, rotated, round_name, rounds
from compress.errors import StageFailed
from compress.stage import Progress
from compress.units import UNKEPT, Unit, Units

COMMAND = (sys.executable, "-P", "-m", "compress.benchmarks.worker")
"""-P: no module of the working directory, which may be a stranger's folder, stands in for one of ours."""
Runtime = Literal["ort", "genai"]
SETTLE_SECONDS = 0.05
"""Pause between turns: ONNX Runtime's threads spin for up to 30 ms after a run before they sleep."""


@dataclass(frozen=True)
class Contestant:
    """A folder with an ONNX model and the runtime that it is measured in."""

    folder: Path
    runtime: Runtime = "ort"


@dataclass(frozen=True)
class Workload:
    """A prompt of `tokens` tokens in each of `batch` rows, then `new_tokens` decoding steps.

    chunk: the prompt is read so many tokens a call, by the first model alone; 0: as each folder says.
    """

    tokens: int
    batch: int
    new_tokens: int
    chunk: int = 0

    def figure(self, what: str) -> str:
        """The name of a figure at this workload: `tpot_ms@128`, `tpot_ms@128,batch=4`, `ttft_ms@1024,chunk=64`."""
        others = {"batch": self.batch if self.batch != 1 else 0, "chunk": self.chunk}
        return f"{what}@{self.tokens}" + "".join(f",{name}={value}" for name, value in others.items() if value)


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
    units: Units = UNKEPT, warnings: Sequence[str] = (),
) -> dict[str, Measured]:  # fmt: skip
    """Load every model, warm all of them up with every workload, then measure in rounds.

    units: rounds that they hold, of other processes, are not measured again; where more are due, models are loaded and
    warmed up anew. warnings: why the rounds of this process may be off. Raises StageFailed where a model can't be
    loaded or run or its process dies.
    """
    seen = finished(units)
    advance(len(seen))
    before = [each.seconds for each in seen]
    if budget.is_spent(before):
        return gathered(seen)
    process = seen[-1].process + 1 if seen else 0
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in contestants}
        loaded = {}
        for name, worker in workers.items():
            _read_into_page_cache(contestants[name].folder)
            loaded[name] = worker.ask(
                do="load", folder=str(contestants[name].folder), runtime=contestants[name].runtime,
                threads=threads, cpus=list(cpus),
            )  # fmt: skip
        started = time.monotonic()
        for number in rounds(budget, time.monotonic, before):
            began = time.monotonic()
            loaded, times = _take_turns(workers, loaded, workloads, number, vocab_size)
            now = time.monotonic()
            if number > 0:
                seen.append(Round(process, now - began, list(warnings), loaded, times))
                units.keep(round_name(number), Unit(vars(seen[-1])))
            advance(1, f"round {number}, {now - started:.0f} s")
    return gathered(seen)


def _take_turns(
    workers: Mapping[str, Worker], loaded: Mapping[str, dict[str, Any]], workloads: Sequence[Workload], number: int,
    vocab_size: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:  # fmt: skip
    """One round: `loaded` with the peak memory that each model has now, and its times by figure."""
    peaks_mb: dict[str, float] = {}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    for workload in workloads:
        for name in rotated(list(workers) if not workload.chunk else _first_decoder(loaded), number):
            time.sleep(SETTLE_SECONDS)
            answer = workers[name].ask(do="measure", vocab_size=vocab_size, **vars(workload))
            peaks_mb[name] = answer["peak_rss_mb"]
            times[name] |= {workload.figure(what): seen_ms for what, seen_ms in answer["times"].items() if seen_ms}
    return {name: {**own, "peak_rss_mb": peaks_mb[name]} for name, own in loaded.items()}, times


def _first_decoder(loaded: Mapping[str, dict[str, Any]]) -> list[str]:
    """The first model, where it reads prompts."""
    return [name for name in list(loaded)[:1] if loaded[name]["kind"] == "decoder"]


def _read_into_page_cache(folder: Path) -> None:
    """So that loading times compare the models and not which was read from disk last."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
