"""The rounds of a contest: how many there are, who begins each, and what was seen, also by a process before this one.

Times are compared within a round, so those of a round that another process measured, perhaps after a reboot, are worth
as much as any: what is finished is kept, and only the models are loaded and warmed up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from compress.units import Units

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Budget:
    """At most `rounds` rounds, and none begun that would end after `seconds`, but at least MIN_ROUNDS."""

    rounds: int
    seconds: float

    @property
    def most(self) -> int:
        """As many rounds as there may be."""
        return max(self.rounds, MIN_ROUNDS)

    def is_spent(self, seconds: Sequence[float]) -> bool:
        """Whether no round may follow those that took so many seconds each."""
        is_late = len(seconds) >= MIN_ROUNDS and sum(seconds) + seconds[-1] > self.seconds
        return is_late or len(seconds) >= self.most


@dataclass
class Measured:
    """What was seen of one model. samples[figure][round] are the times in ms of that round."""

    kind: str
    load_ms: float
    rss_before_load_mb: float
    pinned: bool
    peak_rss_mb: float = 0.0
    samples: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What one round saw of every model, by its name: `loaded` is what its worker said of itself, `times` are in ms, by
    figure. process: the number of processes that measured before. warnings: why this one's figures may be off.
    """

    process: int
    seconds: float
    warnings: Sequence[str]
    loaded: Mapping[str, Mapping[str, Any]]
    times: Mapping[str, Mapping[str, list[float]]]


def rounds(budget: Budget, clock: Callable[[], float], before: Sequence[float] = ()) -> Iterator[int]:
    """0 for the warm-up, then 1, 2, … as far as the budget goes, taking each round to be as long as the one before.

    before: the seconds of each round that is measured already: they count, and the numbers go on from there.
    """
    started = last = clock()
    for number in (0, *range(len(before) + 1, budget.most + 1)):
        now = clock()
        if number > MIN_ROUNDS and sum(before) + now - started + (now - last) > budget.seconds:
            return
        last = now
        yield number


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another model."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def round_name(number: int) -> str:
    """Of the unit that round `number`, from 1, is kept as."""
    return f"round {number}"


def finished(units: Units) -> list[Round]:
    """The rounds that are kept, in their order."""
    found: list[Round] = []
    while (unit := units.find(round_name(len(found) + 1))) is not None:
        found.append(Round(**unit.figures))
    return found


def gathered(seen: Sequence[Round]) -> dict[str, Measured]:
    """What all rounds saw of each model; of loading, what the last process saw."""
    measured = {name: Measured(**loaded) for name, loaded in seen[-1].loaded.items()}
    for name, one in measured.items():
        one.peak_rss_mb = max(each.loaded[name]["peak_rss_mb"] for each in seen)
        for each in seen:
            for figure, times_ms in each.times[name].items():
                one.samples.setdefault(figure, []).append(times_ms)
    return measured


def resumed_after(seen: Sequence[Round]) -> list[int]:
    """The numbers of the rounds behind which another process went on."""
    return [number for number, (one, following) in enumerate(pairwise(seen), 1) if one.process != following.process]
