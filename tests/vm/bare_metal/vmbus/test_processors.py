# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's VMBus and a bare-metal guest with two processors, one of which it ejects by itself.

The scenarios are in ``processors.c``.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.bare_metal import converse, report_of
from tests.support.paths import PROGRAMS
from tests.vm.bare_metal.vmbus.messages import (
    ALIVE,
    CONTACT,
    NOTHING,
    VERSION_RESPONSE,
    CommandFor,
)
from vhostvmbus.vm.qmp import Monitor

TWO = ("-smp", "2,maxcpus=3")
"""TCG makes as many threads as there may be processors, and does not use one a second time."""
MASKED = 1 << 16


@pytest.fixture
def freed_memory_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever QEMU frees is overwritten."""
    monkeypatch.setenv("MALLOC_PERTURB_", "90")


def plug_processor(monitor: Monitor, what: int) -> None:
    """Plugs in the second processor."""
    monitor.command(
        "device_add", driver="qemu64-x86_64-cpu", id="cpu1", socket_id=0, core_id=1, thread_id=0
    )


@pytest.mark.usefixtures("freed_memory_spoilt")
def test_processor_of_a_channel_ejected(command: CommandFor) -> None:
    """The channel has no interrupts any more, and can be closed; the processor may come back."""
    assert converse(command("eject", *TWO), plug_processor) == [
        *CONTACT,
        ("good", 0),
        ("open", 0),
        ("open_nowhere", 1),
        ("open_here", 0),
        ("close", NOTHING),
        ("started", 1),
        ("sint_at_start", MASKED),
        ("open_there", 0),
        *ALIVE,
    ]


@pytest.mark.usefixtures("freed_memory_spoilt")
def test_processor_of_the_bus_ejected(command: CommandFor) -> None:
    """A message waits for its slot there; the bus must not wait for it for ever."""
    assert report_of(command("eject-bus", *TWO)) == [
        ("started", 1),
        ("contact", VERSION_RESPONSE),
        ("pending", 1),
        *ALIVE,
    ]


@pytest.fixture(scope="session")
def slow_signal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be preloaded: it leaves time between the look-up of an event and its signal."""
    library = tmp_path_factory.mktemp("slow-signal") / "slow_signal.so"
    compiler = os.environ.get("CC", "gcc").split()
    words = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [*compiler, *words, "-o", library, PROGRAMS / "slow_signal.c"], check=True, timeout=60
    )
    return library


def test_channel_closed_amid_a_signal(
    command: CommandFor, slow_signal: Path, tmp_path: Path
) -> None:
    """The signal goes to the channel's own event, although another processor has closed it."""
    words = command("signal-close", *TWO, "-name", "guest,debug-threads=on")
    said = tmp_path / "said"
    with said.open("w") as stderr:
        report = converse(
            ["env", f"LD_PRELOAD={slow_signal}", *words], lambda monitor, what: None, stderr
        )
    assert said.read_text() == "signal\n"
    assert report == [
        *CONTACT,
        ("good", 0),
        ("open", 0),
        ("told", 1),
        ("close", NOTHING),
        ("done", 1),
        ("open_again", 0),
        *ALIVE,
    ]
