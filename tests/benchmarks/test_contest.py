"""Workers and turns."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from killing import killed

from compress.benchmarks import contest, report
from compress.benchmarks.contest import Budget, Contestant, Worker, Workload, hold
from compress.benchmarks.environment import pick_cpus, warnings_of
from compress.benchmarks.rounds import Measured, finished, resumed_after, rotated, rounds
from compress.errors import StageFailed
from compress.stage import Reporter
from compress.units import Units


def silent(steps: int = 1, note: str = "") -> None:
    pass


def test_a_worker_measures_a_decoder(toy_decoder: Callable[[str], Path]) -> None:
    measured = hold(
        {"a": Contestant(toy_decoder("a")), "b": Contestant(toy_decoder("b"))},
        [Workload(8, 1, 3), Workload(4, 2, 3)], Budget(3, 60),
        threads=1, cpus=pick_cpus(1), vocab_size=32, advance=silent,
    )  # fmt: skip
    for one in measured.values():
        assert one.kind == "decoder"
        assert set(one.samples) == {"ttft_ms@8", "tpot_ms@8", "ttft_ms@4,batch=2", "tpot_ms@4,batch=2"}
        assert [len(times) for times in one.samples["tpot_ms@8"]] == [3, 3, 3]
        assert [len(times) for times in one.samples["ttft_ms@8"]] == [1, 1, 1]
        assert all(time > 0 for times in one.samples["tpot_ms@8"] for time in times)
        assert one.load_ms > 0
        assert 10 < one.rss_before_load_mb < one.peak_rss_mb < 1000
        assert one.peak_rss_mb < 400, "the worker has loaded torch or a tokenizer"


def test_a_worker_measures_an_encoder(toy_encoder: Callable[[str], Path]) -> None:
    measured = hold(
        {"only": Contestant(toy_encoder("e"))}, [Workload(8, 1, 3)], Budget(3, 60),
        threads=1, cpus=pick_cpus(1), vocab_size=32, advance=silent,
    )  # fmt: skip
    assert list(measured["only"].samples) == ["latency_ms@8"]


def test_a_folder_without_a_model_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"has no model\.onnx"):
        hold({"none": Contestant(tmp_path)}, [Workload(8, 1, 1)], Budget(3, 1),
             threads=1, cpus=[0], vocab_size=32, advance=silent)  # fmt: skip


def test_a_worker_that_dies_is_told_with_its_last_words() -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('out of fuel')"
    with Worker("ours", (sys.executable, "-c", program)) as worker, pytest.raises(StageFailed) as caught:
        worker.ask(do="measure")
    assert "measures ours died: exit status 1, out of fuel" in str(caught.value)


def test_a_killed_worker_hints_at_memory() -> None:
    program = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
    with (
        Worker("ours", (sys.executable, "-c", program)) as worker,
        pytest.raises(StageFailed, match=r"exit status -9; was there enough memory\?"),
    ):
        worker.ask(do="measure")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_who_asks(toy_decoder: Callable[[str], Path], number: signal.Signals) -> None:
    """It is computing by then, and would be for hours."""
    options = ("--prompts", "4", "--threads", "1", "--new-tokens", "100000000")
    program = "from compress.cli.main import main; main()"
    bench = subprocess.Popen(
        [sys.executable, "-c", program, "bench", toy_decoder("toy"), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    worker = wait_for(lambda: next(iter(computing(psutil.Process(bench.pid).children())), None))
    bench.send_signal(number)
    stdout, stderr = bench.communicate(timeout=30)
    try:
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    if number != signal.SIGKILL:
        assert (bench.returncode, stdout, stderr.splitlines()[-1]) == (130, "", "interrupted")


def computing(children: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are past their imports, which take less."""
    return [child for child in children if sum(child.cpu_times()[:2]) > 1.2]


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class FakeWorker:
    """Notes who is asked, and that the one before has answered."""

    asked: list[tuple[str, int]]
    computing: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, **command: Any) -> dict[str, Any]:
        assert not self.computing, "two models compute at once"
        self.computing.append(self.name)
        answer: dict[str, Any] = {"kind": "decoder", "load_ms": 1.0, "rss_before_load_mb": 1.0, "pinned": True}
        if command["do"] == "measure":
            self.asked.append((self.name, command["tokens"]))
            answer = {"times": {"ttft_ms": [1.0]}}
        self.computing.clear()
        return answer | {"peak_rss_mb": 2.0}


def test_models_take_turns_in_a_rotating_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    worker = type("Fake", (FakeWorker,), {"asked": asked, "computing": []})
    monkeypatch.setattr(contest, "Worker", worker)
    monkeypatch.setattr(contest, "SETTLE_SECONDS", 0)
    contestants = {name: Contestant(tmp_path) for name in "ABC"}
    measured = hold(contestants, [Workload(8, 1, 1), Workload(16, 1, 1)], Budget(3, 60),
                    threads=1, cpus=[0], vocab_size=9, advance=silent)  # fmt: skip
    order = "".join(name for name, tokens in asked if tokens == 8)
    assert order == "ABCBCACABABC"
    assert [tokens for _, tokens in asked[:6]] == [8, 8, 8, 16, 16, 16], "a round's turns at one workload are adjacent"
    assert len(measured["A"].samples["ttft_ms@8"]) == 3, "the warm-up counts for nothing"


def test_a_race_goes_on_round_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(contest, "Worker", type("Fake", (FakeWorker,), {"asked": asked, "computing": []}))
    monkeypatch.setattr(contest, "SETTLE_SECONDS", 0)
    contestants = {name: Contestant(tmp_path) for name in "ABC"}
    told: list[str] = []

    def race(reporter: Reporter) -> dict[str, Measured]:
        asked.append(("|", 8))
        told.append(f"process {len(told)}")
        return hold(contestants, [Workload(8, 1, 1)], Budget(4, 60), threads=1, cpus=[0], vocab_size=9, advance=silent,
                    units=Units("latency", tmp_path / "rounds", log=reporter.log), warnings=told[-1:])  # fmt: skip

    measured, lines = killed(race, 2, 1)
    seen = finished(Units(folder=tmp_path / "rounds"))
    assert lines == [f"done: latency round {number}" for number in range(1, 5)]
    assert "".join(name for name, _ in asked) == "|ABCBCACAB|ABCABC|ABCBCA", "each process warms up, the turns go on"
    assert [each.process for each in seen] == [0, 0, 1, 2]
    assert measured["B"].samples == {"ttft_ms@8": [[1.0]] * 4}
    assert resumed_after(seen) == [2, 3]
    assert race(Reporter()) == measured
    assert asked[-1] == ("|", 8), "nothing is left to measure, and no model is loaded for it"
    found = report.with_history({"method": {"warm_up_rounds": 1}, "warnings": ["process 2", "now"]}, seen)
    assert found["method"] == {"warm_up_rounds": 3, "resumed_after_rounds": [2, 3]}
    assert found["warnings"] == ["process 0", "process 1", "process 2", "now"]
    assert report.with_history({"method": {}, "warnings": []}, seen[:2]) == {"method": {}, "warnings": []}


def test_rounds_of_other_processes_count_for_the_budget() -> None:
    ticks = iter(range(100))
    assert list(rounds(Budget(10, 16), lambda: next(ticks), [5, 5])) == [0, 3, 4, 5, 6]
    assert not Budget(10, 20).is_spent([8, 8]), "three are the least"
    assert Budget(10, 20).is_spent([6, 6, 6])
    assert not Budget(10, 20).is_spent([5, 5, 5])
    assert Budget(3, 1e9).is_spent([1, 1, 1])


def test_rounds_stop_at_the_budget_but_not_before_three() -> None:
    def clock_of(seconds_a_round: float) -> Callable[[], float]:
        ticks = iter(range(1000))
        return lambda: next(ticks) * seconds_a_round

    assert list(rounds(Budget(10, 0.1), clock_of(5))) == [0, 1, 2, 3]
    assert list(rounds(Budget(5, 1e9), clock_of(5))) == [0, 1, 2, 3, 4, 5]
    assert len(list(rounds(Budget(100, 60), clock_of(5)))) == pytest.approx(12, abs=2)


def test_every_model_begins_some_round() -> None:
    assert {rotated("ABC", number)[0] for number in range(1, 4)} == set("ABC")


def test_one_cpu_of_each_core_comes_first(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert pick_cpus(2, [0, 2, 1, 3], tmp_path) == [0, 1]
    assert pick_cpus(3, [0, 1, 2, 3], tmp_path) == [0, 1, 2]


def test_a_busy_machine_and_too_few_cpus_are_warned_of() -> None:
    calm = {"busy_percent": 2.0, "cpus": [0, 1], "threads": 2, "governor": "performance"}
    assert warnings_of(calm) == []
    found = warnings_of({**calm, "busy_percent": 80.0, "cpus": [0], "governor": "powersave"})
    assert [word in text for word, text in zip(("busy", "share", "powersave"), found, strict=True)] == [True] * 3
