"""The tensors of safetensors files, read from their headers: nothing is loaded. Imports no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError

_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file. It lies from `start` to `stop`, in bytes from the file's own beginning."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.stop - self.start

    def equals(self, other: StoredTensor) -> bool:
        """Whether both have one type, one shape and the same bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with self.file.open("rb") as ours, other.file.open("rb") as theirs:
            ours.seek(self.start)
            theirs.seek(other.start)
            sizes = (min(_CHUNK, self.num_bytes - start) for start in range(0, self.num_bytes, _CHUNK))
            return all(ours.read(size) == theirs.read(size) for size in sizes)

    def read(self) -> bytes:
        """Its bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.num_bytes)


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file: 8 bytes little-endian length, a JSON header, then the data.

    Raises CompressError for a file that is not safetensors, or cut short.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        tensors = []
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                tensors.append(StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), start, stop))
        missing = max((tensor.stop for tensor in tensors), default=8 + length) - file.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise CompressError(str(file), "is not a whole safetensors file", "was it cut short? get it again") from error
    return tensors


def names_in(files: Iterable[Path]) -> set[str]:
    """The names of the tensors in `files`; none where one can't be read, which is told where it is loaded."""
    try:
        return {tensor.name for file in files for tensor in stored_tensors(file)}
    except (CompressError, OSError):
        return set()
