# SPDX-License-Identifier: GPL-2.0-or-later
"""A device behind a real socket, in this process: what a software guest connects to."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT as INVALIDATE_TIMEOUT
from vhostvmbus.vhost_user.server import Server


def connect_socket(path: str | os.PathLike[str]) -> socket.socket:
    """Returns a UNIX stream socket connected to ``path``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def serving(
    device: Device | DeviceHost, *, invalidate_timeout: float = INVALIDATE_TIMEOUT
) -> Iterator[tuple[Server, Path, DeviceHost]]:
    """Serves ``device`` in a thread, at a socket of its own, for as long as the block runs.

    An error of the server's thread is raised here in the end.
    """
    host = device if isinstance(device, DeviceHost) else DeviceHost(device)
    failures: list[BaseException] = []
    ready = threading.Event()
    with tempfile.TemporaryDirectory(prefix="vhostvmbus-") as folder:
        path = Path(folder, "device.sock")
        server = Server(host, path, answer_timeout=invalidate_timeout)

        def run() -> None:
            try:
                server.run(ready.set)
            except BaseException as error:
                failures.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="vhost-user-server", daemon=True)
        thread.start()
        ready.wait()
        try:
            if not failures:
                yield server, path, host
        finally:
            server.stop()
            thread.join()
            if host is not device:
                host.close()
    if failures:
        raise failures[0]
