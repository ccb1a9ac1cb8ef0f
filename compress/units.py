"""Finished units of a stage's work (a layer, a round, a block of text), kept so that a kill costs one of them at most.

They lie below a stage's `work`, which belongs to the stage's key: what is found there was made of the same input, text
and options. What a key does not say, as which CPUs are measured on, is said by `of`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from compress.train.launch import is_follower

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

DONE = "done: %s %s"
"""What is logged of every unit, once, after it is stored: whose it is and its name. So no unit has two such lines."""


@dataclass(frozen=True)
class Unit:
    """What was made: figures, as JSON holds them, and tensors by name."""

    figures: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """The units of one piece of work, by name. Without a folder nothing is kept, and every unit is made.

    what: whose they are, for the log. of: as JSON, what else they were made of; those of anything else are made again.
    In a launch of several processes the first one keeps them, and all read them.
    """

    what: str = ""
    folder: Path | None = None
    of: Any = None
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("compress"))

    def made_of(self, of: Any) -> Self:
        """The same, of `of`."""
        return replace(self, of=of)

    def find(self, name: str) -> Unit | None:
        """The unit `name`, where it is finished, whole and made of the same."""
        if self.folder is None:
            return None
        try:
            stored = json.loads(self._file(name, "json").read_bytes())
            if stored["of"] != self._digest_of():
                return None
            return Unit(stored["figures"], self._tensors(name, stored["sha256"]))
        except (OSError, ValueError, KeyError, TypeError):  # cut off by a crash of the machine
            return None

    def keep(self, name: str, unit: Unit) -> None:
        """Store the unit `name`, whole or not at all, and then log it."""
        if self.folder is None or is_follower():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        sha256 = None
        if unit.tensors:
            from safetensors.torch import save

            data = save({key: tensor.contiguous() for key, tensor in unit.tensors.items()})
            sha256 = hashlib.sha256(data).hexdigest()
            _write(self._file(name, "safetensors"), data)
        stored = {"of": self._digest_of(), "figures": unit.figures, "sha256": sha256}
        _write(self._file(name, "json"), json.dumps(stored).encode())
        self.log.info(DONE, self.what, name)

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """What `make` returns, of types that JSON holds, made and kept where it is not there already."""
        unit = self.find(name)
        if unit is None:
            unit = Unit(make())
            self.keep(name, unit)
        value: Value = unit.figures
        return value

    def _tensors(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """Raises ValueError for a file that is not the one that was written."""
        if sha256 is None:
            return {}
        from safetensors.torch import load

        data = self._file(name, "safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("another file")
        return load(data)

    def _digest_of(self) -> str:
        return hashlib.sha256(json.dumps(self.of, sort_keys=True).encode()).hexdigest()

    def _file(self, name: str, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.{suffix}"


UNKEPT = Units()
"""For work that no stage goes on with."""


def _write(file: Path, data: bytes) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    with unfinished.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
