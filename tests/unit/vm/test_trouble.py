# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel that breaks while it boots is reported at once, with its lines."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from vhostvmbus.vm import machine as module
from vhostvmbus.vm.errors import GuestFailure
from vhostvmbus.vm.machine import Machine, MachinePlan
from vhostvmbus.vm.ports import Console
from vhostvmbus.vm.process import Child

FIRST = b"[    0.000000] Linux version 5.10.0 (somebody@somewhere)\r\n"
OOPS = (
    b"[    1.000001][  T1] BUG: kernel NULL pointer dereference, address: 0000000000000010\r\n"
    b"[    1.000002][  T1] #PF: supervisor read access in kernel mode\r\n"
    b"[    1.000003][  T1] Oops: 0000 [#1] PREEMPT SMP NOPTI\r\n"
    b"[    1.000004][  T1] Call Trace:\r\n"
    b"[    1.000005][  T1] ---[ end trace 0123456789abcdef ]---\r\n"
)


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        (b"[    1.5] BUG: unable to handle page fault for address: 1", "BUG: unable to handle "),
        (b"[    1.5] Oops: general protection fault, 0x1: 0000 [#1] SMP", "Oops: general"),
        (b"[    1.5][   T1] invalid opcode: 0000 [#1] PREEMPT", "invalid opcode"),
        (b"[    1.5] kernel BUG at mm/slub.c:1!", "kernel BUG at"),
        (b"[   30.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!", "watchdog: BUG: soft"),
        (b"echo BUG: unable to handle it", None),
        (b"[    1.5] systemd[1]: oops", None),
    ],
)
def test_what_a_kernel_says_when_it_breaks(line: bytes, trouble: str | None) -> None:
    console = Console()
    console.feed(FIRST + line + b"\r\n")
    assert (console.trouble or "").startswith(trouble or "")
    assert (console.trouble is None) == (trouble is None)


def test_the_report_begins_with_the_trouble_and_the_next_boot_without_it() -> None:
    console = Console()
    console.feed(FIRST + OOPS)
    assert len(console.report) == 5
    assert "NULL pointer" in console.report[0]
    console.feed(FIRST)
    assert (console.trouble, console.report) == (None, [])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with a process that is no QEMU; the test writes what its ports get."""
    monkeypatch.setattr(module, "REPORT_PATIENCE", 0.01)
    monkeypatch.setattr(module, "LOOK_INTERVAL", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nothing = Path("/nowhere")
    machine = Machine(MachinePlan(nothing, nothing, nothing, console_log=tmp_path / "log"))
    machine._qemu = Child("QEMU", ["sleep", "100"], tmp_path / "qemu.log")
    yield machine
    machine.qemu.kill()
    machine.close()


def ends(machine: Machine) -> dict[str, socket.socket]:
    """The guest's ends of the ports, of a machine that reads the others from now on."""
    found = {name: sock.dup() for name, sock in machine.streams._theirs.items()}
    machine.streams.start()
    return found


def look(machine: Machine) -> None:
    """Waits as a command does, so long that the machine is looked at; raises what is wrong."""
    answers = iter([False, False, True])
    machine.wait_until(lambda: next(answers), time.monotonic() + 300, "be looked at")


def test_an_oops_during_the_boot_is_reported_at_once(machine: Machine) -> None:
    guest = ends(machine)
    guest["console"].sendall(FIRST + OOPS)
    with pytest.raises(GuestFailure, match="did not come up: BUG: kernel NULL pointer") as caught:
        machine.wait_ready(timeout=300)
    assert re.search("end trace", caught.value.console[-1])
    for sock in guest.values():
        sock.close()


def test_an_oops_of_a_guest_that_is_up_is_its_own_business(machine: Machine) -> None:
    guest = ends(machine)
    guest["console"].sendall(FIRST)
    guest["control"].sendall(b"ready\n")
    machine.wait_ready(timeout=300)
    guest["console"].sendall(OOPS)
    eventually(lambda: b"end trace" in machine.console_log.read_bytes())
    look(machine)
    # Nor does it matter in a boot that has come to its end all the same.
    guest["console"].sendall(FIRST + OOPS)
    eventually(lambda: len(machine.streams.console.report) == 5)
    guest["control"].sendall(b"ready\n")
    eventually(lambda: machine.boots == 2)
    look(machine)
    # In the next boot it counts again.
    guest["console"].sendall(FIRST + OOPS)
    with pytest.raises(GuestFailure, match="did not come up"):
        machine.wait_ready(timeout=300, boots=3)
    for sock in guest.values():
        sock.close()
