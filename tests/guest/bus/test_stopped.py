# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine that is stopped: its devices leave everything alone, and then go on where they were."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices import Echo
from tests.support.soak import times
from tests.support.stillness import cont, memory_of, stop, unchanged
from tests.support.waiting import eventually, in_thread
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.cli.stats import as_text
from vhostvmbus.device import stillness
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.errors import ReceiveTimeout
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.errors import RingFull
from vhostvmbus.wire.ntstatus import NtStatus

A_MOMENT = 0.1
"""Seconds in which a device that does not stand still would have done something."""


class Stoppable(Echo):
    """Notes when its machine stops and goes on; keeps packets that ask for it."""

    max_channels = 2

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Packet] = []
        self.has_kept = threading.Event()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if bytes(packet.payload) == b"keep me.":
            self.kept.append(packet)
            self.has_kept.set()
        else:
            packet.complete(packet.payload)

    def machine_stopped(self) -> None:
        self.events.append("stopped")

    def machine_continued(self) -> None:
        self.events.append("continued")


@pytest.fixture
def device() -> Stoppable:
    return Stoppable()


@pytest.fixture
def guest(device: Stoppable) -> Iterator[SoftwareGuest]:
    with SoftwareGuest.for_device(device) as guest:
        yield guest


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets that are not completed are not waited for."""
    monkeypatch.setattr(stillness, "SUSPEND_SECONDS", 0.2)


def test_nothing_is_taken_from_the_ring(device: Stoppable, guest: SoftwareGuest) -> None:
    """What the guest had put there as it stopped is answered when it goes on, in order."""
    channel = guest.enable()
    assert channel.send(b"answered") == b"answered"
    stop(guest)
    with unchanged(guest):
        time.sleep(A_MOMENT)
    waiting = [channel.submit(b"%8d" % number) for number in range(10)]
    channel.kick()
    with unchanged(guest):
        time.sleep(A_MOMENT)
    assert channel.in_flight == 10
    assert guest.host is not None
    assert "its machine is stopped" in as_text(guest.host.stats())
    cont(guest)
    assert "its machine is stopped" not in as_text(guest.host.stats())
    assert [each.wait(10) for each in waiting] == [b"%8d" % number for number in range(10)]
    assert device.events[-2:] == ["stopped", "continued"]


def test_what_was_taken_is_completed_before_the_answer(
    device: Stoppable, guest: SoftwareGuest
) -> None:
    channel = guest.enable()
    transaction = channel.submit(b"keep me.")
    assert device.has_kept.wait(10)
    stopping, outcome = in_thread(lambda: stop(guest))
    assert guest.host is not None
    eventually(lambda: guest.host is not None and guest.host.channels[0].held)
    assert stopping.is_alive()
    assert "stopped" not in device.events
    device.kept.pop().complete(b"all done")
    stopping.join(10)
    assert outcome == [None]
    with unchanged(guest):
        time.sleep(A_MOMENT)
    assert transaction.wait(10) == b"all done"  # it is in the ring already
    cont(guest)


@pytest.mark.usefixtures("soon")
def test_what_is_not_completed_is_said_and_waits(device: Stoppable, guest: SoftwareGuest) -> None:
    """The ring is left alone all the same, although the device completes the packet."""
    channel = guest.enable()
    transaction = channel.submit(b"keep me.")
    assert device.has_kept.wait(10)
    with pytest.raises(RequestRefused) as caught:
        stop(guest)
    assert caught.value.status == NtStatus.IO_TIMEOUT
    with unchanged(guest):
        device.kept.pop().complete(b"too late")
        time.sleep(A_MOMENT)
    cont(guest)
    assert transaction.wait(10) == b"too late"
    assert channel.send(b"and more") == b"and more"


def test_what_the_device_sends_waits(device: Stoppable, guest: SoftwareGuest) -> None:
    channel = guest.enable()
    host_side = device.opened_channels[0]
    stop(guest)
    with unchanged(guest):
        for number in range(5):
            host_side.send(b"%8d" % number)
        host_side.signal()
        with pytest.raises(RingFull):
            host_side.request(b"now", 0, wait_for_completion=False)
        with pytest.raises(ReceiveTimeout):
            channel.receive(A_MOMENT)
    cont(guest)
    assert [bytes(channel.receive(10).payload) for _ in range(5)] == [
        b"%8d" % number for number in range(5)
    ]


def test_each_request_may_come_again(device: Stoppable, guest: SoftwareGuest) -> None:
    """A channel that is opened meanwhile is served; the next stop is for it as well."""
    guest.enable()
    cont(guest)  # of nothing
    stop(guest)
    device.offer_channels(1)
    guest.wait_for_offer(1)
    second = guest.enable(1)
    assert second.send(b"it runs.") == b"it runs."
    stop(guest)
    transaction = second.submit(b"it waits")
    with unchanged(guest):
        time.sleep(A_MOMENT)
    cont(guest)
    cont(guest)
    assert transaction.wait(10) == b"it waits"
    assert device.events.count("stopped") == device.events.count("continued") == 1


@pytest.mark.parametrize("end", ["close", "reset", "disconnect"])
@pytest.mark.usefixtures("soon")
def test_a_channel_may_end_meanwhile(device: Stoppable, end: str) -> None:
    """Whatever becomes of it, it publishes nothing, and the next one is as any."""
    with serving(device) as (server, path, host), SoftwareGuest.connect(path) as guest:
        channel = guest.enable()
        channel.submit(b"keep me.")
        assert device.has_kept.wait(10)
        with pytest.raises(RequestRefused):
            stop(guest)
        device.kept.pop().complete(b"too late")
        channel.submit(b"never")
        if end == "close":
            guest.disable(0)
        elif end == "reset":
            guest.reset()
        else:
            guest.disconnect()
        eventually(lambda: not host.channels)
        if end == "disconnect":
            guest.reconnect(path)
        else:
            cont(guest)
        eventually(lambda: device.events[-1] == "continued" or "closed 0" in device.events)
        if end != "disconnect":
            channel = guest.enable()
        assert guest.channels[0].send(b"as ever.") == b"as ever."
        assert server.protocol_errors == 0
    assert device.events.count("stopped") == device.events.count("continued") == 1


def test_a_pause_is_another_thing(device: Stoppable, guest: SoftwareGuest) -> None:
    """A channel that its device has paused stays so when the machine goes on."""
    channel = guest.enable()
    host_side = device.opened_channels[0]
    host_side.pause(10)
    stop(guest)
    transaction = channel.submit(b"not yet.")
    cont(guest)
    time.sleep(A_MOMENT)
    assert channel.in_flight == 1
    stop(guest)
    host_side.start()
    with unchanged(guest):
        time.sleep(A_MOMENT)
    cont(guest)
    assert transaction.wait(10) == b"not yet."


def test_a_device_that_does_not_hear_of_it(guest: SoftwareGuest, device: Stoppable) -> None:
    """Its part is not waited for without end, and an exception is no more than said."""
    guest.enable()
    device.machine_stopped = lambda: 1 // 0  # type: ignore[method-assign,assignment]
    with pytest.raises(RequestRefused):
        stop(guest)
    cont(guest)
    assert guest.channels[0].send(b"goes on.") == b"goes on."


def test_somebody_who_sends_and_does_not_return(
    device: Stoppable, guest: SoftwareGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does whom the front end's own eventfd blocks: he is not waited for without end."""
    monkeypatch.setattr(stillness, "CALLBACK_SECONDS", 0.2)
    channel = guest.enable()
    with device.opened_channels[0]._sender._lock, pytest.raises(RequestRefused) as caught:
        stop(guest)
    assert caught.value.status == NtStatus.IO_TIMEOUT
    transaction = channel.submit(b"goes on.")
    with unchanged(guest):
        time.sleep(A_MOMENT)
    cont(guest)
    assert transaction.wait(10) == b"goes on."


def test_under_load(device: Stoppable, guest: SoftwareGuest) -> None:
    """Stopped at any moment, nothing changes from the answer on, and nothing is lost or doubled."""
    channel = guest.enable(ring_pages=(3, 3))
    count = 0
    for turn in range(times(6, 200)):
        waiting = [channel.submit(b"%8d" % (count + number)) for number in range(40)]
        stop(guest)
        memory = memory_of(guest)
        time.sleep(0.002)
        assert memory_of(guest) == memory, turn
        cont(guest)
        assert [each.wait(10) for each in waiting] == [
            b"%8d" % (count + number) for number in range(40)
        ]
        count += 40
    assert not channel.stray_completions


def frozen(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tests.support.frozen", kind, str(folder / "image.raw")]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["disk", "card"])
def test_no_write_comes_after_the_answer(kind: str, tmp_path: Path) -> None:
    """Not one, of whatever value: the device's memory is made read-only while it stands still."""
    done = frozen(kind, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_write_after_the_answer_is_found(tmp_path: Path) -> None:
    """The test before sees one, and says which line it was."""
    done = frozen("stubborn", tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert "in write" in done.stderr
