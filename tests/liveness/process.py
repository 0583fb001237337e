# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end's process, seen from the harness: made, told, watched, ended.

What it has open, mapped and running is read in ``/proc``, where it cannot be told otherwise.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.liveness.backend import TICK
from tests.support.footprint import Footprint
from tests.support.paths import TREE

HARD_LIMIT = 40.0
"""Seconds after which an answer will not come any more, however busy the machine is."""


class Nursery:
    """A process that has imported everything and makes back ends by fork."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.liveness.backend", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=TREE,
                env={**os.environ, "PYTHONPATH": str(TREE)},
            )

    def order(self, order: Mapping[str, object], fds: list[int] | None = None) -> int:
        """Returns the answer to an order: a process id, or the code with which one ended."""
        with self._lock:
            socket.send_fds(self._orders, [json.dumps(order).encode()], fds or [])
            answer = self._orders.recv(100)
        if not answer:
            raise RuntimeError("the process that makes back ends has ended")
        return int(json.loads(answer))

    def close(self) -> None:
        """Ends it; its back ends end by themselves when their harness leaves them."""
        self._orders.close()
        self._process.wait()


class BackEndProcess:
    """One back end, from its start to its end. ``folder`` is its own."""

    def __init__(self, nursery: Nursery, folder: Path, config: Mapping[str, Any]) -> None:
        self.path = folder / "device.sock"
        self.image = folder / "image.raw"
        self.log = folder / "log.txt"
        self._nursery = nursery
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        clock = os.memfd_create("clock", os.MFD_CLOEXEC)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if not self.image.exists():
            self.image.write_bytes(random.Random(20).randbytes(1 << 20))
        try:
            os.ftruncate(clock, mmap.PAGESIZE)
            self._ticks = memoryview(mmap.mmap(clock, mmap.PAGESIZE)).cast("Q")
            order = {**config, "socket": str(self.path), "image": str(self.image)}
            self.pid = nursery.order(order, [theirs.fileno(), clock, log])
        finally:
            theirs.close()
            os.close(clock)
            os.close(log)
        self._pidfd = os.pidfd_open(self.pid)
        self._lines = self._control.makefile("rw")
        self._code: int | None = None
        self._control.settimeout(HARD_LIMIT)
        if json.loads(self._lines.readline() or "null") != "ready":
            self.kill()
            raise RuntimeError(f"the back end did not start:\n{self.log.read_text()}")

    # ---- its clock ----

    def seconds(self) -> float:
        """Returns the time of the back end's own clock."""
        return self._ticks[0] * TICK

    # ---- what it is told ----

    def tell(self, *words: object) -> Any:
        """Returns the answer to an order of the control socket; ``None`` if nobody is there."""
        try:
            self._lines.write(json.dumps(words) + "\n")
            self._lines.flush()
            return json.loads(self._lines.readline() or "null")
        except (OSError, ValueError):
            return None

    # ---- what it has ----

    def footprint(self) -> Footprint:
        """Counts what the process has at this moment."""
        return Footprint.of(self.pid)

    def uses_file(self, fd: int, *, shared: bool = False) -> list[str]:
        """Returns where the process has the file behind ``fd`` (of ours): mapped, or open.

        With ``shared`` what cannot be written through is left out: private mappings, descriptors.
        """
        wanted = os.fstat(fd)
        proc = Path(f"/proc/{self.pid}")
        found = []
        for line in (proc / "maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            ours = int(fields[4]) == wanted.st_ino and "memfd" in line
            if ours and (not shared or fields[1].endswith("s")):
                found.append(f"mapped at {fields[0]}")
        if shared:
            return found
        for entry in os.listdir(proc / "fd"):
            try:
                there = os.stat(proc / "fd" / entry)
            except OSError:
                continue
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(f"open as {entry}")
        return found

    def dump(self) -> None:
        """Has the process write the stacks of its threads to its log."""
        if self._code is None:
            os.kill(self.pid, signal.SIGUSR1)
            select.select([], [], [], 0.3)

    # ---- its end ----

    @property
    def alive(self) -> bool:
        """Tells whether it runs."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def stop(self) -> None:
        """Asks it to end, as an operator does."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Returns the code with which it ended; ``None`` if it runs on after ``seconds``."""
        if self._code is None and select.select([self._pidfd], [], [], seconds)[0]:
            self._code = self._nursery.order({"reap": self.pid})
        return self._code

    def kill(self) -> None:
        """Ends it at once, and forgets it."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(HARD_LIMIT)

    def close(self) -> None:
        """Ends it, if it runs, and gives up what is kept for it."""
        self.kill()
        self._control.close()
        self._lines.close()
        self._ticks.release()
        os.close(self._pidfd)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns a new folder, as a context manager."""
    return tempfile.TemporaryDirectory(prefix="vhostvmbus-liveness-")
