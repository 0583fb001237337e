# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for, and ringing, the eventfds of a channel; both without the GIL."""

import os
from collections.abc import Sequence

from vhostvmbus.engine import ffi, lib


def wait(fds: Sequence[int], timeout: float | None = None) -> int:
    """Waits until one of at most 8 eventfds fires, and empties those that did.

    ``timeout`` is in seconds, ``None`` for ever. Returns a bit mask, bit ``n`` for ``fds[n]``; 0 if
    nothing fired. The eventfds must not block. Raises :exc:`OSError`.
    """
    result = lib.vvb_wait(
        ffi.new("int[]", list(fds)), len(fds), -1 if timeout is None else int(timeout * 1000)
    )
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(result)


def signal(fd: int) -> None:
    """Adds 1 to an eventfd. Raises :exc:`OSError`."""
    result = lib.vvb_signal(fd)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
