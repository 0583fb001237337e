# SPDX-License-Identifier: GPL-2.0-or-later
"""The output of a device of the user's own: shown line by line as it comes, and kept in a file.

A device works for a guest, so a guest may make it write as much as it likes. Invariants:

* The device does not wait for whoever looks: its pipe is read at once, and showing a line must not
  block (see ``cli.printer``).
* Of a stream without end, memory holds a block, the end of the stream and the line under way; the
  file holds the stream's beginning and, once all is over, its end.
* What is left out is said, with how much it was.
"""

import contextlib
import math
import os
import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 16
BLOCKS_AT_ONCE = 64
"""How many blocks are read before somebody else has a turn."""
KEPT_BEGINNING = 4 << 20
KEPT_END = 256 << 10
LAST_WORDS = 8 << 10
BURST = 200
PERIOD = 10.0
LONGEST_LINE = 1000


def titles(devices: Sequence[str]) -> list[str]:
    """Returns a name for each ``path.py:Class``, fit for a file's name: no two are alike."""
    names = [re.sub(r"\W", "_", device.rpartition(":")[2]) for device in devices]
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [
        name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)
    ]


def printable(line: bytes) -> str:
    """Returns a line as text that does nothing to a terminal but appear on it."""
    text = line.decode(errors="backslashreplace")
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
        for char in text
    )


class Lines:
    """Cuts a stream of bytes into lines to show, ``burst`` of them in ``period`` seconds.

    It has no clock: the caller says what time it is.
    """

    def __init__(
        self, burst: int = BURST, period: float = PERIOD, longest: int = LONGEST_LINE
    ) -> None:
        self._burst = burst
        self._period = period
        self._longest = longest
        self._line = bytearray()
        self._cut = 0
        self._start = -math.inf
        self._shown = 0
        self._left_out = 0

    @property
    def due(self) -> float | None:
        """The time at which :meth:`look` will have something to say of itself, if there is one."""
        return self._start + self._period if self._left_out else None

    def feed(self, data: bytes, now: float) -> list[str]:
        """Takes the next bytes; returns the lines to show."""
        shown = self.look(now)
        at = 0
        while self._shown < self._burst and (end := data.find(b"\n", at)) >= 0:
            self._extend(data[at:end])
            shown.append(self._end_line())
            at = end + 1
        if skipped := data.count(b"\n", at):  # as fast as they may come
            self._left_out += skipped
            self._begin_line()
            at = data.rindex(b"\n") + 1
        self._extend(data[at:])
        return shown

    def look(self, now: float) -> list[str]:
        """Returns what is to be said once a period is over: how much of it was left out."""
        if now - self._start < self._period:
            return []
        self._start = now
        return self._begin_period()

    def finish(self) -> list[str]:
        """Returns the last line, if it has no end, and what was left out."""
        shown = []
        if self._line:
            if self._shown < self._burst:
                shown.append(self._end_line())
            else:
                self._left_out += 1
        return shown + self._begin_period()

    def _begin_period(self) -> list[str]:
        count, self._left_out, self._shown = self._left_out, 0, 0
        if not count:
            return []
        return [f"({count} more lines within {self._period:g} s are not shown)"]

    def _begin_line(self) -> None:
        self._line.clear()
        self._cut = 0

    def _extend(self, part: bytes) -> None:
        room = self._longest - len(self._line)
        self._line += part[:room]
        self._cut += max(0, len(part) - room)

    def _end_line(self) -> str:
        more = f" ({self._cut} more bytes of this line are not shown)" if self._cut else ""
        text = printable(bytes(self._line.rstrip(b"\r")))
        self._shown += 1
        self._begin_line()
        return text + more


class KeptFile:
    """The beginning and the end of a stream, in a file that is there once there is something."""

    def __init__(self, path: Path | None) -> None:
        self.problem: OSError | None = None
        """The error that kept the stream from being kept."""
        self._path = path
        self._file: BinaryIO | None = None
        self._room = KEPT_BEGINNING if path else 0
        self._end = bytearray()
        self._left_out = 0

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""
        beginning, rest = data[: self._room], data[self._room :]
        if beginning:
            self._room -= len(beginning)
            self._store(beginning)
        self._end += rest
        if len(self._end) > 2 * KEPT_END:
            self._shorten()

    def close(self) -> None:
        """Adds the end, behind a line that says what is missing before it."""
        self._shorten()
        if self._left_out:
            self._store(f"\n({self._left_out} bytes are left out here)\n".encode())
        self._store(bytes(self._end))
        if self._file is not None:
            self._file.close()

    def _shorten(self) -> None:
        excess = len(self._end) - KEPT_END
        if excess > 0:
            del self._end[:excess]
            self._left_out += excess

    def _store(self, data: bytes) -> None:
        if self._path is None or self.problem is not None or not data:
            return
        try:
            if self._file is None:
                self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115 - close()
            self._file.write(data)
        except OSError as error:
            self.problem = error


class DeviceOutput:
    """A pipe for all that one device writes, and the thread that reads it.

    ``show`` gets each line that is to be seen, from any thread; it must not block. With a ``path``
    the stream is kept there.
    """

    def __init__(
        self,
        title: str,
        path: Path | None,
        show: Callable[[str, str], None],
        lines: Lines | None = None,
    ) -> None:
        self.title = title
        self.path = path
        self._show = show
        self._lines = lines or Lines()
        self._kept = KeptFile(path)
        self._recent = b""
        self._wrote = False
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name=f"output of {title}", daemon=True)
        self._thread.start()

    @property
    def fate(self) -> str:
        """The place of the device's output, in words; nothing if it wrote nothing."""
        if self.path is None or not self._wrote:
            return ""
        if self._kept.problem is not None:
            return f"what {self.title} wrote could not be kept: {self._kept.problem}"
        return f"what {self.title} wrote is in {self.path}"

    def fileno(self) -> int:
        """Returns the end of the pipe that the device gets."""
        return self._writer

    def last_words(self) -> str:
        """Returns the end of what the device wrote, all of it if it has ended."""
        self._read()
        return self._recent.decode(errors="replace")

    def close(self) -> None:
        """Reads what is left, and ends; whoever still writes then gets an error."""
        if self._writer < 0:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for line in self._lines.finish():
            self._show(self.title, line)
        self._kept.close()
        for fd in (self._reader, self._writer, self._wake):
            os.close(fd)
        self._writer = -1

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            due = self._lines.due
            patience = None if due is None else max(0.0, due - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(patience)]
            self._read()
            if self._wake in ready:
                return

    def _read(self) -> None:
        """Takes what is in the pipe, though not for ever while somebody writes."""
        with self._lock, contextlib.suppress(BlockingIOError):
            self._say(self._lines.look(time.monotonic()))
            for _ in range(BLOCKS_AT_ONCE if self._writer >= 0 else 0):
                data = os.read(self._reader, BLOCK)
                self._wrote = True
                self._recent = (self._recent + data)[-LAST_WORDS:]
                self._kept.write(data)
                self._say(self._lines.feed(data, time.monotonic()))

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._show(self.title, line)
