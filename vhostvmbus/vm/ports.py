# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's four serial ports as seen from the host, without any thread or process.

Bytes in, state out: :class:`Console` keeps the log and the last lines and knows a panic when it
sees one; :class:`Control` speaks the line protocol of the guest's agent, which is written down in
``guest-images/initramfs/agent``.
"""

import contextlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

KEPT_LINES = 40
REPORT_LINES = 80
"""The most lines of a kernel's report that are kept."""
_KERNEL = r"^\[ *\d+\.\d+\](?:\[[^\]]*\])? "
"""The beginning of a line of the kernel's: the time, and who said it if that is shown."""
PANIC = re.compile(rf"{_KERNEL}(Kernel panic - not syncing.*)|^(vhostvmbus: fatal: .*)")
TROUBLE = re.compile(
    _KERNEL + r"(BUG: unable to handle .*|BUG: kernel NULL pointer .*|kernel BUG at .*"
    r"|.*: [0-9a-f]{4} \[#\d+\].*|watchdog: BUG: soft lockup .*)"
)
"""Lines after which a kernel does not come up, as a rule: an oops, a processor that hangs."""
BEGINNING = re.compile(_KERNEL + "Linux version ")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Console:
    """The output of the serial console. ``sinks`` get every byte as it comes."""

    sinks: list[Callable[[bytes], None]] = field(default_factory=list)
    panic: str | None = None
    booting: bool = True
    """Set while a boot is under way: from a kernel's first line until the guest is ready."""
    trouble: str | None = None
    """The first thing that went wrong in the kernel in the boot that is under way or was last."""
    report: list[str] = field(default_factory=list)
    """The lines from :attr:`trouble` on."""
    _partial: bytes = b""
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))

    def feed(self, data: bytes) -> None:
        """Takes bytes from the port."""
        for sink in self.sinks:
            with contextlib.suppress(OSError):  # what comes is looked at all the same
                sink(data)
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()[-4096:]
        for raw in lines:
            line = ESCAPES.sub("", raw.decode(errors="replace")).rstrip("\r")
            self._lines.append(line)
            self._look(line)

    def _look(self, line: str) -> None:
        if (found := PANIC.match(line)) and self.panic is None:
            self.panic = found[1] or found[2]
        if BEGINNING.match(line):
            self.booting, self.trouble, self.report = True, None, []
        elif self.booting and self.trouble is None and (found := TROUBLE.match(line)):
            self.trouble = found[1]
        if self.trouble is not None and len(self.report) < REPORT_LINES:
            self.report.append(line)

    @property
    def pending(self) -> bytes:
        """The bytes after the last whole line: a prompt, as a rule."""
        return self._partial

    def last_lines(self, count: int = 25) -> list[str]:
        """Returns the last whole and partial lines, at most ``count``."""
        lines = [line for line in self._lines if line.strip()]
        rest = ESCAPES.sub("", self._partial.decode(errors="replace")).strip()
        return (lines + ([rest] if rest else []))[-count:]


@dataclass
class Control:
    """The agent's side of the conversation, as far as it has come."""

    ready: int = 0
    """The number of times that an agent has said that it is ready: once for each boot."""
    exits: dict[int, int] = field(default_factory=dict)
    """Exit status of each request that is done."""
    _partial: bytes = b""

    def feed(self, data: bytes) -> None:
        """Takes bytes from the port; what is not a reply is ignored."""
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()[-4096:]
        for line in lines:
            words = line.split()
            if words == [b"ready"]:
                self.ready += 1
            elif len(words) == 3 and words[0] == b"exit" and b"".join(words[1:]).isdigit():
                self.exits[int(words[1])] = int(words[2])

    @staticmethod
    def run_request(number: int, script: bytes) -> bytes:
        """Returns the bytes that ask for ``script`` to be run as request ``number``."""
        return b"run %d %d\n" % (number, len(script)) + script
