"""What a user can fix, said once: where it is, what is wrong, what to do. Bugs keep their traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit statuses of `compress`."""

    DONE = 0
    STAGE_FAILED = 1
    INVALID_INPUT = 2
    REQUIREMENT_MISSED = 3
    INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One thing a user can fix. `where` is a place in a file (`stages[1].prune-layers.keep`), a path or a stage."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}"
        return f"{line}; {self.fix}" if self.fix else line


class CompressError(Exception):
    """A failure that the user can fix; printed without a traceback as `where: what; fix`."""

    exit_code = ExitCode.STAGE_FAILED

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        self.problem = Problem(where, what, fix)
        super().__init__(str(self.problem))


class InvalidInput(CompressError):
    """The input is wrong and nothing was computed (exit status 2). Carries every problem that was found."""

    exit_code = ExitCode.INVALID_INPUT

    def __init__(self, where: str, what: str, fix: str = "", others: Sequence[Problem] = ()) -> None:
        super().__init__(where, what, fix)
        self.problems: tuple[Problem, ...] = (self.problem, *others)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> InvalidInput:
        """All of `problems` (at least one) as one error."""
        first, *rest = problems
        return cls(first.where, first.what, first.fix, rest)


class StageFailed(CompressError):
    """A stage stopped: what it had finished is kept (exit status 1)."""


class RequirementMissed(CompressError):
    """What was made is not as good as was asked (exit status 3)."""

    exit_code = ExitCode.REQUIREMENT_MISSED


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK = re.compile(
    "|".join([
        *(rf"{os.strerror(number)}|os error {number}\b" for number in _NO_SPACE),  # Rust: safetensors, tokenizers
        "StorageFull|QuotaExceeded",
        "PytorchStreamWriter failed writing|inline_container.*unexpected pos|basic_ios::clear",  # torch.save
        r"\d+ requested and \d+ written",  # numpy
    ])
)  # fmt: skip
"""What libraries say that give no errno: those in C++ do not know more than that a write fell short."""


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk, or a used up quota, is behind `error`."""
    while error is not None and not isinstance(error, CompressError):
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or _FULL_DISK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
