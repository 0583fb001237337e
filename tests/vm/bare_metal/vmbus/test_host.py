# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's VMBus as the bare-metal guest sees it: versions, signals, a host that stalls or changes.

The scenarios are in ``host.c``.
"""

import mmap
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bare_metal import Report, converse, plug, report_of, served_by
from tests.support.paths import PROGRAMS
from tests.vm.bare_metal.vmbus.messages import (
    ALIVE,
    CONTACT,
    GPADL_CREATED,
    GPADL_TORNDOWN,
    NOTHING,
    OFFER_CHANNEL,
    RESCIND_OFFER,
    VERSION_RESPONSE,
    CommandFor,
)
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.qmp import Monitor

POSTED_GPA = 0x00C00000
"""Where the guest writes 2 when it has posted its message."""


@pytest.mark.parametrize("device", ["hv-balloon"], indirect=True)
def test_versions(run: Callable[[str], Report]) -> None:
    """Those that there are, and no number between them, are supported."""
    answers = [("supported", 1)] * 5 + [("supported", 0)] * 11
    assert run("versions") == [
        *[pair for answer in answers for pair in (("contact", VERSION_RESPONSE), answer)],
        *ALIVE,
    ]


def test_signals_before_version_2_4(command_for: CommandFor, back_end: BackEndProcess) -> None:
    """A bit in a page says which channel, and event flag 0 that one of them is meant."""
    packet = [("page_bit", 1), ("flag_0", 1), ("interrupted", 1)]
    assert report_of(command_for("old-signal", *served_by(back_end))) == [
        *CONTACT,
        ("good", 0),
        ("open", 0),
        *packet * 2,
        *ALIVE,
    ]


class Stopping:
    """Stops the back end when the guest asks for it, until the guest has posted a message."""

    def __init__(self, back_end: BackEndProcess, memory: Path) -> None:
        self._pid = back_end.child.pid
        self._memory = memory
        self._thread = threading.Thread(target=self._go_on_when_posted)
        self.ended = threading.Event()

    def act(self, monitor: Monitor, what: int) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        while "State:\tT" not in Path(f"/proc/{self._pid}/status").read_text():
            time.sleep(0.001)
        self._thread.start()

    def _go_on_when_posted(self) -> None:
        with self._memory.open("rb") as file:
            ram = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        while ram[POSTED_GPA] != 2 and not self.ended.is_set():
            time.sleep(0.001)
        os.kill(self._pid, signal.SIGCONT)

    def end(self) -> None:
        self.ended.set()
        if self._thread.is_alive():
            self._thread.join()


def test_messages_while_the_back_end_stalls(
    command_for: CommandFor, back_end: BackEndProcess, tmp_path: Path
) -> None:
    """A guest can post messages while QEMU waits for an answer of the back end.

    It goes on only after that. If the guest were held up, QEMU would give the back end up.
    """
    said = tmp_path / "said"
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file, said.open("w") as stderr:
        memory = Path(file.name)
        stopping = Stopping(back_end, memory)
        try:
            report = converse(
                command_for("stalled", *served_by(back_end, memory)), stopping.act, stderr
            )
        finally:
            stopping.end()
    assert said.read_text() == ""
    assert report == [
        *CONTACT,
        ("created", GPADL_CREATED),
        ("status", 0),
        ("torn_down", GPADL_TORNDOWN),
        *ALIVE,
    ]


def test_channels_offered_anew(command_for: CommandFor, tmp_path: Path) -> None:
    """The primary channel comes first, whichever the guest releases first."""
    device = BackEndProcess("anew", [f"{PROGRAMS / 'offering_anew.py'}:OfferingAnew"], tmp_path)

    def act(monitor: Monitor, what: int) -> None:
        os.kill(device.child.pid, signal.SIGUSR1)

    try:
        report = converse(command_for("reoffer", *served_by(device)), act)
        assert device.problem is None
    finally:
        device.stop()
    three = [*CONTACT[:3], ("offers", 3)]
    assert report == [
        *three,
        *[("rescind", RESCIND_OFFER)] * 3,
        ("before_primary", NOTHING),
        *[pair for n in range(3) for pair in (("offer", OFFER_CHANNEL), ("index", n))],
        ("nothing_more", NOTHING),
        ("alive", 1),
        *three,
    ]


PLUGGED: Report = [
    *CONTACT[:3],
    ("offers", 0),
    ("offer", OFFER_CHANNEL),
    ("good", 0),
    ("open", 0),
    *ALIVE,
]


def test_plugging_keeps_translations(command_for: CommandFor, back_end: BackEndProcess) -> None:
    """The map of translated code is complete when the first device comes."""
    flushes = []

    def act(monitor: Monitor, what: int) -> None:
        for step in (lambda: None, lambda: plug(monitor)):
            step()
            text = monitor.command("human-monitor-command", command_line="info jit")
            flushes.extend(re.findall(r"TB flush count +(\d+)", text))

    words = served_by(back_end)[:-2]
    assert converse(command_for("plugged", *words), act) == PLUGGED
    assert len(flushes) == 2
    assert flushes[0] == flushes[1]


def test_memory_that_is_not_shared(
    command_for: CommandFor, back_end: BackEndProcess, tmp_path: Path
) -> None:
    """The back end cannot have a DIMM that lacks share=on, and QEMU says so."""

    def act(monitor: Monitor, what: int) -> None:
        monitor.command("object-add", qom_type="memory-backend-ram", id="dimm0", size=128 << 20)
        monitor.command("device_add", driver="pc-dimm", memdev="dimm0", id="d0")
        plug(monitor)

    words = ("-m", "128,slots=1,maxmem=512M", *served_by(back_end)[:-2])
    said = tmp_path / "said"
    with said.open("w") as stderr:
        assert converse(command_for("plugged", *words), act, stderr) == PLUGGED
    assert re.search("guest memory '.*dimm0' lacks share=on", said.read_text())


@pytest.mark.parametrize(("words", "megabytes"), [((), 512), (("64M",), 64), (("0",), 0)])
def test_devices_in_acpi(command_for: CommandFor, words: tuple[str, ...], megabytes: int) -> None:
    """ACPI has the bus in a device with such a window, as Hyper-V's does.

    It has no floppy controller: a driver for that would take an interrupt which the agent needs.
    """
    settings = [word for size in words for word in ("-global", f"vmbus-bridge.mmio-size={size}")]
    assert report_of(command_for("acpi", *settings)) == [
        ("parent", 1),
        ("bus", 1),
        ("above_4_GiB", int(megabytes > 0)),
        ("megabytes", megabytes),
        ("whole", int(megabytes > 0)),
        ("floppy", 0),
    ]


def test_the_only_processor_signals_in_time(
    command_for: CommandFor, back_end: BackEndProcess
) -> None:
    """A back end that goes to rest and a packet that enters the ring never miss each other.

    The guest looks whether the back end rests after a locked instruction, which is a memory barrier
    on every processor, and so also on one that is translated and alone.
    """
    assert report_of(command_for("one-at-a-time", *served_by(back_end)), timeout=300) == [
        *CONTACT,
        ("good", 0),
        ("open", 0),
        ("answered", 50_000),
    ]
