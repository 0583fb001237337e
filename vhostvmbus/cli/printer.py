# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines on stderr, from a thread of their own: whoever has one to show does not wait for the user's
terminal, which may be stopped, or for a pipe that nobody reads.
"""

import contextlib
import os
import queue
import threading

WAITING = 1000
"""Lines that may wait to be taken; those beyond are left out, and counted."""
PATIENCE = 2.0
"""Seconds that the last lines have at the end."""


class Printer:
    """Prints lines behind the name of who wrote them."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        # A terminal in raw mode, as for the guest's shell, does not begin a line by itself.
        self._end = "\r\n" if os.isatty(fd) else "\n"
        self._queue: queue.Queue[str | None] = queue.Queue(WAITING)
        self._left_out = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._print, name="printer", daemon=True)
        self._thread.start()

    def show(self, title: str, line: str) -> None:
        """Has a line printed soon. Returns at once, in any case."""
        try:
            self._queue.put_nowait(f"{title}: {line}")
        except queue.Full:
            with self._lock:
                self._left_out += 1

    def close(self) -> None:
        """Waits until all is printed, or until nobody has taken the lines for a while."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=PATIENCE)
            self._thread.join(PATIENCE)

    def _print(self) -> None:
        while (line := self._queue.get()) is not None:
            self._write(line)
            with self._lock:
                count, self._left_out = self._left_out, 0
            if count:
                self._write(f"({count} lines are not shown: they were not taken fast enough)")

    def _write(self, line: str) -> None:
        data = (line + self._end).encode()
        with contextlib.suppress(OSError):  # nobody looks any more; the files have it all
            while data:
                data = data[os.write(self._fd, data) :]
