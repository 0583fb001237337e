# SPDX-License-Identifier: GPL-2.0-or-later
"""A socket that is handed over by whoever starts us: ``systemd.socket(5)``, ``sd_listen_fds(3)``.

The one who hands it over makes the socket's file, chooses its permissions, and removes it.
"""

import os
import socket
from collections.abc import MutableMapping

FIRST = 3
"""The number of the first descriptor that is handed over."""
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class ActivationError(Exception):
    """An error: what was handed over cannot be used. The message is for the user."""


def handed_over(environment: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """Returns the listening socket that this process was started with, or ``None``.

    The variables are removed: what this process starts has no such socket. Raises
    :exc:`ActivationError` for more than one descriptor, or another kind of it.
    """
    process, count, _ = (environment.pop(name, "") for name in VARIABLES)
    if process != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise ActivationError(f"one socket can be handed over (LISTEN_FDS), not {count}")
    try:
        handed = socket.socket(fileno=FIRST)
    except OSError as error:
        raise ActivationError(f"descriptor {FIRST} is no socket: {error.strerror}") from error
    if problem := _problem(handed):
        handed.close()
        raise ActivationError(f"descriptor {FIRST} {problem}")
    handed.set_inheritable(False)
    handed.setblocking(True)
    return handed


def _problem(handed: socket.socket) -> str | None:
    if handed.family != socket.AF_UNIX or handed.type != socket.SOCK_STREAM:
        return "is no UNIX stream socket"
    if not handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is no socket that listens (Accept=no)"
    if not isinstance(handed.getsockname(), str) or not handed.getsockname():
        return "is a socket without a path"
    return None
