# SPDX-License-Identifier: GPL-2.0-or-later
"""What repeats something notices whether a process grows by it."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.footprint import Repeated, Subject, repeat

MEMORY = 2 << 20
"""More, by twenty times, than a process that runs tests gains or loses by itself meanwhile."""


class Work:
    """Something of which a turn leaves ``left`` behind, in this process."""

    def __init__(self, left: str, folder: Path) -> None:
        self._left = left
        self._file = folder / "file"
        self._file.write_bytes(bytes(mmap.PAGESIZE))
        self._fds: list[int] = []
        self._kept: list[object] = []
        self._enough = threading.Event()

    def turn(self) -> None:
        match self._left:
            case "fd":
                self._fds.append(os.memfd_create("left"))
            case "map":
                with open(self._file, "rb") as file:
                    self._kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            case "thread":
                threading.Thread(target=self._enough.wait).start()
            case "memory":
                # Of its own: what an allocator has to spare, this process has not more of.
                memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.write(b"x" * MEMORY)
                self._kept.append(memory)

    def turns(self, turns: Iterable[int]) -> None:
        for _ in turns:
            self.turn()

    def clean(self) -> None:
        self._enough.set()
        self._kept.clear()
        while self._fds:
            os.close(self._fds.pop())


def ourselves(memory: int = 1) -> Subject:
    return Subject("we", os.getpid, memory)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ("fd", r"\+18 fd /memfd:left"),
        ("map", r"\+18 map /.*/file"),
        ("thread", "threads instead of"),
        ("memory", "KiB more memory"),
    ],
)
def test_what_is_left_of_each_turn(left: str, words: str, tmp_path: Path) -> None:
    work, lines = Work(left, tmp_path), list[str]()
    try:
        turns = repeat("some work", 20, [ourselves()], lines.append, rest=0)
        with pytest.raises(
            AssertionError, match=f"more after 20 times than after 2: we: .*{words}"
        ):
            work.turns(turns)
    finally:
        work.clean()
    assert lines[0].startswith("20 times in ")


def test_what_is_made_once_and_what_goes_after_all(repeated: Repeated, tmp_path: Path) -> None:
    """A process that is warm has more than at first; what is on its way is waited for."""
    work = Work("fd", tmp_path)
    turns: list[int] = []
    late = threading.Timer(0.05, work.clean)
    for turn in repeated("some work", 10, ourselves(memory=8)):
        turns.append(turn)
        if turn == 0 or turn == 9:
            work.turn()
        if turn == 9:
            late.start()
    assert turns == list(range(10))
    late.join()


def test_a_process_that_takes_the_place_of_another() -> None:
    """The last one is compared with the first."""
    with contextlib.ExitStack() as stack:
        left = os.memfd_create("left")
        stack.callback(os.close, left)
        children: list[subprocess.Popen[bytes]] = []
        subject = Subject("it", lambda: children[-1].pid, memory=64)
        turns = repeat("a new one", 2, [subject], print, rest=0)
        for turn in range(2):
            next(turns)
            children.append(subprocess.Popen(["sleep", "60"], pass_fds=[left] * turn))
            stack.callback(children[-1].wait)
            stack.callback(children[-1].kill)
        with pytest.raises(AssertionError, match=r"it: \+1 fd /memfd:left"):
            next(turns)
