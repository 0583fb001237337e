# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a device's code or a peer's descriptor does, closing ends; nothing is touched then."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.devices import Echo, Noting, Silent
from tests.support.waiting import eventually
from vhostvmbus.channel import ChannelState, deadline
from vhostvmbus.device import Channel, DeviceHost, Packet
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.ring import Ring, Role
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import Disconnected, RequestRefused
from vhostvmbus.wire.errors import DeviceTimeout, MemoryInUse, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PAGE_SIZE

FULL = (1 << 64) - 2
"""The most that an eventfd's counter can be."""


@pytest.fixture
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up after seconds is given up after a part of one."""
    monkeypatch.setattr("vhostvmbus.device.host.CLOSING_SECONDS", 0.4)
    monkeypatch.setattr("vhostvmbus.device.host.HURRY_SECONDS", 0.2)
    monkeypatch.setattr("vhostvmbus.device.host.GRACE", 0.05)
    monkeypatch.setattr("vhostvmbus.device.host.PATIENCE", 0.05)
    monkeypatch.setattr("vhostvmbus.device.host.LAST_PATIENCE", 0.1)


class Blocked(Noting):
    """Two channels, of which 0 blocks in the callback ``where`` until the test lets it go."""

    channels = 2
    max_channels = 2

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.release = threading.Event()
        self.entered = threading.Event()

    def _enter(self, where: str, channel: Channel) -> None:
        self.events.append(f"{where} {channel.index}")
        if where == self.where and channel.index == 0:
            self.entered.set()
            self.release.wait()

    def opened(self, channel: Channel) -> None:
        self._enter("opened", channel)

    def started(self, channel: Channel) -> None:
        self._enter("started", channel)

    def post_started(self, channel: Channel) -> None:
        self._enter("post_started", channel)

    def suspended(self, channel: Channel) -> None:
        self._enter("suspended", channel)

    def closed(self, channel: Channel) -> None:
        self._enter("closed", channel)

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if packet.payload == b"deferred" and not packet.deferred:
            packet.defer()
            return
        if packet.payload == b"question":
            channel.send(b"how?", on_completion=lambda _: self._enter("completion", channel))
        self._enter("packet_received" + "_again" * packet.deferred, channel)
        packet.complete(packet.payload)

    def processing_complete(self, channel: Channel, count: int) -> None:
        self._enter("processing_complete", channel)


@pytest.fixture
def blocked(request: pytest.FixtureRequest) -> Iterator[Blocked]:
    device = Blocked(request.param)
    yield device
    device.release.set()


WHERE = [
    ("post_started", b""),
    ("suspended", b""),
    ("closed", b""),
    ("packet_received", b"anything"),
    ("packet_received_again", b"deferred"),
    ("completion", b"question"),
    ("processing_complete", b"anything"),
]


@pytest.mark.parametrize(
    ("blocked", "payload", "how"),
    [
        *((*where, "close") for where in WHERE),
        ("packet_received", b"anything", "reset"),
        ("packet_received", b"anything", "leave"),
        ("suspended", b"", "leave"),
    ],
    indirect=["blocked"],
)
@pytest.mark.usefixtures("_in_a_hurry")
def test_a_callback_that_does_not_return_holds_up_nothing(
    blocked: Blocked, payload: bytes, how: str
) -> None:
    """The channel closes, its neighbour goes on, and so does the server."""
    with serving(blocked) as (server, path, host):
        with SoftwareGuest.connect(path) as guest:
            channel, other = guest.enable(0), guest.enable(1)
            if payload:
                channel.submit(payload)
            if blocked.where == "completion":
                eventually(lambda: host.channels[0].stats.packets_sent)
            elif blocked.where not in ("suspended", "closed"):
                assert blocked.entered.wait(10)
            if how == "close":
                guest.disable(0)
                assert other.send(b"all well") == b"all well"
            elif how == "reset":
                guest.reset()
        eventually(lambda: not host.channels)
        assert host.stats()["threads_left_behind"] >= 1
        with SoftwareGuest.connect(path) as guest, guest.open_channel(1) as other:
            assert other.send(b"as ever.") == b"as ever."
        blocked.release.set()
        eventually(lambda: host.left.count == 0 and host.left.late >= 1)
        assert server.failures == 0


@pytest.mark.parametrize("blocked", ["opened", "started"], indirect=True)
def test_an_opening_that_does_not_return_is_refused(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SoftwareGuest.for_device(blocked) as guest:
        with monkeypatch.context() as patch:
            patch.setattr("vhostvmbus.device.host.REQUEST_SECONDS", 0.2)
            with pytest.raises(RequestRefused) as caught:
                guest.enable(0)
        assert caught.value.status == NtStatus.IO_TIMEOUT
        with guest.open_channel(1) as other:
            assert other.send(b"all well") == b"all well"
        blocked.release.set()


@pytest.mark.usefixtures("_in_a_hurry")
def test_threads_that_do_not_return_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "MAX_LEFT_BEHIND", 2)
    device = Blocked("closed")
    with SoftwareGuest.for_device(device) as guest:
        try:
            for _ in range(2):
                guest.enable(0)
                guest.disable(0)
            with pytest.raises(RequestRefused) as caught:
                guest.enable(0)
            assert caught.value.status == NtStatus.INSUFFICIENT_RESOURCES
        finally:
            device.release.set()
        assert guest.host is not None
        left = guest.host.left
        eventually(lambda: left.count == 0)
        guest.enable(0)


class Late(Noting):
    """Uses everything that it was given after it has been taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.entered = threading.Event()
        self.raised: list[str] = []

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        self.entered.set()
        self.release.wait()
        data = packet.external_data
        assert data is not None
        for use in (
            lambda: data.write(b"too late"),
            lambda: channel.send(b"too late"),
            lambda: channel.map_gpadl(1),
            lambda: setattr(channel, "note", b"too late"),
            lambda: packet.complete(b"too late"),
        ):
            try:
                use()
            except VmbusError as error:
                self.raised.append(type(error).__name__)
        raise SystemExit("too late as well")


@pytest.mark.usefixtures("_in_a_hurry")
def test_what_is_left_behind_reaches_nothing() -> None:
    device = Late()
    with SoftwareGuest.for_device(device) as guest:
        assert guest.host is not None
        left = guest.host.left
        channel = guest.enable()
        pages = guest.ram.alloc_pages(1)
        channel.submit_with_external_pfns(b"", pages)
        assert device.entered.wait(10)
        before = guest.ram.read(pages, 0, PAGE_SIZE)
        guest.disable()
        # The ring's pages are the guest's again: whatever is there now stays.
        with guest.open_channel(ring_pages=(4, 4)) as again:
            device.release.set()
            eventually(lambda: left.count == 0)
            assert guest.ram.read(pages, 0, PAGE_SIZE) == before
            assert again.stray_completions == []
        assert device.raised == ["ExternalDataClosed", *["ChannelClosed"] * 3]
        assert left.late >= 2  # the completion, and the thread with its exception


class Reads(Noting):
    """Reads from a pipe into the guest's pages: a call that nobody can keep from writing there."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.feed = os.pipe()
        self.entered = threading.Event()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if packet.external_data is None:
            packet.complete(packet.payload)
            return
        views = packet.external_data.views(writable=True)
        self.entered.set()
        os.readv(self.source, views)

    def end(self) -> None:
        os.close(self.source)
        os.close(self.feed)


@pytest.mark.parametrize("how", ["close", "reset", "leave"])
@pytest.mark.usefixtures("_in_a_hurry")
def test_a_call_that_writes_guest_memory_loses_it(how: str) -> None:
    """Acknowledged or not: when the front end knows, nothing comes into its pages any more."""
    device = Reads()
    with serving(device) as (_, path, host):
        with SoftwareGuest.connect(path) as guest:
            channel = guest.enable()
            pages = guest.ram.alloc_pages(1)
            channel.submit_with_external_pfns(b"", pages)
            assert device.entered.wait(10)
            if how == "close":
                with pytest.raises(Disconnected):
                    guest.disable()
            elif how == "reset":
                guest.reset()
                with pytest.raises(RequestRefused) as caught:
                    guest.enable()  # what it does next might be overtaken
                assert caught.value.status == NtStatus.IO_TIMEOUT
            else:
                guest.front_end.close()
            eventually(lambda: how == "reset" or not host.memory.regions)
            os.write(device.feed, b"unwanted")
            eventually(lambda: host.left.count == 0)
            assert guest.ram.read(pages, 0, 8) == bytes(8)
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"as ever.") == b"as ever."
    device.end()


def test_a_close_is_not_acknowledged_while_the_device_has_not_ended() -> None:
    """It says so, and the front end learns by the end of the connection."""

    class Writing(Echo):
        def closed(self, channel: Channel) -> None:
            super().closed(channel)
            if self.events.count("closed 0") == 1:
                raise DeviceTimeout("still writing")

    with serving(Writing()) as (server, path, _):
        with SoftwareGuest.connect(path) as guest:
            guest.enable()
            with pytest.raises(Disconnected):
                guest.disable()
        assert isinstance(server.last_error, MemoryInUse)
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"as ever.") == b"as ever."


class LendsTwo(Silent):
    """Lends the data of two packets, which are given back when the test lets each of them go."""

    def __init__(self) -> None:
        super().__init__()
        self.release = [threading.Event(), threading.Event()]
        self.asked = [threading.Event(), threading.Event()]

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        assert packet.external_data is not None
        number = len(self.packets)

        def before_close() -> None:
            self.asked[number].set()
            self.release[number].wait()

        packet.external_data.lend(lambda _: None, before_close)
        super().packet_received(channel, packet)


def test_what_is_given_back_late_but_in_time_for_the_answer_is_no_reason_to_hang_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packets' data are given back by code of the device, which takes its time; once it has
    returned, nobody is at the guest's memory, and the close can be acknowledged."""
    monkeypatch.setattr("vhostvmbus.channel.closing.DATA", 0.0)

    class Hurries(LendsTwo):
        def closed(self, channel: Channel) -> None:
            assert host.left.count == 1
            self.release[0].set()
            eventually(lambda: host.left.count == 0)

    device = Hurries()
    with serving(device) as (_, path, host), SoftwareGuest.connect(path) as guest:
        guest.enable().submit_with_external_pfns(b"", guest.ram.alloc_pages(1))
        assert device.arrived.acquire(timeout=10)
        guest.disable()
        guest.enable()


def test_nothing_is_opened_while_anything_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device does with the data that it has not given back must not be overtaken."""
    monkeypatch.setattr("vhostvmbus.channel.closing.DATA", 0.0)
    device = LendsTwo()
    with serving(device) as (_, path, host), SoftwareGuest.connect(path) as guest:
        channel = guest.enable()
        for _ in device.release:
            channel.submit_with_external_pfns(b"", guest.ram.alloc_pages(1))
            assert device.arrived.acquire(timeout=10)
        guest.reset()
        device.release[0].set()
        assert device.asked[1].wait(10)
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert caught.value.status == NtStatus.IO_TIMEOUT
        device.release[1].set()
        eventually(lambda: host.left.count == 0)
        guest.enable()


def test_channels_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are stopped first, and what their packets are given is given once."""
    monkeypatch.setattr("vhostvmbus.device.host.GRACE", 0.6)

    class Busy(Noting):
        channels = max_channels = 16

        def packet_received(self, channel: Channel, packet: Packet) -> None:
            arrived.release()

    arrived = threading.Semaphore(0)
    device = Busy()
    with SoftwareGuest.for_device(device) as guest:
        for index in range(16):
            guest.enable(index).submit(b"")
            assert arrived.acquire(timeout=10)
        del device.events[:]
        begin = time.monotonic()
        guest.reset()
        assert time.monotonic() - begin < 9  # one after the other: 9.6 s
        last_first = range(15, -1, -1)
        assert device.events == [
            f"{what} {i}" for what in ("suspended", "closed") for i in last_first
        ]


def test_a_channel_closes_without_threads() -> None:
    """No more can be made: there is no room for their stacks."""
    device = Echo()
    with SoftwareGuest.direct(device) as guest:
        guest.enable(0)
        before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * PAGE_SIZE
        threading.stack_size(64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), before[1]))
        try:
            with pytest.raises(RuntimeError):
                threading.Thread(target=print).start()
            guest.disable(0)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            threading.stack_size(0)
        assert device.events == ["opened 0", "suspended 0", "closed 0"]


class Raising(Noting):
    """Two channels, of which 0 raises what no code should, in the callback ``where``."""

    channels = 2
    max_channels = 2

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _raise(self, where: str, channel: Channel) -> None:
        if where == self.where and channel.index == 0:
            raise SystemExit(where)

    def opened(self, channel: Channel) -> None:
        self._raise("opened", channel)

    def started(self, channel: Channel) -> None:
        self._raise("started", channel)

    def post_started(self, channel: Channel) -> None:
        self._raise("post_started", channel)

    def suspended(self, channel: Channel) -> None:
        super().suspended(channel)
        self._raise("suspended", channel)

    def closed(self, channel: Channel) -> None:
        super().closed(channel)
        self._raise("closed", channel)

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if channel.index == 0:
            channel.send(b"how?", on_completion=lambda _: self._raise("completion", channel))
        self._raise("packet_received", channel)
        packet.complete(packet.payload)

    def processing_complete(self, channel: Channel, count: int) -> None:
        self._raise("processing_complete", channel)


@pytest.mark.parametrize(
    "where",
    [
        "opened",
        "started",
        "post_started",
        "suspended",
        "closed",
        "packet_received",
        "processing_complete",
        "completion",
    ],
)
def test_an_exception_ends_no_more_than_its_channel(where: str) -> None:
    device = Raising(where)
    with serving(device) as (server, path, host):
        with SoftwareGuest.connect(path) as guest:
            other = guest.enable(1)
            if where in ("opened", "started"):
                with pytest.raises(RequestRefused):
                    guest.enable(0)
                assert device.events.count("closed 0") == (where == "started")
            else:
                guest.enable(0).submit(b"anything")
                eventually(lambda: host.channels[0].stats.packets_received)
                guest.disable(0)
                assert device.events[-2:] == ["suspended 0", "closed 0"]
            assert other.send(b"all well") == b"all well"
        with SoftwareGuest.connect(path) as guest, guest.open_channel(1) as other:
            assert other.send(b"as ever.") == b"as ever."
        assert server.failures == 0


def test_an_exception_in_the_counters_is_among_them() -> None:
    class Uncountable(Echo):
        def stats(self) -> dict[str, object]:
            raise KeyError("how many?")

    assert DeviceHost(Uncountable()).stats()["device"] == {"error": "KeyError: 'how many?'"}


# -- a peer's descriptors --------------------------------------------------------------------------


def _blocking(fd: int) -> None:
    os.set_blocking(fd, True)


def _fill(fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)


@pytest.mark.parametrize("how", ["close", "reset", "leave"])
def test_a_call_eventfd_that_blocks_holds_up_nothing(how: str) -> None:
    """The worker blocks amid a signal; whoever closes the channel frees it."""
    device = Echo()
    with serving(device) as (_, path, host):
        with SoftwareGuest.connect(path) as guest:
            pfns = guest.ram.alloc_pages(8)
            ring = Ring(guest.ram.memory, pfns, 4, Role.GUEST, initialize=True)
            gpadl = guest.create_gpadl(pfns)
            kick, call = os.eventfd(0), os.eventfd(0)
            opening = Opening(0, gpadl.gpadl_id, 4)
            guest.front_end.request(m.Open(opening), [kick, call])
            assert not os.get_blocking(call)  # an accident would have done no harm
            _fill(call)
            ring.send(6, b"8 bytes!", transaction_id=1, flags=1)
            os.set_blocking(kick, False)
            os.eventfd_write(kick, 1)
            worker = next(t for t in threading.enumerate() if t.name == host.channels[0].name)
            eventually(lambda: _sleeps_in(worker, "signal"))
            if how == "close":
                guest.front_end.request(m.Close(0))
            elif how == "reset":
                guest.front_end.request(m.Reset())
            else:
                guest.front_end.close()
            eventually(lambda: not host.channels)
            assert host.left.count == 0
            ring.close()
            os.close(kick)
            os.close(call)
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"as ever.") == b"as ever."


def _sleeps_in(thread: threading.Thread, function: str) -> bool:
    frame = sys._current_frames()[thread.ident or 0]
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return frame.f_code.co_name == function and file.read().rpartition(")")[2].split()[0] == "S"


def test_a_kick_eventfd_that_blocks_and_is_emptied_blocks_nobody() -> None:
    """The worker reads it only after somebody else may have."""
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        _blocking(channel.kick_fd)
        for _ in range(2000):
            os.eventfd_write(channel.kick_fd, 1)
            with contextlib.suppress(BlockingIOError):
                os.preadv(channel.kick_fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        assert channel.send(b"all well") == b"all well"


class Lends(Noting):
    """Lends the data of a packet to somebody who, in the end, does what the test says."""

    def __init__(self, in_the_end: Callable[[], None]) -> None:
        super().__init__()
        self.in_the_end = in_the_end
        self.lent = threading.Event()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if packet.external_data is None:
            packet.complete(packet.payload)
            return
        packet.external_data.lend(lambda _: None, self.in_the_end)
        self.lent.set()


def _end_lent_data(path: Path, device: Lends, how: str) -> None:
    """Ends it by a request; the back end may end the connection over it."""
    with SoftwareGuest.connect(path) as guest:
        more = guest.ram.add(1 << 40, 8 * PAGE_SIZE)
        guest.add_memory(more)
        channel = guest.enable()
        channel.submit_with_external_pfns(b"", [more.guest_phys_addr // PAGE_SIZE])
        assert device.lent.wait(10)
        with contextlib.suppress(RequestRefused, Disconnected):
            if how == "close":
                guest.disable()
            elif how == "reset":
                guest.reset()
            elif how == "remove":
                guest.remove_memory(more)


@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("how", ["close", "reset", "leave", "remove"])
def test_an_exception_at_the_end_of_lent_data_is_contained(how: str) -> None:
    def fail() -> None:
        raise SystemExit("the data path in C is gone")

    device = Lends(fail)
    with serving(device) as (server, path, _):
        _end_lent_data(path, device, how)
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"as ever.") == b"as ever."
        assert server.failures == 0


@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("how", ["close", "reset", "leave", "remove"])
def test_lent_data_that_is_not_given_back_holds_up_nothing(how: str) -> None:
    let_go = threading.Event()
    device = Lends(lambda: _assert_set(let_go))
    with serving(device) as (_, path, host):
        _end_lent_data(path, device, how)
        with SoftwareGuest.connect(path) as guest:
            assert not let_go.is_set()
            let_go.set()  # until then no channel is opened
            eventually(lambda: host.left.count == 0)
            with guest.open_channel() as channel:
                assert channel.send(b"as ever.") == b"as ever."


def _assert_set(event: threading.Event) -> None:
    assert event.wait(20)


@pytest.mark.usefixtures("_in_a_hurry")
def test_removed_memory_is_not_held_up_by_a_call_eventfd_that_blocks() -> None:
    """What ends the packets in the memory completes them, which signals the guest."""
    device = Silent()
    with serving(device) as (_, path, _), SoftwareGuest.connect(path) as guest:
        more = guest.ram.add(1 << 40, 8 * PAGE_SIZE)
        guest.add_memory(more)
        channel = guest.enable()
        channel.submit_with_external_pfns(b"", [more.guest_phys_addr // PAGE_SIZE])
        assert device.arrived.acquire(timeout=10)
        _fill(channel.call_fd)
        guest.remove_memory(more)
        os.set_blocking(channel.call_fd, False)


class Exits(Noting):
    """Has a coroutine for each packet, of which one ends the program."""

    async def packet_received(self, channel: Channel, packet: Packet) -> None:
        if packet.payload == b"end all.":
            sys.exit("a coroutine that does not know where it runs")
        packet.complete(packet.payload)

    channels = 2
    max_channels = 2


def test_a_coroutine_that_exits_ends_no_more_than_its_channel() -> None:
    with SoftwareGuest.for_device(Exits()) as guest:
        guest.enable(0).submit(b"end all.")
        assert guest.host is not None
        failed = guest.host.channels[0]
        eventually(lambda: failed.state is ChannelState.FAILED)
        with guest.open_channel(1) as other:
            assert other.send(b"all well") == b"all well"
