# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits for what other threads do, and checks that nothing is left of it."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until ``condition`` holds; fails the test if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def open_fds() -> dict[str, str]:
    """Returns what this process's descriptors are open to, by their number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                found[name] = target
    return found


@contextlib.contextmanager
def nothing_left_behind(seconds: float = 5.0) -> Iterator[None]:
    """Fails if what is done inside leaves a descriptor or a thread ``seconds`` later."""
    gc.collect()
    fds, threads = open_fds(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + seconds
    while open_fds() != fds or set(threading.enumerate()) - threads:
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.01)
    assert open_fds() == fds
    assert not set(threading.enumerate()) - threads


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Starts ``function`` on a thread; what it returns or raises will be in the list."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


class StoppedClock:
    """Stands in for the time module: the test says how late it is.

    Time never passes twice without being looked at in between, however busy the machine is: whoever
    waits sees each step.
    """

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.reads = 0
        self._read_before = 0

    def monotonic(self) -> float:
        self.reads += 1
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(0.001)

    def tick(self, seconds: float) -> None:
        """Lets so much time pass, unless nobody has looked since the last time."""
        if self.reads > self._read_before:
            self._read_before = self.reads
            self.now += seconds

    def pass_seconds(self, seconds: float) -> None:
        """Lets time pass in steps: whoever waits looks twice before, once in each, twice after."""
        self.wait_for_looks(2)
        end = self.now + seconds
        while self.now < end:
            self.now += 2.0
            self.wait_for_looks(1)
        self.wait_for_looks(1)

    def wait_for_looks(self, count: int) -> None:
        """Returns when somebody has looked so often; fails the test if nobody does."""
        before = self.reads
        eventually(lambda: self.reads >= before + count)


def together(*works: Callable[[], object], seconds: float = 60.0) -> None:
    """Does ``works`` to their ends, at once, a thread for each; raises what one of them raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        try:
            start.wait(seconds)
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in threads), f"not done in {seconds} s"
