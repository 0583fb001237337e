# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's terminal on the guest's serial console.

While attached the terminal is raw: every key, Ctrl-C too, goes to the guest. Ctrl-A is the way
out: Ctrl-A x ends the machine, Ctrl-A Ctrl-A is one Ctrl-A for the guest. The terminal's settings
are restored whatever happens.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator

from vhostvmbus.vm.errors import GuestFailure
from vhostvmbus.vm.machine import Machine

ESCAPE = 0x01
END_OF_INPUT = b"\x04"
HELP = "Ctrl-A x ends the machine, and so does exit or poweroff; Ctrl-C goes to the guest"
LOOK_INTERVAL = 0.2
PROMPT = b"# "
PROMPT_PATIENCE = 60.0
END_INTERVAL = 1.0


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Makes a terminal raw for a while; leaves what is not a terminal as it is."""
    if not os.isatty(fd):
        yield
        return
    saved = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def terminal_words() -> str:
    """Returns kernel command-line words that tell the guest about the user's terminal."""
    if not sys.stdin.isatty():
        return "vhostvmbus.term=dumb"
    size = os.get_terminal_size(sys.stdin.fileno())
    term = os.environ.get("TERM", "vt100")
    return f"vhostvmbus.term={term} vhostvmbus.size={size.lines}x{size.columns}"


class Keyboard:
    """The user's keys, searched for the way out."""

    def __init__(self) -> None:
        self._escaped = False

    def keys(self, data: bytes) -> tuple[bytes, bool]:
        """Returns what the guest shall get, and whether the user wants out."""
        passed = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    return bytes(passed), True
                if key == ESCAPE:
                    passed.append(key)
            elif key == ESCAPE:
                self._escaped = True
            else:
                passed.append(key)
        return bytes(passed), False


def attach(machine: Machine) -> None:
    """Connects stdin and stdout with the guest's console until the guest ends.

    Raises GuestFailure if it ends other than by powering off.
    """
    keyboard = Keyboard()
    source = sys.stdin.fileno()
    is_terminal = os.isatty(source)

    def show(data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            _write_all(1, data)

    def resized(number: int, frame: object) -> None:
        size = os.get_terminal_size(source)
        machine.streams.send("control", b"size %d %d\n" % (size.lines, size.columns))

    with raw_terminal(source):
        if is_terminal:
            signal.signal(signal.SIGWINCH, resized)
        console = machine.streams.console
        with machine.streams.changed:
            show(console.pending)
            console.sinks.append(show)
        try:
            _converse(machine, source, keyboard, is_terminal)
        finally:
            console.sinks.remove(show)
            if is_terminal:
                signal.signal(signal.SIGWINCH, signal.SIG_DFL)
    if machine.streams.console.panic:
        raise GuestFailure(f"the guest died: {machine.streams.console.panic}")


def _wait_for_prompt(machine: Machine) -> None:
    """Waits until the shell reads.

    What comes earlier may get lost when the shell sets its terminal up.
    """
    console = machine.streams.console
    deadline = time.monotonic() + PROMPT_PATIENCE
    machine.wait_until(lambda: console.pending.endswith(PROMPT), deadline, "show a prompt")


def _converse(machine: Machine, source: int, keyboard: Keyboard, is_terminal: bool) -> None:
    sources = [source]
    if not is_terminal:
        _wait_for_prompt(machine)
    end_said = 0.0
    while machine.qemu.status is None and machine.streams.console.panic is None:
        readable, _, _ = select.select(sources, [], [], LOOK_INTERVAL)
        if not sources and time.monotonic() - end_said > END_INTERVAL:
            # Again and again: a program that runs in between may take it for itself.
            machine.streams.send("console", END_OF_INPUT)
            end_said = time.monotonic()
        for backend in machine.backends:
            if backend.problem:
                raise GuestFailure(backend.problem)
        if not readable:
            continue
        data = os.read(source, 4096)
        if not data:
            sources.clear()
            continue
        leave = False
        if is_terminal:
            data, leave = keyboard.keys(data)
        if data:
            machine.streams.send("console", data)
        if leave:
            return


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
