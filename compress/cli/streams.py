"""stdout and stderr as they may be: closed, full, cut off or of another encoding. None of that ends what is running."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from compress.errors import CompressError

_GONE = (errno.EPIPE, errno.EIO)
"""Whoever read has had enough (`| head`), or the terminal is closed: nobody is left to be told."""
_PLAIN = "compress-plain"
"""Our name, among Python's handlers of encoding errors, for what `_plain` does."""
_ASCII = str.maketrans(
    {"±": "+-", "×": "x", "→": "->", "≈": "~", "≤": "<=", "≥": ">=", "…": "...", "–": "-", "—": "-", "‖": "||",
     "²": "^2", "─": "-", "━": "-", "│": "|", "‘": "'", "’": "'", "“": '"', "”": '"'}
)  # fmt: skip


class Stream(io.TextIOWrapper):
    """A text stream that takes whatever is printed. `lost` is why it could not be written, where it could not."""

    lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or note why not."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or note why not."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Have all that is still to come, and what waits in buffers, go nowhere."""
        self.lost = self.lost or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Have a stdout and a stderr that take whatever is printed."""
    _fill_descriptors()
    codecs.register_error(_PLAIN, _plain)
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(_settled(stream)) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def flush_stdout(kept: str = "") -> None:
    """Send off what was printed. kept: where to find it, if it can't be sent.

    Raises CompressError where stdout can't be written and nothing is kept; it is no error that nobody reads.
    """
    stream = sys.stdout
    stream.flush()
    if not isinstance(stream, Stream) or stream.lost is None or stream.lost.errno in _GONE:
        return
    lost, stream.lost = stream.lost, None  # told once
    what = f"can't be written ({lost.strerror})"
    if not kept:
        raise CompressError("stdout", what, "print to another place")
    print(f"warning: stdout: {what}; {kept}", file=sys.stderr)


def _fill_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed, or the first files that are opened would be taken for them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


@contextlib.contextmanager
def _settled(stream: TextIO | None) -> Iterator[TextIO]:
    if stream is None or stream.closed:
        with Stream(open(os.devnull, "wb"), "utf-8", _PLAIN) as nowhere:
            yield nowhere
    elif isinstance(stream, io.TextIOWrapper):
        over = Stream(stream.buffer, stream.encoding, _PLAIN, line_buffering=stream.line_buffering)
        try:
            yield over
        finally:
            over.flush()
            over.detach()  # else what it wraps would be closed with it
    else:  # a test's, or a notebook's
        yield stream


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What a character that an encoding lacks is printed as: one or two that mean the same, or its number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_ASCII)
    try:
        text.encode(error.encoding)
    except UnicodeEncodeError:
        text = text.encode("ascii", "backslashreplace").decode()
    return text, error.end
