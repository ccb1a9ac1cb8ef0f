"""What ties the processes of a launch together: a connection between the first one and each of the others.

The kernel closes the connections of a process that dies, however it dies, and gives up one to a machine that has gone
silent after _SILENCE seconds. So that a process is gone is noticed by the others whatever they, or it, are computing,
and one that is busy for hours is waited for. What the first one wants done, and why one fails, is told through it too.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Protocol

_SILENCE, _PROBES = 45, 6
_GRACE = 10.0
"""Seconds that a process has to end by itself when one that it needs is gone, before it is ended."""
_ADDRESS = "compress/lifeline"
GONE = "ended without a word; was it killed, or out of memory?"


class Store(Protocol):
    """The key-value store of a launch, torch's."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class Peer:
    """Another process, such as `process 1`. `ended` is set when it is gone.

    last_word: an exit status, which all who need it end with too; or what it failed of.
    What it sends is read by a thread as it comes: the main one may be in a collective that will never be complete.
    """

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self.last_word: int | str | None = None
        self.ended = threading.Event()
        self._connection = connection
        self._received: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._lock, self._needed = threading.Lock(), False
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: object) -> None:
        """Send what can be pickled. Raises OSError where the process is gone."""
        self._connection.send(message)

    def receive(self) -> object:
        """What it sent next; EOFError, for ever, where it is gone. Blocks."""
        message = self._received.get()
        if isinstance(message, EOFError):
            self._received.put(message)
            raise message
        return message

    def close(self) -> None:
        """End the connection, so that the process knows that nothing will be sent any more."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as connected:
            connected.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Around what can't go on without it: when it ends, the block is left by an exception, or the process ends."""
        with self._lock:
            self._needed = True
        try:
            if self.ended.is_set():
                raise EOFError
            yield
        finally:
            with self._lock:
                self._needed = False

    def _listen(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = self._connection.recv()
                    if isinstance(message, (int, str)):
                        self.last_word = message
                    self._received.put(message)
        finally:
            self._received.put(EOFError())
            self.ended.set()
            self._free_main_thread()

    def _free_main_thread(self) -> None:
        """Let a broken collective raise; interrupt what goes on; end the process where neither helps."""
        time.sleep(_GRACE)
        with self._lock:
            if not self._needed:
                return
            _thread.interrupt_main()
        time.sleep(_GRACE)
        if self._needed:
            if not isinstance(self.last_word, int):
                print(f"error: {self.name}: {self.last_word or GONE}", file=sys.stderr, flush=True)
            os._exit(self.last_word if isinstance(self.last_word, int) else 1)


def gather(store: Store, host: str, number: int, patience_s: float) -> list[Peer]:
    """The other processes, `number` of them, as they join the first one, which `host` leads to.

    Raises TimeoutError where one does not come.
    """
    key, peers = secrets.token_bytes(32), list[Peer]()
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
        store.set(_ADDRESS, json.dumps([host, server.getsockname()[1], key.hex()]))
        until = time.monotonic() + patience_s
        while len(peers) < number:
            server.settimeout(max(0.1, until - time.monotonic()))
            accepted, _ = server.accept()
            with contextlib.suppress(AuthenticationError, EOFError, OSError):  # not one of us
                connection = _connection(accepted)
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                peers.append(Peer(f"process {connection.recv()}", connection))
    return peers


def join(store: Store, rank: int, patience_s: float) -> Peer:
    """The first process, for another one. Raises OSError where it can't be reached."""
    host, port, key = json.loads(store.get(_ADDRESS))
    connection = _connection(socket.create_connection((host, port), timeout=patience_s))
    answer_challenge(connection, bytes.fromhex(key))
    deliver_challenge(connection, bytes.fromhex(key))
    connection.send(rank)
    return Peer("process 0", connection)


def _connection(connected: socket.socket) -> Connection:
    """A connection that the kernel closes when the other machine has been silent for _SILENCE seconds."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    each = _SILENCE // (_PROBES + 3)
    for name, value in {
        "TCP_KEEPIDLE": 3 * each, "TCP_KEEPINTVL": each, "TCP_KEEPCNT": _PROBES, "TCP_USER_TIMEOUT": _SILENCE * 1000,
    }.items():  # fmt: skip
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())
