# SPDX-License-Identifier: GPL-2.0-or-later
"""The right of a channel's requests to act on disks, which ends with the channel.

A guest that closes its channel, or resets, and gets that acknowledged goes on as if nothing of
what it asked for before could still happen. So each act that changes a disk is a *step*: one
system call, or a few, of bounded length. A request asks its lease before each step. Invariants:

* after :meth:`Lease.end` returned no step begins;
* a step that was under way and did not end in time (its system call hangs: nobody can recall it)
  is counted as a straggler of its disk until it ends, and a disk with stragglers takes no command
  that needs the medium, so that nothing which is written later can be overwritten by it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

STEP_BYTES: Final = 16 << 20
"""How much of a disk one step changes at most."""
PATIENCE_SECONDS: Final = 0.1
"""The seconds that the end of channels waits for steps under way, of all channels together. Before
that packets had a second to be completed, in which no new step began."""
_TOGETHER_SECONDS: Final = 10.0
"""Channels that are closed within so many seconds share that patience."""


class Cancelled(Exception):
    """The channel that a request came on was closed: nothing more is done for it."""


def pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yields a stretch of a disk in parts for one step each, cut at multiples of their size."""
    end = offset + length
    while offset < end:
        size = min(STEP_BYTES - offset % STEP_BYTES, end - offset)
        yield offset, size
        offset += size


def _nobody() -> None:
    """Tells nobody."""


class Stragglers:
    """The steps on one disk that outlive the lease that they were begun under. Thread-safe."""

    def __init__(self) -> None:
        self.gone: Callable[[], None] = _nobody
        """Called when the last of them has ended."""
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def add(self) -> None:
        """Counts one more."""
        with self._lock:
            self._count += 1

    def remove(self) -> None:
        """Counts one less."""
        with self._lock:
            self._count -= 1
            last = not self._count
        if last:
            self.gone()


class Step:
    """A step under way: a context, which begins with the ``with`` or raises :exc:`Cancelled`."""

    __slots__ = ("_lease", "late", "stragglers")

    def __init__(self, lease: Lease, stragglers: Stragglers | None) -> None:
        self._lease = lease
        self.stragglers = stragglers
        self.late = False
        """Set when the lease has ended and waits for this step no longer."""

    def __enter__(self) -> None:
        self._lease.begin(self)

    def __exit__(self, *error: object) -> None:
        self._lease.ended(self)


class Lease:
    """The right of one channel's requests to act, from the channel's opening on. Thread-safe."""

    def __init__(self) -> None:
        self._steps: set[Step] = set()
        self._changed = threading.Condition(threading.Lock())
        self._over = False

    @property
    def over(self) -> bool:
        """Tells whether no step begins any more."""
        return self._over

    def check(self) -> None:
        """Raises :exc:`Cancelled` if the lease is over; for what only takes time."""
        if self._over:
            raise Cancelled

    def step(self, stragglers: Stragglers | None = None) -> Step:
        """Returns the context of a step on the disk whose ``stragglers`` these are."""
        return Step(self, stragglers)

    def begin(self, step: Step) -> None:
        """Begins a step. Raises :exc:`Cancelled`."""
        with self._changed:
            if self._over:
                raise Cancelled
            self._steps.add(step)

    def ended(self, step: Step) -> None:
        """Ends a step."""
        with self._changed:
            self._steps.discard(step)
            if self._over:
                self._changed.notify_all()
        if step.late and step.stragglers is not None:
            step.stragglers.remove()

    def stop(self) -> None:
        """Lets no step begin any more; waits for nothing."""
        with self._changed:
            self._over = True

    def end(self, deadline: float) -> int:
        """Lets no step begin any more, and waits for those under way until ``deadline``.

        Returns how many go on: each is a straggler of its disk from now until it ends.
        """
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._steps, max(0.0, deadline - time.monotonic()))
            for step in self._steps:
                step.late = True
                if step.stragglers is not None:
                    step.stragglers.add()
            return len(self._steps)


class Patience:
    """The time that the closing of channels may wait, whichever and however many they are."""

    def __init__(self) -> None:
        self._began = -_TOGETHER_SECONDS

    def deadline(self) -> float:
        """Returns until when a channel that is being closed now may wait for its steps."""
        now = time.monotonic()
        if now - self._began > _TOGETHER_SECONDS:
            self._began = now
        return self._began + PATIENCE_SECONDS
