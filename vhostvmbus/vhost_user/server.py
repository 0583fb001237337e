# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves one device to front ends, one after the other, on a UNIX socket.

One that comes while another one is served is turned away at once.

Either side may listen ("vhost-user-vmbus", introduction). A connection that breaks the protocol is
logged and closed, and the next one is served. Nothing is left behind: no descriptor of an old
connection, no socket file after :meth:`Server.run`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.connection import Connection
from vhostvmbus.vhost_user.doorkeeper import turning_away
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.session import State
from vhostvmbus.vhost_user.sockets import bind_listener
from vhostvmbus.wire.errors import FrontEndError

log = logging.getLogger(__name__)

RETRY_INTERVAL = 0.2
"""Seconds between two attempts to reach a front end that does not listen (yet), or to let one in
that could not be."""
STOP_POLL = 0.2
"""Seconds between two looks at the caller's stop event."""


class Server:
    """A server of ``back_end``: :meth:`run` blocks, :meth:`stop` may be called from any thread.

    If ``listen`` is false it connects to ``path`` instead, again and again as connections end.
    ``listener`` gives the socket to listen at, if that is not simply one at ``path``.
    ``limits`` and ``answer_timeout`` (seconds that a front end has to answer a back-end request)
    are for tests mostly.
    """

    def __init__(
        self,
        back_end: BackEnd,
        path: str | os.PathLike[str],
        *,
        listen: bool = True,
        listener: contextlib.AbstractContextManager[socket.socket] | None = None,
        limits: ConnectionLimits | None = None,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self._back_end = back_end
        self._path = Path(path)
        self._listen = listen
        self._listener = listener or bind_listener(self._path)
        self._limits = limits
        self._answer_timeout = answer_timeout
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self.connections = 0
        """How many connections were served so far; :attr:`protocol_errors` of them broke the
        protocol.
        """
        self.protocol_errors = 0
        self.failures = 0
        """How many connections ended by an exception that nobody expected."""
        self.last_error: FrontEndError | None = None
        """The error that ended the last connection, if one did."""

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serves until :meth:`stop`. ``ready`` is called once front ends can connect.

        Raises :class:`~.errors.SocketInUse`, :class:`~.errors.NotASocket` or ``OSError`` if the
        path cannot be listened at.
        """
        try:
            if self._listen:
                self._run_listening(ready)
            else:
                self._run_connecting(ready)
        finally:
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def stop(self) -> None:
        """Makes :meth:`run` return; a connection is closed between two requests."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _stopped(self, timeout: float = 0) -> bool:
        return bool(select.select([self._wake], [], [], timeout)[0])

    def _run_listening(self, ready: Callable[[], None] | None) -> None:
        with self._listener as listener:
            if ready is not None:
                ready()
            while True:
                readable, _, _ = select.select([listener.fileno(), self._wake], [], [])
                if self._wake in readable:
                    return
                try:
                    sock, _ = listener.accept()
                except OSError as error:
                    # Descriptors have run out, say. It waits in the queue until there are some.
                    log.error("a front end cannot be let in: %s", error)
                    if self._stopped(RETRY_INTERVAL):
                        return
                    continue
                self._serve(sock, listener)

    def _run_connecting(self, ready: Callable[[], None] | None) -> None:
        if ready is not None:
            ready()
        while not self._stopped():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                self._stopped(RETRY_INTERVAL)
                continue
            except BaseException:
                sock.close()
                raise
            self._serve(sock)

    def _serve(self, sock: socket.socket, listener: socket.socket | None = None) -> None:
        self.connections += 1
        self.last_error = None
        log.info("a front end connected")
        with sock:
            try:
                connection = Connection(
                    self._back_end,
                    sock,
                    self._wake,
                    limits=self._limits,
                    answer_timeout=self._answer_timeout,
                )
                session = connection.session
                with contextlib.ExitStack() as stack:
                    if listener is not None:
                        stack.enter_context(
                            turning_away(listener, sock, lambda: session.state is State.READY)
                        )
                    connection.run()
            except FrontEndError as error:
                self.protocol_errors += 1
                self.last_error = error
                log.error("session closed: %s: %s", type(error).__name__, error)
            except Exception:
                # Of the device's code, or a mistake here: the next front end is served all
                # the same.
                self.failures += 1
                log.exception("session closed: it failed")
            else:
                log.info("the front end left")


def serve(
    back_end: BackEnd,
    path: str | os.PathLike[str],
    listen: bool = True,
    ready_callback: Callable[[], None] | None = None,
    stop_event: threading.Event | None = None,
) -> None:
    """Serves ``back_end`` at ``path`` until ``stop_event`` is set.

    ``KeyboardInterrupt`` ends it cleanly as well, and is passed on. Raises the exceptions of
    :meth:`Server.run`.
    """
    server = Server(back_end, path, listen=listen)
    if stop_event is None:
        server.run(ready_callback)
        return
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if stop_event.wait(STOP_POLL):
                server.stop()
                return

    watcher = threading.Thread(target=watch, name="stop-watcher", daemon=True)
    watcher.start()
    try:
        server.run(ready_callback)
    finally:
        done.set()
        watcher.join()
