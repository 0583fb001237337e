# SPDX-License-Identifier: GPL-2.0-or-later
"""A network driver in software that is as particular as Windows' ``netvsc.sys``.

What it insists on and what it sends is from Microsoft's documentation of RNDIS and NDIS, and from
the comments of hosts that serve Windows: messages of exactly the length of the version, settings as
keywords, offloads used before they are asked for and asked for beyond the offer, an indication of
what is in force after a change, and the last bytes of each receive section for itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from vhostvmbus.guest.netvsc import (
    ALL_MULTICAST,
    BROADCAST,
    DIRECTED,
    RECEIVE_ID,
    VERSIONS,
    VLAN_CAPABLE,
    BadNetPacket,
    Netvsc,
)
from vhostvmbus.guest.transactions import HostPacket
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

KEYWORDS: Mapping[str, str] = {
    "*IPChecksumOffloadIPv4": "3",
    "*JumboPacket": "1514",
    "*LsoV2IPv4": "1",
    "*LsoV2IPv6": "1",
    "*RSS": "1",
    "*TCPChecksumOffloadIPv4": "3",
    "*TCPChecksumOffloadIPv6": "3",
    "*UDPChecksumOffloadIPv4": "3",
    "*UDPChecksumOffloadIPv6": "3",
    "NetworkAddress": "",
}
"""Settings of an adapter as the system's registry has them; an empty one is not sent."""
RESERVED = 36
"""The bytes at the end of a receive section that are the driver's."""
CONFIG_PARAMETER, ENCAPSULATION, OFFLOAD_PARAMETERS = 0x0001021B, 0x0101010A, 0xFC01020C
CURRENT_CONFIG, HARDWARE_CAPABILITIES = 0xFC01020B, 0xFC01020D
OFFLOADS_CHANGED = 0x40020006
"""The status that tells which offloads are in force."""
QUERIES: Mapping[int, int] = {
    0x00010107: 4, 0x00010110: 2, 0x00010113: 4, 0x00010114: 4, 0x00010206: 16, 0x00010207: 40,
    0x00020219: 8, 0x0002021A: 8, 0x01010101: 6, 0x01010102: 6, ENCAPSULATION: 28,
    CURRENT_CONFIG: 156, HARDWARE_CAPABILITIES: 156,
}  # fmt: skip
"""The OIDs that are asked for at the start, and how many bytes are expected."""
_PATTERN = b"windows!" * 5


def _padded(length: int) -> int:
    return -(-length // 8) * 8


class WindowsNetvsc(Netvsc):
    """The driver of one card, whose primary channel is open."""

    _last = b""

    @property
    def message_size(self) -> int:
        """The bytes of each of the host's messages in the version agreed on."""
        return 40 if self.version >= 0x60001 else 28

    def _check_size(self, payload: bytes, more: int = 0) -> None:
        """Raises :class:`BadNetPacket` unless that is a message, with ``more`` bytes behind it."""
        wanted = _padded(self.message_size + more)
        if len(payload) != wanted:
            raise BadNetPacket(
                f"a message of {len(payload)} bytes in version {self.version:#x}: not {wanted}"
            )

    # ---- NVSP ----

    def nvsp(self, kind: int, body: bytes = b"", *, wait: bool = True) -> bytes:
        """Sends an NVSP message; its completion is empty or has the version's length."""
        self._last = super().nvsp(kind, body, wait=wait)
        if self._last and self.version:
            self._check_size(self._last)
        return self._last

    def negotiate(self, version: int) -> bool:
        """Sends INIT with one version, and expects the answer in that one's length."""
        self.version = 0
        taken = super().negotiate(version)
        if taken:
            self._check_size(self._last)
        return taken

    def lend_receive_buffer(self, size: int = 1 << 20) -> bytes:
        """Sends SEND_RECEIVE_BUFFER; the end of each section is the driver's own."""
        answer = super().lend_receive_buffer(size)
        assert self.receive_gpadl is not None
        for number in range(self.receive_sections):
            end = (number + 1) * self.receive_section
            self.guest.ram.write(self.receive_gpadl.owned_pfns, _PATTERN[:RESERVED], end - RESERVED)
        return answer

    def initialize(
        self,
        *,
        versions: Sequence[int] = VERSIONS,
        mtu: int = 1500,
        capabilities: int = VLAN_CAPABLE,
        receive_bytes: int = 1 << 20,
        send_bytes: int = 1 << 18,
        packet_filter: int = DIRECTED | ALL_MULTICAST | BROADCAST,
        keywords: Mapping[str, str] = KEYWORDS,
    ) -> None:
        """Does everything that the driver does before the stack above it sends frames."""
        super().initialize(
            versions=versions,
            mtu=mtu,
            capabilities=capabilities,
            receive_bytes=receive_bytes,
            send_bytes=send_bytes,
            packet_filter=0,
        )
        for name, value in keywords.items():
            if value and (status := self.set_keyword(name, value)):
                raise BadNetPacket(f"{name}={value}: {status:#x}")
        for oid, size in QUERIES.items():
            if len(found := self.query(oid)) != size:
                raise BadNetPacket(f"{len(found)} bytes for {oid:#x}: not {size}")
        self.encapsulate()
        if packet_filter and self.set(0x0001010E, struct.pack("<I", packet_filter)):
            raise BadNetPacket("the packet filter was not taken")

    # ---- settings ----

    def set_keyword(self, name: str, value: str) -> int:
        """Sets a keyword of the settings; returns the status."""
        raw = name.encode("utf-16-le"), value.encode("utf-16-le")
        head = struct.pack("<IIIII", 20, len(raw[0]), 2, 20 + len(raw[0]), len(raw[1]))
        return self.set(CONFIG_PARAMETER, head + raw[0] + raw[1])

    def encapsulate(self) -> bytes:
        """Says that frames are Ethernet's, which switches offloads on; returns those in force."""
        ethernet = (1, 2, 14)
        return self._change(ENCAPSULATION, struct.pack("<BBH6I", 0xA8, 1, 28, *ethernet, *ethernet))

    def wish(self, *settings: int, rsc: int = 0) -> bytes:
        """Sets the offload parameters, from the IP checksum on; returns those in force."""
        data = struct.pack("<BBH", 0x80, 3, 28) + bytes(settings).ljust(18, b"\0")
        return self._change(OFFLOAD_PARAMETERS, data + bytes([rsc, rsc]).ljust(6, b"\0"))

    def _change(self, oid: int, information: bytes) -> bytes:
        """Sets an OID, and waits for the indication behind the answer."""
        before = len(self.indications)
        if status := self.set(oid, information):
            raise BadNetPacket(f"{oid:#x} was answered with {status:#x}")
        if len(self.indications) != before:
            raise BadNetPacket("the change was indicated before its answer")
        while len(self.indications) == before:
            self.pump()
        if self.indications[-1] != OFFLOADS_CHANGED:
            raise BadNetPacket(f"status {self.indications[-1]:#x} was indicated")
        found = self.indicated[-1]
        if found[:4] != struct.pack("<BBH", 0xA7, 3, 156) or len(found) != 156:
            raise BadNetPacket(f"offloads in {len(found)} bytes")
        return found

    # ---- packets ----

    def completed(self, answer: bytes) -> int:
        """Returns the status in a completion, which has the version's length."""
        self._check_size(answer)
        return super().completed(answer)

    def _dispatch(self, index: int, packet: HostPacket) -> None:
        inband = packet.raw.type == PacketType.DATA_INBAND
        self._check_size(packet.payload, 64 if inband else 0)
        if inband and struct.unpack_from("<I", packet.payload, 8)[0] != self.message_size:
            raise BadNetPacket("the send table is not behind the message")
        super()._dispatch(index, packet)

    def _message(self, size: int, offset: int) -> bytes:
        assert self.receive_gpadl is not None
        pfns, section = self.receive_gpadl.owned_pfns, self.receive_section
        place = offset % section
        if place + size > section - RESERVED:
            raise BadNetPacket(f"{size} bytes at {place} of a section, with what is not the host's")
        first, skip = divmod(offset - place + section - RESERVED, PAGE_SIZE)
        if self.guest.ram.read(pfns[first : first + 2], skip, RESERVED) != _PATTERN[:RESERVED]:
            raise BadNetPacket(f"the end of a section of set {RECEIVE_ID:#x} was written")
        return super()._message(size, offset)
