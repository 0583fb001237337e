# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's VMBus, driven by a bare-metal guest that plays by no rules.

Each scenario of ``scenarios.c`` is one run of QEMU with one device: QEMU's own hv-balloon, or
vhost-user-vmbus with the SCSI controller behind it. QEMU must live to the end of the run, the bus
must work after all that was done to it, and what is asked for must be answered as listed here.
"""

import socket
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.support.bare_metal import Report, converse, plug
from tests.vm.bare_metal.vmbus.messages import (
    ALIVE,
    ALL_OFFERS_DELIVERED,
    CONTACT,
    GPADL_CREATED,
    GPADL_TORNDOWN,
    NOTHING,
    OFFER_CHANNEL,
    OPEN_RESULT,
    RESCIND_OFFER,
    UNLOAD_RESPONSE,
    VERSION_RESPONSE,
    CommandFor,
)
from vhostvmbus.vm.errors import VmError
from vhostvmbus.vm.qmp import Monitor

MOST_GPADLS = {"hv-balloon": 2048, "vhost-user-vmbus": 1024}
"""The bus has its limit; the back end has its own, which is lower."""


def test_lying_gpadl_headers(run: Callable[[str], Report]) -> None:
    """A list whose size wraps or says something else than its range: failed, nothing reserved."""
    lies = (
        *("no_list", "short_list", "empty_list", "no_range", "two_ranges", "most_ranges"),
        *("offset", "more_bytes", "fewer_bytes"),
    )
    answers = [pair for name in lies for pair in ((name, GPADL_CREATED), ("failed", 1))]
    assert run("headers") == [
        *CONTACT,
        *answers,
        ("too_short_for_a_range", NOTHING),
        ("good", 0),
        *ALIVE,
    ]


def test_gpadl_bodies(run: Callable[[str], Report]) -> None:
    """Pages beyond the announced number, bodies for nothing, the longest list there can be."""
    assert run("bodies") == [
        *CONTACT,
        ("good", 0),
        ("after_end", NOTHING),
        ("without_header", NOTHING),
        ("incomplete", NOTHING),
        ("completed_by_too_many", GPADL_CREATED),
        ("status", 0),
        ("after_completion", NOTHING),
        ("longest", GPADL_CREATED),
        ("incomplete_torn_down", GPADL_TORNDOWN),
        ("continued", NOTHING),
        *ALIVE,
    ]


def test_number_of_gpadls_is_bounded(run: Callable[[str], Report], device: tuple[str, ...]) -> None:
    assert run("flood") == [
        *CONTACT,
        ("created", MOST_GPADLS[device[-1].partition(",")[0]]),
        ("one_gone", GPADL_TORNDOWN),
        ("one_more", 0),
        ("no_more", 1),
        *ALIVE,
        ("again", 0),
    ]


def test_gpadl_teardown(run: Callable[[str], Report]) -> None:
    """Tearing down the ring of an open channel closes it, and the id is free again."""
    assert run("teardown") == [
        *CONTACT,
        ("unknown", NOTHING),
        ("good", 0),
        ("same_id", NOTHING),
        ("open", 0),
        ("in_use", GPADL_TORNDOWN),
        ("twice", NOTHING),
        ("gone", 1),
        ("close_after", NOTHING),
        ("same_id_again", 0),
        ("open_again", 0),
        ("close", NOTHING),
        ("close_twice", NOTHING),
        ("end", GPADL_TORNDOWN),
        *ALIVE,
    ]


def test_open(run: Callable[[str], Report]) -> None:
    """Channels, virtual processors, GPADLs and ring offsets that do not exist."""
    refused = (
        *("no_such_gpadl", "no_such_vp", "vp_minus_1", "offset_0", "offset_1", "offset_7"),
        *("offset_8", "offset_minus_1", "offset_minus_2"),
    )
    assert run("open") == [
        *CONTACT,
        ("good", 0),
        *[(name, 1) for name in refused],
        ("close_closed", NOTHING),
        ("open", OPEN_RESULT),
        ("status", 0),
        ("open_after_close", OPEN_RESULT),
        ("status", 0),
        ("no_such_channel", NOTHING),
        ("close_no_such_channel", NOTHING),
        *ALIVE,
        ("good", 0),
        ("open", 0),
        ("contact_while_open", VERSION_RESPONSE),
        *ALIVE,
    ]


def test_unload(run: Callable[[str], Report]) -> None:
    """Before any contact, after a contact in nobody's name, twice."""
    assert run("unload") == [
        ("before_contact", NOTHING),
        ("offers_before_contact", NOTHING),
        ("contact_of_nobody", NOTHING),
        ("unload_of_nobody", NOTHING),
        *CONTACT,
        ("good", 0),
        ("open", 0),
        ("unload", UNLOAD_RESPONSE),
        ("unload_again", NOTHING),
        ("released", NOTHING),
        *ALIVE,
    ]


def test_interrupt_page(run: Callable[[str], Report]) -> None:
    """VMBus 1.1 with interrupt pages in RAM, in no memory, in device memory, at the very end."""
    page = [*CONTACT, ("good", 0), ("open", 0), ("nothing", NOTHING)]
    assert run("interrupt-page") == [*page * 7, *ALIVE]


def test_messages_that_cannot_be_delivered(run: Callable[[str], Report]) -> None:
    """The guest takes the message page away with requests queued; what comes later is served."""
    assert run("undeliverable") == [("contact", VERSION_RESPONSE), *ALIVE]


class Hand:
    """Does what the guest asks the host for: plugs the device in and out."""

    def __init__(self) -> None:
        self.deleted = 0

    def act(self, monitor: Monitor, what: int) -> None:
        if what in (1, 4):
            for _ in range(2 if what == 1 else 1):
                monitor.command("device_del", id="dev0")
        if what == 2:
            names = [n["name"] for n in monitor.command("qom-list", path="/machine/peripheral")]
            assert "dev0" in names
        if what in (3, 4, 5):
            self.wait_deleted(monitor)
        if what in (3, 4):
            plug(monitor)

    def wait_deleted(self, monitor: Monitor) -> None:
        self.deleted += 1
        deadline = time.monotonic() + 30
        while monitor.count("DEVICE_DELETED") != self.deleted:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("scenario", ["offers", "offers-1.1"])
@pytest.mark.parametrize("device", ["vhost-user-vmbus"], indirect=True)
def test_offers_come_and_go(command: CommandFor, scenario: str) -> None:
    """A guest that does not obey a rescind, lies about what it released, or just goes away."""
    report = converse(command(scenario), Hand().act)
    new_device = [("offer", OFFER_CHANNEL), ("good", 0), ("open", 0)]
    rescind = [("rescind", RESCIND_OFFER), ("is_it", 1)]
    nobody = [*CONTACT[:3], ("offers", 0)]
    assert report == [
        *CONTACT,
        *new_device[1:],
        *rescind,
        ("gpadl_refused", 1),
        ("same_id_refused", NOTHING),
        ("open_again", NOTHING),
        ("close", NOTHING),
        ("teardown", GPADL_TORNDOWN),
        ("teardown_again", NOTHING),
        ("no_offer", ALL_OFFERS_DELIVERED),
        ("not_released", NOTHING),
        *new_device,
        ("released", NOTHING),
        *new_device,
        *rescind,
        *nobody,
        *new_device,
        *rescind,
        ("unload", UNLOAD_RESPONSE),
        *nobody,
    ]


@pytest.mark.parametrize("device", ["hv-balloon"], indirect=True)
def test_other_devices_stay(command: CommandFor) -> None:
    """What was not made to come and go is refused, with words."""
    ours, theirs = socket.socketpair()
    words = [*command("offers"), "-S", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}"]
    words += ["-mon", "qmp,mode=control"]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
    ) as child:
        theirs.close()
        monitor = Monitor(ours)
        try:
            with pytest.raises(VmError, match="does not support hotplugging"):
                monitor.command("device_add", driver="hv-balloon", id="another")
        finally:
            child.kill()
            monitor.close()
