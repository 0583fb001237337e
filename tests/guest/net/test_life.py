# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card under traffic, while channels, buffers and the link come and go."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import struct
import threading
from collections.abc import Callable

import pytest

from tests.support.net_card import MAC, SocketLink, ethernet, ip_frame, rig
from tests.support.soak import times
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.receiver import Receiver
from vhostvmbus.guest import ReceiveTimeout, SoftwareGuest
from vhostvmbus.guest.netvsc import RSC_CAPABLE, VLAN_CAPABLE, Netvsc
from vhostvmbus.vhost_user.errors import RequestRefused

ROUNDS = times(6, 40)
KEY = bytes(range(40))


class World:
    """Sends frames on every queue and takes what comes, until it is told to stop."""

    def __init__(self, link: SocketLink) -> None:
        self.link = link
        self.taken = 0
        self._stop = threading.Event()
        works: list[Callable[[int], None]] = [self._send, self._take]
        self._threads = [
            threading.Thread(target=work, args=(queue,))
            for work in works
            for queue in range(link.queues)
        ]
        for sock in link.world:
            sock.settimeout(0.05)
        for thread in self._threads:
            thread.start()

    def _send(self, queue: int) -> None:
        chance = random.Random(queue)
        while not self._stop.is_set():
            ports = chance.randrange(1, 60000), 80
            frame = ip_frame(chance.randbytes(chance.choice((1, 60, 1400))), to=MAC, ports=ports)
            try:
                self.link.put(frame, queue=queue)
            except TimeoutError:
                continue
            self._stop.wait(0.001)

    def _take(self, queue: int) -> None:
        while not self._stop.is_set():
            try:
                self.link.get(queue, timeout=0.05)
            except TimeoutError:
                continue
            self.taken += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def scaling(channels: int) -> bytes:
    table = [number % channels for number in range(128)]
    head = struct.pack(
        "<BBH HHI HxxI HxxI III", 0x89, 2, 40, 0, 0, 0x1701, 512, 40, 40, 552, 0, 0, 0
    )
    return head + struct.pack("<128I", *table) + KEY


def test_everything_changes_under_traffic(caplog: pytest.LogCaptureFixture) -> None:
    """Channels are closed with frames on their way, buffers taken back, the link flaps."""
    chance = random.Random(12)
    link = SocketLink(4)
    card = NetworkCard(link)
    world = World(link)
    received = 0
    with SoftwareGuest.for_device(card) as guest:
        for round_ in range(ROUNDS):
            driver = Netvsc(guest, guest.enable(0))
            driver.initialize(
                capabilities=VLAN_CAPABLE | (RSC_CAPABLE if round_ % 2 else 0),
                receive_bytes=1 << 20,
            )
            count = chance.randrange(4)
            if count:
                assert driver.subchannels(count) == count
                for index in range(1, count + 1):
                    guest.wait_for_offer(index)
                    driver.channels[index] = guest.enable(index)
                assert driver.set(0x00010204, scaling(count + 1)) == 0
            under_way = []
            for step in range(60):
                index = chance.choice([*driver.channels])
                pages = chance.random() < 0.3
                frame = ethernet(chance.randbytes(chance.randrange(1400)))
                if not driver.free_sections:
                    pages = True
                under_way.append(driver.send(frame, channel=index, pages=pages))
                if step % 8 == 0:
                    received += len(driver.frames)
                    driver.frames.clear()
                    for item in under_way:
                        assert item.wait() == 1
                    under_way.clear()
                with contextlib.suppress(ReceiveTimeout):
                    driver.pump(0.001)
                if step == 30:
                    link.set_carrier(False)
                    driver.revoke(True)
                    driver.lend_receive_buffer()
                    link.set_carrier(True)
            indices = [*driver.channels]
            if chance.random() < 0.5:
                indices.reverse()  # subchannels first, as Linux does
            else:  # with the primary go the buffers that the others' packets are in
                for item in under_way:
                    assert item.wait() == 1
            for index in indices:
                if index in guest.channels:
                    guest.disable(index)
            for gpadl in (driver.receive_gpadl, driver.send_gpadl):
                if gpadl is not None and gpadl.gpadl_id in guest.gpadls:
                    guest.delete_gpadl(gpadl)
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.receive().data[:6] == MAC
        assert guest.host is not None
        errors = guest.host.stats()["totals"]["errors"]
    world.stop()
    stats = card.stats()
    card.close()
    assert received > 10 * ROUNDS
    assert world.taken > 20 * ROUNDS
    assert stats["errors"] == {}
    assert "DeviceException" not in errors
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_links_mtu_becomes_smaller_than_the_guests() -> None:
    """The guest does not know, and may send what it could: the link takes that, or drops it."""
    link = SocketLink(mtu=4000)
    with contextlib.closing(NetworkCard(link)) as card, SoftwareGuest.for_device(card) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize(mtu=4000)
        link.mtu = 1400
        link.changed()
        assert card.stats()["mtu"] == 1400
        frame = ethernet(bytes(4000))
        assert driver.send(frame).wait() == 1
        assert link.get().frame == frame
        assert card.stats()["errors"] == {}
        # It begins anew with less: now a longer frame than either MTU's is its mistake.
        driver.revoke(True)
        driver.revoke(False)
        driver.initialize(mtu=1300)
        assert link.mtu == 1400
        assert driver.send(ethernet(bytes(4000))).wait() != 1
        assert card.stats()["errors"] == {"FrameError": 1}


def test_whose_mtu_it_is() -> None:
    """A link may have less than the 1500 that a driver begins with: the guest is told, and has it.
    It may have more when it asks for more, until the host says something else."""
    link = SocketLink(mtu=1400)
    with contextlib.closing(NetworkCard(link)) as card, SoftwareGuest.for_device(card) as guest:
        driver = Netvsc(guest, guest.enable(0))

        def after(mtu: int) -> int:
            driver.initialize(mtu=mtu)
            driver.revoke(True)
            driver.revoke(False)
            assert card.stats()["mtu"] == link.mtu
            return link.mtu

        assert after(1500) == 1400
        assert after(9000) == 9000
        assert after(1500) == 1400
        assert after(9000) == 9000
        link.mtu = 2000
        link.changed()
        assert after(1500) == 2000
        assert after(3000) == 3000
        assert after(1500) == 2000


def test_packets_may_be_completed_after_their_buffer_was_taken_back() -> None:
    """Linux does, when it goes while frames are on their way."""
    with rig() as r:
        r.driver.initialize()
        r.driver.keep = True
        for _ in range(2):
            r.link.put(ethernet(to=MAC))
            assert r.driver.receive().data == ethernet(to=MAC)
        before, r.driver.kept = r.driver.kept, []
        r.driver.revoke(True)
        r.driver.give_back(before[0])
        r.driver.lend_receive_buffer()
        for _ in range(3):
            r.link.put(ethernet(to=MAC))
            assert r.driver.receive().data == ethernet(to=MAC)
        r.driver.give_back(before[1])
        assert r.driver.query(0x01010101) == MAC  # on the same ring: all that is looked at by now
        assert r.guest.host is not None
        channel = r.guest.host.channels[0]
        assert channel.stats.errors == {}
        assert channel.stats.completions_received >= len(before)
        free = r.card.stats()["receive_sections_free"]
        assert r.driver.receive_sections - free in (3, 4)  # the answer's, perhaps


class WishingPath(DataPath):
    """Notes which eventfd is to be written when a section comes back.

    Who wishes it is slow once there is a ``closed``: the channel may have closed meanwhile.
    """

    wish = -1
    closed: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__()
        self.wishing = threading.Event()

    def wake_when_free(self, wake_fd: int) -> None:
        if wake_fd >= 0 and self.closed is not None:
            self.wishing.set()
            self.closed.wait(0.1)  # or until who closes has to wait for this
        super().wake_when_free(wake_fd)
        self.wish = wake_fd


class Wishing(NetworkCard):
    """A card with that path."""

    def __init__(self, link: SocketLink) -> None:
        super().__init__(link)
        self._path = self.path = WishingPath()


def test_no_eventfd_is_written_that_was_closed() -> None:
    """An answer waits for a section; who tries to send it has not done so when all is closed."""
    with rig(kind=Wishing) as r:
        assert isinstance(r.card, Wishing)
        path = r.card.path
        r.driver.initialize(receive_bytes=16 * 1728)
        r.driver.keep = True
        while r.card.stats()["receive_sections_free"]:
            assert r.driver.query(0x01010101) == MAC
        r.link.set_carrier(False)
        assert path.wish >= 0
        path.closed = threading.Event()
        leaving = threading.Thread(target=r.card._outbox.go_on)  # as a card does while it leaves
        leaving.start()
        path.wishing.wait()
        r.guest.disable(0)
        path.closed.set()
        leaving.join()
        assert path.wish == -1


def test_a_card_that_is_closed_with_a_wish_forgets_it() -> None:
    link = SocketLink()
    card = Wishing(link)
    card._receivers.use(card.path, card._outbox, 1)
    card._receivers.wake_when_free()
    assert card.path.wish >= 0
    card.close()
    assert card.path.wish == -1


def test_an_mtu_that_the_link_refused_is_the_hosts_if_it_comes_later() -> None:
    link = SocketLink(mtu=1500)
    link.largest_mtu = 4000
    with contextlib.closing(NetworkCard(link)) as card, SoftwareGuest.for_device(card) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize(mtu=9000)
        assert link.mtu == 1500
        link.mtu = 9000  # by somebody on the host
        link.changed()
        driver.revoke(True)
        driver.revoke(False)
        driver.initialize(mtu=1500)
        assert card.stats()["mtu"] == link.mtu == 9000


def test_a_channel_that_could_not_be_opened_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be made just now; the guest tries again later."""

    def no_thread(receiver: Receiver) -> None:
        os.close(receiver._wake_fd)
        raise RuntimeError("can't start new thread")

    link = SocketLink()
    with contextlib.closing(NetworkCard(link)) as card, SoftwareGuest.for_device(card) as guest:
        with monkeypatch.context() as patched:
            patched.setattr(Receiver, "start", no_thread)
            with pytest.raises(RequestRefused):
                guest.enable(0)
        assert card.stats()["channels"] == 0
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        link.put(ethernet(to=MAC))
        assert driver.receive().data == ethernet(to=MAC)
