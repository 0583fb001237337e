# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics on a socket of their own, beside the device's: docs/statistics.md.

The device's socket belongs to one front end, which is connected all the time; so counters are
read from ``SOCKET.stats``, a UNIX stream socket that only its owner can connect to.  Whoever
connects gets one JSON document, in UTF-8, up to the end of the stream; nothing is read from him.
Invariant: a reader that does not read holds up other readers for :data:`SEND_TIMEOUT` seconds, one
that reads slowly for :data:`DOCUMENT_TIMEOUT` at most, and neither ever the device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vhostvmbus.vhost_user.sockets import bind_listener

log = logging.getLogger(__name__)

SEND_TIMEOUT = 1.0
"""Seconds in which a reader has to take a part of the document."""
DOCUMENT_TIMEOUT = 10.0
"""Seconds in which a reader has to take all of it."""
RETRY_INTERVAL = 0.2
"""Seconds until a reader is let in that could not be."""
MAX_DOCUMENT = 16 << 20
"""Bytes that a document has at most, for the reader."""

Snapshot = Callable[[], dict[str, Any]]


def statistics_path(path: str | os.PathLike[str]) -> Path:
    """Returns where the statistics of the device at the socket ``path`` are."""
    return Path(f"{os.fspath(path)}.stats")


@contextlib.contextmanager
def serving_statistics(path: str | os.PathLike[str], snapshot: Snapshot) -> Iterator[Path]:
    """Serves what ``snapshot`` returns (called in another thread) for as long as the block runs.

    ``path`` is the device's socket.  Raises as :func:`~.sockets.bind_listener`.
    """
    where = statistics_path(path)
    wake, stop = socket.socketpair()
    with wake, stop, bind_listener(where, mode=0o600) as listener:
        thread = threading.Thread(
            target=_serve, args=(listener, wake, snapshot), name="statistics", daemon=True
        )
        thread.start()
        try:
            yield where
        finally:
            stop.close()
            thread.join()


def _serve(listener: socket.socket, wake: socket.socket, snapshot: Snapshot) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while not any(fd == wake.fileno() for fd, _ in poll.poll()):
        try:
            reader, _ = listener.accept()
        except OSError as error:
            # Descriptors have run out, say. It waits in the queue until there are some.
            log.warning("a reader of statistics cannot be let in: %s", error)
            if select.select([wake], [], [], RETRY_INTERVAL)[0]:
                return
            continue
        with reader, contextlib.suppress(OSError):
            _answer(reader, snapshot)


def _answer(reader: socket.socket, snapshot: Snapshot) -> None:
    try:
        document = json.dumps(snapshot()).encode()
    except Exception:
        log.exception("no statistics")  # the reader sees an empty document
        return
    deadline = time.monotonic() + DOCUMENT_TIMEOUT
    reader.settimeout(SEND_TIMEOUT)
    left = memoryview(document)
    while left and time.monotonic() < deadline:
        left = left[reader.send(left) :]


def read_statistics(path: str | os.PathLike[str], timeout: float = 10.0) -> dict[str, Any]:
    """Returns the statistics of the device that is served at the socket ``path``.

    Raises ``OSError`` if nobody serves them, ``ValueError`` for an answer that is no such document.
    """
    document = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(os.fspath(statistics_path(path)))
        while data := sock.recv(1 << 16):
            document += data
            if len(document) > MAX_DOCUMENT:
                raise ValueError("the answer does not end")
    found = json.loads(document)
    if not isinstance(found, dict):
        raise ValueError("the answer is no JSON object")
    return found
