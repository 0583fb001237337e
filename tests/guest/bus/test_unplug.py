# SPDX-License-Identifier: GPL-2.0-or-later
"""A device is unplugged: it brings the guest's driver to rest, and then the front end takes it."""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.devices import Echo, Noting
from tests.support.waiting import eventually
from vhostvmbus.device import DeviceHost
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.errors import NotOffered
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user import session
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.wire.errors import FrontEndError
from vhostvmbus.wire.ntstatus import NtStatus


class Careful(Echo):
    """Lets go of the guest when it is told so; ``go`` at the latest when the test ends."""

    max_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.go = threading.Event()
        self.threads: set[int] = set()

    def unplug_requested(self) -> None:
        self.threads.add(threading.get_ident())
        self.events.append("unplug")
        self.asked.release()
        assert self.go.wait(20)
        self.events.append("ready")


@pytest.fixture
def device() -> Iterator[Careful]:
    device = Careful()
    yield device
    device.go.set()


def test_the_device_says_when() -> None:
    """By default at once; then the front end has what a rescind takes, and goes."""
    with serving(Noting()) as (server, path, host), SoftwareGuest.connect(path) as guest:
        guest.enable()
        guest.create_gpadl(3)
        assert guest.unplug()
        assert guest.channel_offers == [m.RescindChannel(0)]
        assert (guest.channels, guest.gpadls, guest.offered) == ({}, {}, [])
        with pytest.raises(NotOffered):
            guest.enable()
        assert not host.offers.rescinded
        assert server.protocol_errors == 0


def test_the_guest_goes_on_meanwhile(device: Careful) -> None:
    """The request is answered at once; packets and offers are as ever until the device is done."""
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        guest.front_end.request(m.Unplug())
        assert device.asked.acquire(timeout=10)
        assert threading.get_ident() not in device.threads
        assert channel.send(b"goes on.") == b"goes on."
        device.offer_channels(1)
        guest.wait_for_offer(1)
        assert guest.enable(1).send(b"as well.") == b"as well."
        guest.front_end.request(m.Unplug())  # nothing new
        device.go.set()
        guest.wait_for_rescind(0)
        eventually(lambda: "closed 0" in device.events)
        assert not device.asked.acquire(blocking=False)
        rescinds = [each for each in guest.channel_offers if isinstance(each, m.RescindChannel)]
        assert rescinds == [m.RescindChannel(0)]
    last = device.events[-5:]
    assert last == ["ready", "suspended 1", "closed 1", "suspended 0", "closed 0"]
    assert device.events.count("unplug") == 1


def test_plugged_in_again() -> None:
    """The next front end gets the offer, and may be unplugged as well."""
    device = Careful()
    device.go.set()
    with serving(device) as (_, path, host), SoftwareGuest.connect(path) as guest:
        for turn in range(1, 4):
            guest.enable().send(b"in again")
            assert guest.unplug()
            assert device.events.count("unplug") == turn
            guest.reconnect(path)
            assert guest.offered == [0]
            assert not host.offers.rescinded


def test_a_device_that_fails_is_taken_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Echo):
        def unplug_requested(self) -> None:
            raise ValueError("what driver?")

    with SoftwareGuest.for_device(Broken()) as guest:
        guest.enable()
        assert guest.unplug()
    assert "unplug_requested() failed" in caplog.text
    assert "what driver?" in caplog.text


def test_a_device_that_never_says_so(device: Careful) -> None:
    """The front end has its own patience; what the device says afterwards is of no consequence."""
    with serving(device) as (server, path, _), SoftwareGuest.connect(path) as guest:
        guest.enable()
        threading.Timer(0.3, device.go.set).start()
        assert not guest.unplug(patience=0.05)
        assert guest.channel_offers == []
        guest.reconnect(path)
        assert guest.offered == [0]
        assert guest.enable().send(b"in again") == b"in again"
        assert server.protocol_errors == 0
        assert guest.channel_offers == []


def test_the_connection_is_lost_meanwhile(
    device: Careful, caplog: pytest.LogCaptureFixture
) -> None:
    """No error; the next front end comes when the device's part has ended, and is not asked."""
    with serving(device) as (_, path, _), SoftwareGuest.connect(path) as guest:
        guest.enable()
        guest.front_end.request(m.Unplug())
        assert device.asked.acquire(timeout=10)
        threading.Timer(0.2, device.go.set).start()
        guest.reconnect(path)
        assert device.events[-1] == "resumed 0"
        assert "ready" in device.events
        assert guest.channels[0].send(b"still in") == b"still in"
        assert guest.channel_offers == []
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_host_is_closed_meanwhile() -> None:
    device = Careful()
    host = DeviceHost(device)
    host.unplug()
    assert device.asked.acquire(timeout=10)
    threading.Timer(0.1, device.go.set).start()
    host.close()
    assert device.events == ["unplug", "ready"]


def test_the_guest_resets_meanwhile(device: Careful) -> None:
    with SoftwareGuest.for_device(device) as guest:
        guest.enable()
        guest.front_end.request(m.Unplug())
        assert device.asked.acquire(timeout=10)
        guest.reset()
        device.go.set()
        guest.wait_for_rescind(0)


def test_a_back_end_that_does_not_know_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not sent a request that would end the session: the device goes at once."""
    known = session.OPTIONAL_FEATURES & ~ProtocolFeature.VMBUS_UNPLUG
    monkeypatch.setattr(
        session.BackEndSession.__init__,
        "__defaults__",
        (m.REQUIRED_FEATURES | known, None),
    )
    device = Careful()
    with serving(device) as (server, path, _), SoftwareGuest.connect(path) as guest:
        assert ProtocolFeature.VMBUS_UNPLUG not in guest.front_end.features
        guest.enable()
        begin = time.monotonic()
        assert not guest.unplug()
        assert time.monotonic() - begin < 5
        guest.reconnect(path)
        assert guest.offered == [0]
        assert server.protocol_errors == 0
    assert "unplug" not in device.events


def test_a_back_end_that_refuses(device: Careful, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise FrontEndError("not now", NtStatus.NOT_SUPPORTED)

    with serving(device) as (server, path, host), SoftwareGuest.connect(path) as guest:
        monkeypatch.setattr(host, "unplug", refuse)
        guest.enable()
        with pytest.raises(RequestRefused):
            guest.front_end.request(m.Unplug())
        assert not guest.unplug()
        assert server.protocol_errors == 0
    assert "unplug" not in device.events
