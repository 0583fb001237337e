# SPDX-License-Identifier: GPL-2.0-or-later
"""The limits of the hardware and the kernel: the figures that ours are divided by."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable


def rate(step: Callable[[], None], seconds: float, batch: int = 1) -> float:
    """Returns how often ``step`` can be called in a second.

    The clock is read once for ``batch`` calls.
    """
    step()
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(batch):
            step()
        count += batch
    return count / elapsed


def eventfd_round_trips(seconds: float) -> float:
    """Returns the round trips a second of two processes that wake each other by eventfds."""
    there, back = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if child == 0:
        try:
            while os.eventfd_read(there) == 1:
                os.eventfd_write(back, 1)
        finally:
            os._exit(0)

    def round_trip() -> None:
        os.eventfd_write(there, 1)
        os.eventfd_read(back)

    try:
        return rate(round_trip, seconds, batch=16)
    finally:
        os.eventfd_write(there, 2)
        os.waitpid(child, 0)
        os.close(there)
        os.close(back)


def copies(size: int, seconds: float) -> float:
    """Returns how often ``size`` bytes can be copied in a second, within the cache if they fit."""
    with mmap.mmap(-1, size) as source, mmap.mmap(-1, size) as target:
        source.write(b"\x5a" * size)
        from_view, to_view = memoryview(source), memoryview(target)

        def copy() -> None:
            to_view[:] = from_view

        try:
            return rate(copy, seconds, batch=16)
        finally:
            from_view.release()
            to_view.release()
