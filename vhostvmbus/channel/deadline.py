# SPDX-License-Identifier: GPL-2.0-or-later
"""Deadlines, and the threads of a device's code that do not return in time.

A front end waits ten seconds for an answer, whatever it asked for, so all that is waited for behind
one request has one deadline in common. A device's code gets a share of it, on a thread of its own.
What does not return is left behind: its thread is named in the log, and there may be only so many.
"""

import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from vhostvmbus.wire.errors import DeviceTimeout, ThreadLimit

log = logging.getLogger("vhostvmbus.channel.channel")  # one name for all that a channel logs

T = TypeVar("T")

MAX_LEFT_BEHIND: Final = 64
"""Threads of one device that may be left behind; then no channel of it is opened any more."""
SLICE_SECONDS: Final = 0.05
"""Seconds between two looks at whether somebody is blocked in signalling the guest."""
SHARE_SECONDS: Final = 0.25
"""The seconds of a share at least, as long as so much is left."""
LEAST_SECONDS: Final = 0.02
"""The seconds that a callback gets at least, even if the deadline has passed."""


class Deadline:
    """A moment, so many seconds from now, at which whoever waits gives up."""

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left; never below 0."""
        return max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> "Deadline":
        """Returns the deadline in ``seconds``, or this one if it comes first."""
        return Deadline(min(seconds, self.left))

    def share(self, count: int) -> "Deadline":
        """Returns the deadline of the first of ``count`` that share what is left.

        A share is never so small that one who is only slow, on a busy machine, has too little.
        """
        left = self.left
        return Deadline(max(left / max(1, count), min(SHARE_SECONDS, left)))


class Outcome(NamedTuple, Generic[T]):
    """The end of a call: what was returned, or what was raised."""

    results: list[T]
    error: BaseException | None

    def get(self) -> T:
        """Returns what was returned, or raises what was raised."""
        if self.error is not None:
            raise self.error
        return self.results[0]


class Signalling(Protocol):
    """A channel on which a thread may block in signalling the guest."""

    def unblock(self) -> None:
        """Frees the threads that are blocked."""


class LeftBehind:
    """The threads of one device that did not return in time. Every method is for any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._signalling: weakref.WeakSet[Signalling] = weakref.WeakSet()
        self.late = 0
        """Counts what came after all: returns, exceptions and completions, which were dropped."""

    @property
    def count(self) -> int:
        """Counts the threads that were left behind and have not returned."""
        with self._lock:
            self._threads = {thread for thread in self._threads if thread.is_alive()}
            return len(self._threads)

    def check(self) -> None:
        """Raises :exc:`ThreadLimit` if too many threads have been left behind."""
        if self.count >= MAX_LEFT_BEHIND:
            raise ThreadLimit(f"{self.count} threads of {self._name}'s code do not return")

    def add(self, thread: threading.Thread) -> None:
        """Leaves a thread behind, which calls :meth:`returned` if it ever does."""
        with self._lock:
            if not thread.is_alive():
                return
            self._threads.add(thread)
        frame = sys._current_frames().get(thread.ident or 0)
        where = traceback.extract_stack(frame, 1)[-1] if frame is not None else None
        log.error(
            "%s: thread %r does not return from %s and is left behind (%d of at most %d are)",
            self._name,
            thread.name,
            f"{where.name}() at {where.filename}:{where.lineno}" if where else "where it is",
            self.count,
            MAX_LEFT_BEHIND,
        )

    def watch(self, channel: Signalling) -> None:
        """Has :meth:`unblock` free the threads that are blocked there, while the channel exists."""
        with self._lock:
            self._signalling.add(channel)

    def unblock(self) -> None:
        """Frees the threads that are blocked in signalling the guest, on any channel.

        Such a thread may hold a lock of the device that another channel's end waits for.
        """
        with self._lock:
            channels = list(self._signalling)
        for channel in channels:
            channel.unblock()

    def returned(self, error: BaseException | None = None) -> None:
        """Notes that the caller's thread has returned, with ``error`` or without."""
        thread = threading.current_thread()
        with self._lock:
            if thread not in self._threads:
                return
            self._threads.discard(thread)
            self.late += 1
        log.warning(
            "%s: thread %r has returned too late; what it did is dropped",
            self._name,
            thread.name,
            exc_info=error,
        )

    def count_late(self) -> None:
        """Counts a completion that came after its packet had been taken away."""
        with self._lock:
            self.late += 1

    def call(
        self,
        name: str,
        function: Callable[[], T],
        deadline: Deadline,
    ) -> Outcome[T]:
        """Calls ``function`` on a thread ``name`` of its own.

        It may wait for somebody who is blocked in signalling the guest: whoever is, is freed
        meanwhile. Raises :exc:`DeviceTimeout` if it does not return before the deadline, and at
        once if too many threads have been left behind already.
        """
        if self.count >= MAX_LEFT_BEHIND:
            raise DeviceTimeout(f"{name} is not called: {self.count} threads do not return")
        outcomes: list[Outcome[T]] = []

        def run() -> None:
            try:
                outcomes.append(Outcome([function()], None))
            except BaseException as error:
                outcomes.append(Outcome([], error))
            self.returned(outcomes[0].error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the host has no thread left: better here than not at all
            run()
            return outcomes[0]
        thread.join(max(LEAST_SECONDS, min(SLICE_SECONDS, deadline.left)))
        while not outcomes:
            self.unblock()
            thread.join(max(LEAST_SECONDS, min(SLICE_SECONDS, deadline.left)))
            if not deadline.left:
                break
        if outcomes:
            return outcomes[0]
        self.add(thread)
        raise DeviceTimeout(f"{name} does not return")
