# SPDX-License-Identifier: GPL-2.0-or-later
"""The threads that do what may sleep in the host.

All of them are there from the start: a process that is out of threads later on, because of a limit
or of its neighbours, still does what it is asked. They do not hold the process up at its end: one
that hangs in a system call is left where it is.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_log = logging.getLogger(__name__)


class IoPool:
    """A number of threads that call what they are given, in order, as soon as one is free."""

    def __init__(self, threads: int, name: str) -> None:
        """Starts the threads. Raises ``ValueError``, and ``OSError`` if they cannot be made."""
        if threads < 1:
            raise ValueError(f"threads is at least 1, not {threads}")
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close(1.0)
            made = len(self._threads)
            raise OSError(errno.EAGAIN, f"{made} of {threads} threads could be made") from error

    def submit(self, function: Callable[[], None]) -> None:
        """Has ``function`` called on one of the threads; after :meth:`close`, never."""
        self._work.put(function)

    def _run(self) -> None:
        while (function := self._work.get()) is not None:
            try:
                function()
            except Exception:
                _log.exception("a defect")
            del function  # nothing is kept while there is nothing to do

    def close(self, timeout: float) -> bool:
        """Ends the threads when all that was submitted is done.

        Returns whether that came to be within ``timeout`` seconds; if not, they end later.
        """
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
