# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process has at a moment, as ``/proc`` tells it, and whether repetitions make it more."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REST = 20.0
"""Seconds in which what is on its way, such as a connection that is made anew, has to arrive."""
WARM_UP = 10
"""One of so many turns, or the first one, comes before a process is looked at."""


@dataclass(frozen=True)
class Footprint:
    """What a process has: descriptors by what they are, threads, mappings of files, memory."""

    fds: Counter[str]
    threads: int
    files: Counter[str]
    anonymous: int
    """KiB of memory of its own, in use; without code that it has made, as a translator does for as
    long as its guest comes to what is new."""

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Counts what the process has at this moment."""
        proc = Path(f"/proc/{pid}")
        fds: Counter[str] = Counter()
        for entry in os.listdir(proc / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(proc / "fd" / entry)
                fds[re.sub(r"(socket|pipe):\[\d+\]", r"\1", target)] += 1
        files: Counter[str] = Counter()
        anonymous = 0
        for line in (proc / "smaps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if "-" in fields[0]:
                rights, name = fields[1], fields[5] if len(fields) == 6 else ""
                files[name] += name.startswith("/") or ":" in name
            elif fields[0] == "Anonymous:" and (name or "x" not in rights):
                anonymous += int(fields[1])
        return cls(fds, len(os.listdir(proc / "task")), files, anonymous)

    def growth(self, before: Footprint, memory: int, threads: int) -> list[str]:
        """Returns what is more than ``before``.

        There may be ``memory`` KiB more, and so many ``threads``.
        """
        found = _more(self, before, "+")
        if self.threads > before.threads + threads:
            found.append(f"{self.threads} threads instead of {before.threads}")
        if self.anonymous > before.anonymous + memory:
            found.append(f"{self.anonymous - before.anonymous} KiB more memory")
        return found

    def differences(self, before: Footprint, memory: int, threads: int) -> list[str]:
        """Returns what is more, as :meth:`growth` does, or less than ``before``."""
        found = self.growth(before, memory, threads) + _more(before, self, "-")
        if self.threads < before.threads:
            found.append(f"{self.threads} threads instead of {before.threads}")
        return found


def _more(one: Footprint, other: Footprint, sign: str) -> list[str]:
    found = []
    for name, here, there in (("fd", one.fds, other.fds), ("map", one.files, other.files)):
        found += [f"{sign}{count} {name} {what}" for what, count in sorted((here - there).items())]
    return found


Repeated = Callable[..., Iterator[int]]
"""The fixture ``repeated`` of all tests."""


@dataclass(frozen=True)
class Subject:
    """A process that is not to grow by more than ``memory`` MiB and so many ``threads``."""

    name: str
    pid: Callable[[], int]
    """Tells its id, another one each time that it was killed: the last one is compared with the
    first."""
    memory: int
    threads: int = 0


def repeat(
    what: str,
    turns: int,
    subjects: Sequence[Subject],
    report: Callable[[str], object],
    rest: float = REST,
) -> Iterator[int]:
    """Counts ``turns``, and fails if they make one of the ``subjects`` grow.

    The processes are looked at when they are warm, after the tenth part of the turns, and in the
    end, when the same has just been done. Nothing may have been added to their descriptors and
    mappings of files. ``report`` gets a line with the figures.
    """
    warm = max(1, turns // WARM_UP)
    begun, before = time.monotonic(), []
    for turn in range(turns):
        yield turn
        if turn + 1 == warm:
            before = [Footprint.of(subject.pid()) for subject in subjects]
    took, deadline = time.monotonic() - begun, time.monotonic() + rest
    while True:
        after = [Footprint.of(subject.pid()) for subject in subjects]
        found = [
            f"{subject.name}: {growth}"
            for subject, then, now in zip(subjects, before, after, strict=True)
            for growth in now.growth(then, subject.memory << 10, subject.threads)
        ]
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    figures = [
        f"{subject.name} {then.anonymous} KiB, {then.fds.total()} descriptors, {then.threads} "
        f"threads after {warm}, in the end {now.anonymous} KiB, {now.fds.total()}, {now.threads}"
        for subject, then, now in zip(subjects, before, after, strict=True)
    ]
    report("; ".join([f"{turns} times in {took:.0f} s", *figures]))
    assert not found, f"{what}: more after {turns} times than after {warm}: {', '.join(found)}"
