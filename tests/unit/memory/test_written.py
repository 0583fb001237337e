# SPDX-License-Identifier: GPL-2.0-or-later
"""The tracker of what was written: who listens, and that nobody is told what nobody asked for."""

from __future__ import annotations

import os

import pytest

from vhostvmbus.memory import CodeMap, GuestMemory

EVERYTHING = [(0, 1 << 20, (1 << 64) - 1)]


def test_without_a_listener_nothing_is_looked_up() -> None:
    memory = GuestMemory()
    assert not memory.written.watched
    assert memory.written.report([(0, 4096)]) == 0


def test_a_listener_is_told_until_it_goes() -> None:
    memory, told = GuestMemory(), list[tuple[int, int]]()
    memory.written.discard = told.extend
    memory.written.use_code_map(CodeMap(-1, 0, EVERYTHING))
    assert memory.written.watched
    assert memory.written.report([(5, 10), (8192, 4097)]) == 2
    assert told == [(0, 4096), (8192, 8192)]
    memory.written.use_code_map(None)
    assert memory.written.report([(5, 10)]) == 0
    assert len(told) == 2


def test_nothing_written_is_nothing_told() -> None:
    memory = GuestMemory()
    memory.written.use_code_map(CodeMap(-1, 0, EVERYTHING))
    assert memory.written.report([]) == 0


def test_the_map_may_be_closed_once_another_is_used() -> None:
    """The first one's file is gone and its memory unmapped: looked up there, all would be code."""
    memory, told = GuestMemory(), list[tuple[int, int]]()
    memory.written.discard = told.extend
    fd = os.memfd_create("codemap", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    for _ in range(50):
        memory.written.use_code_map(CodeMap(fd, 4096, [(0, 1 << 20, 0)]))
    assert memory.written.report([(0, 1 << 20)]) == 0
    os.close(fd)
    assert told == []


def test_without_a_way_to_the_front_end_the_guest_must_not_be_told() -> None:
    memory = GuestMemory()
    memory.written.use_code_map(CodeMap(-1, 0, EVERYTHING))
    with pytest.raises(RuntimeError, match="front end"):
        memory.written.report([(0, 1)])
