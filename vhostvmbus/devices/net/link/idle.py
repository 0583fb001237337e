# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors behind which nothing is, and one number for a descriptor that comes and goes.

Threads of the card read and write a link's descriptors while the link replaces them. A number
that was closed could be somebody else's file a moment later, so a number is never closed while the
link lives: :meth:`Slot.put` makes the same number mean another file, in one step (dup2(2)).
"""

import os


class Slot:
    """A descriptor number that is constant until :meth:`close`.

    While empty it is the reading end of a pipe into which nobody writes: never readable, reading
    gives ``BlockingIOError`` and writing ``OSError(EBADF)``.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.number = os.dup(self._reader)

    def put(self, fd: int) -> None:
        """Let the number mean what *fd* means, and close *fd*."""
        os.dup2(fd, self.number, inheritable=False)
        os.close(fd)

    def empty(self) -> None:
        """Let the number mean nothing."""
        os.dup2(self._reader, self.number, inheritable=False)

    def close(self) -> None:
        """Give the number up; again does nothing."""
        if self.number >= 0:
            for fd in (self.number, self._reader, self._writer):
                os.close(fd)
            self.number = -1
