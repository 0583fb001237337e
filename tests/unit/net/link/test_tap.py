# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames through TAPs of a real kernel, in network namespaces of the tests' own."""

import os
import socket
import threading
import time

import pytest
from pyroute2 import IPRoute

from tests.support.network import (
    Guest,
    arp,
    checksum_is_good,
    namespace_name,
    namespaces,
    opened,
    require_root,
    udp,
    wait_for,
)
from tests.support.taps import ALL, GUEST, HOST, MAC, interface
from tests.support.vnet import Gso, Offload
from vhostvmbus.devices.net.link import Capabilities, Link
from vhostvmbus.devices.net.link import interface as interfaces
from vhostvmbus.devices.net.link.namespace import call_in


@pytest.mark.usefixtures("network")
def test_a_frame_each_way() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.9.0.1", 7))
            server.settimeout(5)
            assert guest.send(
                udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"in")  # type: ignore[arg-type]
            )
            data, peer = server.recvfrom(100)
            assert (data, peer) == (b"in", ("10.9.0.2", 1000))
            server.sendto(b"out", peer)
            guest.wait(lambda frame: frame[12:22].endswith(b"\x00\x01"), "an ARP request")
            guest.send(arp(2, MAC, GUEST, host["mac"], HOST))  # type: ignore[arg-type]
            frame, offload = guest.wait(lambda frame: frame[34:36] == b"\x00\x07", "the answer")
            assert frame.endswith(b"out")
            assert frame[:6] == MAC
            assert offload == Offload()
            assert checksum_is_good(frame)


@pytest.mark.usefixtures("network")
def test_a_checksum_left_to_the_other_side() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        guest.link.use_receive_offloads(Capabilities(checksum=True))
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.9.0.1", 7))
            server.settimeout(5)
            frame = udp(
                host["mac"],  # type: ignore[arg-type]
                MAC, GUEST, HOST, (1000, 7), b"odd", complete=False,
            )  # fmt: skip
            assert not checksum_is_good(frame)
            guest.send(frame, offload=Offload(needs_checksum=True, start=34, offset=6))
            data, peer = server.recvfrom(100)
            assert data == b"odd"
            server.sendto(b"answer", peer)
            frame, offload = guest.wait(lambda frame: frame[34:36] == b"\x00\x07", "the answer")
            assert offload.needs_checksum
            assert (offload.start, offload.offset) == (34, 6)
            assert not checksum_is_good(frame)
            # A wrong checksum that claims nothing is seen as such.
            wrong = bytearray(udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"bad"))  # type: ignore[arg-type]
            wrong[-1] ^= 1
            guest.send(bytes(wrong))
            guest.send(udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"good"))  # type: ignore[arg-type]
            assert server.recv(100) == b"good"


class Bridge:
    """Carries frames between two links, as a guest with two cards would that forwards."""

    def __init__(self, one: Link, other: Link) -> None:
        self.longest = 0
        self.segments: set[int] = set()
        self.partial = 0
        self.bad = 0
        self.last = time.monotonic()
        self.running = True
        self._threads = [
            threading.Thread(target=self._carry, args=pair) for pair in ((one, other), (other, one))
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: Link, target: Link) -> None:
        while self.running:
            quiet = True
            for queue in range(source.queues):
                while (received := source.port(queue).receive()) is not None:
                    quiet = False
                    self.last = time.monotonic()
                    header, frame = received
                    offload = Offload.unpack(header)
                    self.longest = max(self.longest, len(frame))
                    self.segments.add(offload.gso)
                    self.partial += offload.needs_checksum
                    if not offload.needs_checksum and frame[23] == 6 and frame[12:14] == b"\x08\0":
                        self.bad += not checksum_is_good(frame)
                    target.port(queue % target.queues).send(frame, header)
            if quiet:
                time.sleep(0.001)

    def stop(self) -> None:
        self.running = False
        for thread in self._threads:
            thread.join()


def transfer(one: str, other: str, address: str, size: int) -> None:
    """Send *size* bytes over TCP from one namespace into another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = call_in(other, lambda: socket.create_server((address, 5000), family=family))
    client = call_in(one, lambda: socket.socket(family, socket.SOCK_STREAM))
    data = os.urandom(1 << 16) * (size >> 16)
    with server, client:
        client.settimeout(30)
        client.connect((address, 5000))
        sender = threading.Thread(target=lambda: (client.sendall(data), client.close()))
        sender.start()
        accepted, _ = server.accept()
        accepted.settimeout(30)
        received = bytearray()
        while piece := accepted.recv(1 << 20):
            received += piece
        accepted.close()
        sender.join()
    assert received == data


@pytest.mark.parametrize(
    ("address", "kind"), [("10.9.0.2", Gso.TCPV4), ("fd09::2", Gso.TCPV6)], ids=["v4", "v6"]
)
def test_long_segments_cross_whole(address: str, kind: Gso) -> None:
    require_root()
    one, other = namespace_name(), namespace_name()
    with (
        opened(f"netns:{one},ip=10.9.0.1/24,ip=fd09::1/64,queues=2") as a,
        opened(f"netns:{other},ip=10.9.0.2/24,ip=fd09::2/64,queues=1") as b,
    ):
        for link in (a, b):
            link.use_queues(link.queues)
            link.use_receive_offloads(ALL)
        bridge = Bridge(a, b)
        try:
            transfer(one, other, address, 4 << 20)
            assert kind in bridge.segments
            assert bridge.longest > 20000
            assert bridge.partial
            for link in (a, b):
                link.use_receive_offloads(Capabilities())
            # What was queued before is on its way as it was.
            wait_for(lambda: time.monotonic() > bridge.last + 0.3, "silence")
            bridge.longest, bridge.partial, bridge.segments = 0, 0, set()
            transfer(one, other, address, 1 << 20)
            assert bridge.longest <= 1514
            assert bridge.partial == 0
            assert bridge.segments == {Gso.NONE}
            assert bridge.bad == 0
        finally:
            bridge.stop()
    assert not {one, other} & namespaces()


@pytest.mark.usefixtures("network")
def test_queues_that_are_used_get_frames_and_others_none() -> None:
    with opened("tap,ip=10.9.0.1/24,queues=4") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")

        def used() -> set[int]:
            seen = set()
            for port in range(2000, 2064):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"x", ("10.9.0.2", port))
            for queue in range(4):
                while guest.receive(queue) is not None:
                    seen.add(queue)
            return seen

        assert used() == {0}
        link.use_queues(3)
        assert used() == {0, 1, 2}
        link.use_queues(1)
        assert used() == {0}
        link.use_queues(4)
        assert used() == {0, 1, 2, 3}
        for wrong in (0, 5):
            with pytest.raises(ValueError, match="1 to 4"):
                link.use_queues(wrong)


@pytest.mark.usefixtures("network")
def test_a_frame_that_just_fits_and_one_that_does_not() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(101), ("10.9.0.2", 9))
            sender.sendto(bytes(100), ("10.9.0.2", 9))
        while True:  # the kernel may have reports of its own to send, by IPv6
            received = link.port(0).receive(142)
            assert received is not None
            if received[1][12:14] == b"\x08\x00":
                break
        assert (received[0], len(received[1])) == (Offload().pack(), 142)
        assert link.stats()["too_long"] == 1


@pytest.mark.usefixtures("network")
def test_nonsense_is_refused_and_counted() -> None:
    with opened("tap") as link:
        guest = Guest(link)
        frame = udp(MAC, MAC, GUEST, HOST, (1, 2), b"")
        assert not guest.send(frame, offload=Offload(needs_checksum=True, start=40, offset=6000))
        assert not guest.send(b"short")
        assert link.stats()["send_failed"] == 2
        assert guest.send(frame)


@pytest.mark.usefixtures("network")
def test_an_mtu_that_is_set_while_the_interface_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was seen before is no news afterwards."""
    real = interfaces.look
    with opened("tap,ip=10.9.0.1/24") as link:
        setter = threading.Thread(target=link.set_mtu, args=(1400,))
        news: list[tuple[bool, int]] = []

        def look(route: IPRoute, index: int) -> interfaces.State | None:
            state = real(route, index)
            if state is not None and state.mtu == 9000:
                setter.start()
                setter.join(0.2)  # it may have to wait until this has been taken in
            return state

        monkeypatch.setattr(interfaces, "look", look)
        link.start(
            lambda: news.append((setter.ident is not None and not setter.is_alive(), link.mtu))
        )
        found = interface(link.name)
        assert found is not None
        interfaces.set_mtu(found["index"], 9000)  # type: ignore[arg-type]
        wait_for(lambda: setter.ident and not setter.is_alive(), "the MTU is set")
        wait_for(lambda: interface(link.name)["mtu"] == link.mtu == 1400, "the MTU")  # type: ignore[index]
        assert (True, 9000) not in news
