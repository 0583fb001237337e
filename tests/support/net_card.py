# SPDX-License-Identifier: GPL-2.0-or-later
"""A link of socket pairs, and a guest with a bound driver, for tests of the network card."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.support.vnet import HEADER, Offload
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.guest import GuestChannel, SoftwareGuest
from vhostvmbus.guest.netvsc import Netvsc

EVERYTHING = Capabilities(checksum=True, tso4=True, tso6=True)
MAC = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000099")
OFFLOAD_PARAMETERS = 0xFC01020C
"""``OID_TCP_OFFLOAD_PARAMETERS``."""


@dataclass(frozen=True)
class Seen:
    """A frame that reached the world."""

    frame: bytes
    offload: Offload


class SocketLink:
    """A link over sequenced-packet sockets, with a virtio-net header in front of each frame.

    The other ends are in :attr:`world`.
    """

    framing: Framing = Framing.DATAGRAM

    def __init__(
        self,
        queues: int = 1,
        mtu: int = 1500,
        capabilities: Capabilities = EVERYTHING,
        mac: bytes | None = MAC,
    ) -> None:
        self.name = "test"
        self.queues = queues
        self.mtu = mtu
        self.mac = mac
        self.capabilities = capabilities
        self.ports = [Port(self.framing) for _ in range(queues)]
        self.card: list[socket.socket] = []
        self.world: list[socket.socket] = []
        for port in self.ports:
            self._connect(port)
        self.up = True
        self.largest_mtu = 65521
        self.queues_used: list[int] = []
        self.wanted: list[Capabilities] = []
        self.changed: Callable[[], None] = lambda: None

    def _connect(self, port: Port) -> None:
        stream = self.framing is Framing.STREAM
        kind = socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET
        card, world = socket.socketpair(socket.AF_UNIX, kind)
        card.setblocking(False)
        port.put(card.fileno())
        self.card.append(card)
        self.world.append(world)

    # -- Link --

    def start(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def carrier(self) -> bool:
        return self.up

    def port(self, queue: int) -> Port:
        return self.ports[queue]

    def use_queues(self, count: int) -> None:
        self.queues_used.append(count)

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        self.wanted.append(wanted)

    def set_mtu(self, mtu: int) -> None:
        if mtu > self.largest_mtu:
            raise OSError(22, "too large for this link")
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        return {"lost": 7}

    def close(self) -> None:
        for end in (*self.ports, *self.card, *self.world):
            end.close()

    # -- the world --

    def put(
        self,
        frame: bytes,
        *,
        queue: int = 0,
        needs_checksum: bool = False,
        valid: bool = False,
        start: int = 0,
        offset: int = 0,
        gso: int = 0,
        segment: int = 0,
    ) -> None:
        """Sends a frame to the card."""
        offload = Offload(needs_checksum, valid, start, offset, gso, segment)
        self.world[queue].sendall(offload.pack() + frame)

    def get(self, queue: int = 0, timeout: float = 5.0) -> Seen:
        """Returns the next frame of the card."""
        self.world[queue].settimeout(timeout)
        data = self.world[queue].recv(1 << 17)
        return Seen(data[HEADER.size :], Offload.unpack(data))

    def set_carrier(self, up: bool) -> None:
        """Pulls the cable, or puts it in."""
        self.up = up
        self.changed()


class StreamLink(SocketLink):
    """A link over a stream, each frame behind its length, with nothing left undone, as passt has
    it.
    """

    framing = Framing.STREAM

    def __init__(self, mtu: int = 1500) -> None:
        super().__init__(1, mtu, Capabilities())
        self._begun = b""

    def put(self, frame: bytes, **_offload: object) -> None:
        """Sends a frame to the card."""
        self.world[0].sendall(struct.pack(">I", len(frame)) + frame)

    def get(self, queue: int = 0, timeout: float = 5.0) -> Seen:
        """Returns the next frame of the card."""
        self.world[queue].settimeout(timeout)
        while len(self._begun) < 4 or len(self._begun) < 4 + self._length():
            piece = self.world[queue].recv(1 << 17)
            assert piece, "the card ended the connection"
            self._begun += piece
        end = 4 + self._length()
        frame, self._begun = self._begun[4:end], self._begun[end:]
        return Seen(frame, Offload())

    def _length(self) -> int:
        return int.from_bytes(self._begun[:4], "big")

    def reconnect(self) -> None:
        """Puts somebody else at the other end; what was begun is lost."""
        for end in (self.card.pop(), self.world.pop()):
            end.close()
        self._begun = b""
        self._connect(self.ports[0])
        self.changed()


class HastyCard(NetworkCard):
    """Drops frames soon if the guest gives no receive section back."""

    patience = 0.06


class Rig:
    """A card on a link, and a guest whose driver has it."""

    def __init__(
        self, link: SocketLink, card: NetworkCard, guest: SoftwareGuest, channel: GuestChannel
    ) -> None:
        self.link = link
        self.card = card
        self.guest = guest
        self.channel = channel
        self.driver = Netvsc(guest, channel)


@contextlib.contextmanager
def rig(
    queues: int = 1,
    mtu: int = 1500,
    capabilities: Capabilities = EVERYTHING,
    ring_pages: tuple[int, int] = (17, 17),
    kind: type[NetworkCard] = NetworkCard,
    link: SocketLink | None = None,
    **options: object,
) -> Iterator[Rig]:
    """Gives a card whose primary channel is open; nothing is negotiated."""
    if link is None:
        link = SocketLink(queues, mtu, capabilities)
    card = kind(link)
    try:
        with (
            SoftwareGuest.for_device(card, **options) as guest,  # type: ignore[arg-type]
            guest.open_channel(ring_pages=ring_pages) as channel,
        ):
            yield Rig(link, card, guest, channel)
    finally:
        card.close()


def ethernet(payload: bytes = bytes(46), to: bytes = PEER, kind: int = 0x88B5) -> bytes:
    """Returns a frame from the guest, or with ``to`` its address, to it."""
    return to + (MAC if to != MAC else PEER) + kind.to_bytes(2, "big") + payload


def internet_checksum(data: bytes) -> int:
    """Computes the checksum of RFC 1071, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(ip6: bool, source: bytes, target: bytes, protocol: int, length: int) -> bytes:
    if ip6:
        return source + target + struct.pack(">IxxxB", length, protocol)
    return source + target + struct.pack(">BBH", 0, protocol, length)


SOURCE4, TARGET4 = bytes([10, 0, 0, 2]), bytes([10, 0, 0, 1])
SOURCE6, TARGET6 = bytes.fromhex("fd" + "00" * 14 + "02"), bytes.fromhex("fd" + "00" * 14 + "01")


def ip_frame(
    payload: bytes,
    *,
    ip6: bool = False,
    udp: bool = False,
    to: bytes = PEER,
    seed: str = "full",
    ports: tuple[int, int] = (1234, 80),
    options: int = 12,
    tag: int | None = None,
) -> bytes:
    """Returns an Ethernet frame with TCP (``options`` bytes of options) or UDP in IP.

    ``seed``: the transport checksum is ``"full"``, the sum of the pseudo-header (``"pseudo"``), or
    as Linux leaves it for a large send (``"large"``: pseudo-header without length, no IP lengths).
    """
    source, target = (SOURCE6, TARGET6) if ip6 else (SOURCE4, TARGET4)
    if udp:
        transport = struct.pack(">HHHH", *ports, 8 + len(payload), 0)
        at, protocol = 6, 17
    else:
        words = (20 + options) // 4
        transport = struct.pack(">HHIIBBHHH", *ports, 7, 9, words << 4, 0x10, 512, 0, 0)
        transport += bytes([1]) * options
        at, protocol = 16, 6
    segment = transport + payload
    length = 0 if seed == "large" else len(segment)
    pseudo = pseudo_header(ip6, source, target, protocol, length)
    if seed == "full":
        value = internet_checksum(pseudo + segment)
    else:
        value = internet_checksum(pseudo) ^ 0xFFFF
    segment = segment[:at] + value.to_bytes(2, "big") + segment[at + 2 :]
    if ip6:
        size = 0 if seed == "large" else len(segment)
        header = struct.pack(">IHBB", 6 << 28, size, protocol, 64) + source + target
    else:
        size = 0 if seed == "large" else 20 + len(segment)
        header = struct.pack(">BBHHHBBH", 0x45, 0, size, 1, 0x4000, 64, protocol, 0)
        header += source + target
        if seed != "large":
            header = header[:10] + internet_checksum(header).to_bytes(2, "big") + header[12:]
    body = (0x86DD if ip6 else 0x0800).to_bytes(2, "big") + header + segment
    if tag is not None:
        body = b"\x81\x00" + tag.to_bytes(2, "big") + body
    return to + (MAC if to != MAC else PEER) + body


def switch_on(driver: Netvsc, rsc: int = 1) -> None:
    """Sets what Linux sets after it saw that everything is there."""
    data = struct.pack("<BBH", 0x80, 3, 28) + bytes([1, 4, 4, 4, 4, 0, 0, 2, 2, 0, 0])
    data = data.ljust(22, b"\0") + bytes([rsc, rsc]) + bytes(4)
    assert driver.set(OFFLOAD_PARAMETERS, data) == 0
