# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever knocks at a back end that serves already: turned away at once, instead of waiting.

A front end that is connected and has said what it wants keeps its place. One that has not said so
in :data:`HANDSHAKE_PATIENCE` seconds loses it to the next one. (Nobody else being there, it may
take its time: a socket may be connected long before its device is plugged.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

HANDSHAKE_PATIENCE = 10.0
"""The seconds after which a front end that has not finished its negotiation may be replaced."""
LOOK_INTERVAL = 50
"""The milliseconds between two looks at one that another one waits for."""
_GONE = select.POLLHUP | select.POLLRDHUP | select.POLLERR


@contextlib.contextmanager
def turning_away(
    listener: socket.socket, served: socket.socket, settled: Callable[[], bool]
) -> Iterator[None]:
    """Answers ``listener`` in a thread of its own while the front end on ``served`` is served.

    ``settled`` tells, to that thread, whether the negotiation is done. Whoever comes when the one
    that is served has left, or is made to leave, stays in the queue.
    """
    stop = os.eventfd(0, os.EFD_CLOEXEC)
    deadline = time.monotonic() + HANDSHAKE_PATIENCE
    thread = threading.Thread(
        target=_answer, args=(listener, served, settled, stop, deadline), name="door", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(stop, 1)
        thread.join()
        os.close(stop)


def _answer(
    listener: socket.socket,
    served: socket.socket,
    settled: Callable[[], bool],
    stop: int,
    deadline: float,
) -> None:
    while _first_ready(stop, listener.fileno()) != stop:
        if _has_left(served):
            return
        if settled():
            try:
                with listener.accept()[0] as another:
                    who = _process_of(another)
            except OSError as error:
                log.warning("another front end cannot be turned away: %s", error)
                return
            log.warning(
                "another front end, process %d, is turned away: that of process %d is served",
                who,
                _process_of(served),
            )
        elif time.monotonic() >= deadline:
            log.error("a front end that does not say what it wants makes room for another one")
            with contextlib.suppress(OSError):
                served.shutdown(socket.SHUT_RDWR)
            return
        elif _first_ready(stop, timeout=LOOK_INTERVAL) == stop:
            return


def _first_ready(*fds: int, timeout: int | None = None) -> int | None:
    """Returns the first of ``fds`` that is readable, waiting for it if need be."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(timeout)}
    return next((fd for fd in fds if fd in ready), None)


def _process_of(sock: socket.socket) -> int:
    """Returns the id of the process that connected ``sock``; 0 if that is not to be seen here."""
    pid: int
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid


def _has_left(served: socket.socket) -> bool:
    poll = select.poll()
    poll.register(served, _GONE)
    return bool(poll.poll(0))
