# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines for the user: printed behind a name, and nobody waits for whoever does not look."""

import contextlib
import os
import pty
import re
import tty

import pytest

from tests.support.waiting import eventually, nothing_left_behind
from vhostvmbus.cli import printer as module
from vhostvmbus.cli.printer import Printer


def test_lines_come_in_their_order_behind_their_names() -> None:
    reader, writer = os.pipe()
    with nothing_left_behind():
        printer = Printer(writer)
        printer.show("One", "a")
        printer.show("Two", "ü")
        printer.show("One", "")
        printer.close()
    assert os.read(reader, 1000) == "One: a\nTwo: ü\nOne: \n".encode()
    os.close(reader)
    os.close(writer)


def test_a_line_begins_at_the_left_of_a_raw_terminal() -> None:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    printer = Printer(theirs)
    printer.show("One", "a")
    printer.close()
    assert os.read(ours, 1000) == b"One: a\r\n"
    os.close(ours)
    os.close(theirs)


def test_nobody_waits_for_a_pipe_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who shows lines nor the end; who reads at last learns how many are missing."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    os.set_blocking(writer, True)
    os.set_blocking(reader, False)
    with nothing_left_behind():
        printer = Printer(writer)
        count = 3 * module.WAITING
        for number in range(count):
            printer.show("One", str(number))
        printer.close()
        seen = bytearray()

        def all_is_told() -> bool:
            with contextlib.suppress(BlockingIOError):
                seen.extend(os.read(reader, 1 << 20))
            notices = re.findall(rb"^\((\d+) lines are not shown", seen, re.MULTILINE)
            return seen.count(b"One: ") + sum(map(int, notices)) == count

        eventually(all_is_told)
        printer.close()
    assert seen.count(b"One: ") <= module.WAITING + 1
    assert seen.lstrip(b"\0").startswith(b"One: 0\n")
    os.close(reader)
    os.close(writer)


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with nothing_left_behind():
        printer = Printer(writer)
        printer.show("One", "a")
        printer.show("One", "b")
        printer.close()
    os.close(writer)
