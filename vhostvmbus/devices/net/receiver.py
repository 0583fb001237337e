# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from the link to the guest: one thread for each queue of the link.

A thread stays in the data path (``native/tell.c``), which waits for frames, takes them and tells
the guest, in order. It comes back with frames of which Python has to tell the guest, or because it
was woken.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.outbox import Outbox

log = logging.getLogger(__name__)

PAUSE = 0.01
"""The seconds between two attempts when something went wrong that should not."""


class Receiver:
    """Serves one queue of a link."""

    def __init__(
        self, path: DataPath, outbox: Outbox, woken: Callable[[], None], queue: int, name: str
    ) -> None:
        """Makes the thread. It calls ``woken`` whenever it was woken."""
        self._path = path
        self._outbox = outbox
        self._woken = woken
        self._queue = queue
        self._name = name
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins; until there is a buffer, frames are dropped."""
        try:
            self._thread.start()
        except BaseException:
            os.close(self._wake_fd)
            raise

    def wake(self) -> None:
        """Has the thread look at the link's descriptor again."""
        os.eventfd_write(self._wake_fd, 1)

    def wake_when_free(self, wanted: bool = True) -> None:
        """Has the thread woken once when the guest next gives sections back, or nobody."""
        self._path.wake_when_free(self._wake_fd if wanted else -1)

    def stop(self) -> None:
        """Ends the thread; once."""
        self._stopping = True
        self.wake()
        self._thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._serve()
            except Exception:
                log.exception("%s: a frame could not be handed over", self._name)
                time.sleep(PAUSE)

    def _serve(self) -> None:
        served = self._path.serve(self._queue, self._wake_fd)
        if served.left and not self._outbox.deliver(served.left, served.lease):
            for part in served.left:
                self._path.give(served.lease, part.section)
        if served.woken:
            os.eventfd_read(self._wake_fd)
            self._woken()


class Receivers:
    """The receivers of one card. Any thread may use it.

    Invariant: the data path has no eventfd of theirs when that is closed.
    """

    def __init__(self, woken: Callable[[], None], name: str) -> None:
        """Makes none yet. Each will call ``woken`` whenever it was woken."""
        self._woken = woken
        self._name = name
        self._lock = threading.Lock()
        self._all: list[Receiver] = []

    def use(self, path: DataPath, outbox: Outbox, count: int) -> None:
        """Receives from the first ``count`` queues, and from those that it has received from."""
        for queue in range(len(self._all), count):
            name = f"{self._name} receive {queue}"
            receiver = Receiver(path, outbox, self._woken, queue, name)
            receiver.start()
            with self._lock:
                self._all.append(receiver)

    def wake(self) -> None:
        """Has each look at the link's descriptor again."""
        with self._lock:
            for receiver in self._all:
                receiver.wake()

    def wake_when_free(self) -> None:
        """Has ``woken`` called once when the guest next gives sections back."""
        with self._lock:
            for receiver in self._all[:1]:
                receiver.wake_when_free()

    def stop(self) -> None:
        """Ends all of them; nobody may hold a lock that ``woken`` takes."""
        with self._lock:
            receivers, self._all = self._all, []
            for receiver in receivers[:1]:
                receiver.wake_when_free(False)  # whoever wishes it from now on finds nobody
        for receiver in receivers:
            receiver.stop()
