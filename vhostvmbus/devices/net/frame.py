# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers of Ethernet frames, as far as offloads and the packet filter need them.

IEEE 802.3 and 802.1Q; RFC 791, 8200, 9293, 768; checksums RFC 1071. Network byte order. Everything
here works on private copies of a frame's beginning; the rest may stay in guest memory.

Invariants: nothing but :class:`FrameError` is raised for what a guest wrote; a header that was
looked at is the header that is sent.
"""

from __future__ import annotations

import struct
from typing import Final

from vhostvmbus.devices.net import ppi
from vhostvmbus.devices.net.errors import FrameError
from vhostvmbus.devices.net.link import Gso, Offload

ETHERNET_SIZE: Final = 14
VLAN_SIZE: Final = 4
VLAN_TAG: Final = b"\x81\x00"
IPV4: Final = 0x0800
IPV6: Final = 0x86DD
TCP: Final = 6
UDP: Final = 17
TCP_CHECKSUM: Final = 16
"""Where the checksum is in a TCP header, in bytes."""
UDP_CHECKSUM: Final = 6
MIN_SEGMENT: Final = 48
"""Smallest segment that a large send may be cut into, bytes of TCP payload; no stack goes lower,
and a smaller one would make thousands of frames of a single packet."""
MAX_HEADERS: Final = 1023 + 60
"""The farthest that TCP options can reach: a 10-bit offset and a header of 60 bytes."""


def ones_complement_sum(data: bytes | bytearray | memoryview) -> int:
    """RFC 1071's sum, folded to 16 bits. An odd last byte is the high half of a word.

    2**16 is 1 modulo 65535, so the bytes as one number, modulo 65535, are the sum of the words.
    0 and 0xFFFF are the same there; folding leaves 0 for nothing but zeroes.
    """
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return number % 0xFFFF or (0xFFFF if number else 0)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The Internet checksum of ``data``."""
    return 0xFFFF - ones_complement_sum(data)


def network_layer(head: bytes | bytearray) -> tuple[int, int]:
    """``(ethertype, offset)`` behind the Ethernet header and one 802.1Q tag; (0, 0): too short."""
    if len(head) < ETHERNET_SIZE:
        return 0, 0
    if head[12:14] == VLAN_TAG:
        if len(head) < ETHERNET_SIZE + VLAN_SIZE:
            return 0, 0
        return head[16] << 8 | head[17], ETHERNET_SIZE + VLAN_SIZE
    return head[12] << 8 | head[13], ETHERNET_SIZE


def insert_tag(head: bytes | bytearray, tag: int) -> bytes:
    """The head of the same frame with an 802.1Q tag behind the addresses."""
    return bytes(head[:12]) + VLAN_TAG + tag.to_bytes(2, "big") + bytes(head[12:])


def checksum_offload(head: bytes, length: int, wanted: ppi.SendChecksum) -> tuple[bytes, Offload]:
    """What the guest left to be computed, with the head to send in place of the guest's.

    The pseudo-header's sum is in the checksum field already (NDIS asks for that, Linux does it).
    ``length`` is the frame's. Raises :class:`FrameError`.
    """
    ethertype, network = network_layer(head)
    if wanted.ipv4 == wanted.ipv6 or ethertype != (IPV4 if wanted.ipv4 else IPV6):
        raise FrameError("ethertype", ethertype, 12, "not what the checksum is wanted for")
    if wanted.ip_header and wanted.ipv4:
        head = _with_header_checksum(head, network)
    if wanted.tcp == wanted.udp:
        if wanted.tcp:
            raise FrameError("transmit", 12, 0, "both a TCP and a UDP checksum")
        return head, Offload()
    start = wanted.transport_offset
    if not start:
        start = network + (_ipv4_header_length(head, network) if wanted.ipv4 else 40)
    smallest = network + (20 if wanted.ipv4 else 40)
    offset, size = (TCP_CHECKSUM, 20) if wanted.tcp else (UDP_CHECKSUM, 8)
    if start < smallest or start + size > length:
        raise FrameError("tcp_header_offset", start, 0, f"of a frame of {length} bytes")
    return head, Offload(needs_checksum=True, start=start, offset=offset)


def _ipv4_header_length(head: bytes | bytearray, network: int) -> int:
    if len(head) < network + 20:
        raise FrameError("length", len(head), 0, "no IPv4 header")
    size = (head[network] & 0x0F) * 4
    if head[network] >> 4 != 4 or size < 20 or network + size > len(head):
        raise FrameError("version_ihl", head[network], network)
    return size


def _with_header_checksum(head: bytes | bytearray, network: int) -> bytes:
    size = _ipv4_header_length(head, network)
    header = bytearray(head)
    header[network + 10 : network + 12] = b"\0\0"
    value = checksum(header[network : network + size])
    header[network + 10 : network + 12] = value.to_bytes(2, "big")
    return bytes(header)


def segmentation_offload(head: bytes, length: int, wanted: ppi.LargeSend) -> tuple[bytes, Offload]:
    """A large send as a virtio-net header describes it, with the head to send.

    The guest leaves the IP length 0 and the pseudo-header's sum without the length in it; a TAP
    device wants both right. ``head`` has all headers, up to :data:`MAX_HEADERS` bytes. Raises
    :class:`FrameError`.
    """
    ethertype, network = network_layer(head)
    if not wanted.version2:
        raise FrameError("type", 0, 0, "a large send of version 1")
    if ethertype != (IPV6 if wanted.ipv6 else IPV4):
        raise FrameError("ethertype", ethertype, 12, "not what is to be segmented")
    start = wanted.transport_offset
    header = bytearray(head)
    if wanted.ipv6:
        if start < network + 40 or len(header) < start:
            raise FrameError("tcp_header_offset", start, 0)
        size = length - network - 40
        _fits_16_bits(size)
        header[network + 4 : network + 6] = size.to_bytes(2, "big")
        addresses = header[network + 8 : network + 40]
    else:
        if start != network + _ipv4_header_length(header, network):
            raise FrameError("tcp_header_offset", start, 0, "not behind the IPv4 header")
        if header[network + 9] != TCP:
            raise FrameError("protocol", header[network + 9], network + 9)
        size = length - network
        _fits_16_bits(size)
        header[network + 2 : network + 4] = size.to_bytes(2, "big")
        header[:] = _with_header_checksum(header, network)
        addresses = header[network + 12 : network + 20]
    if len(header) < start + 20:
        raise FrameError("length", len(header), 0, "no TCP header")
    end = start + (header[start + 12] >> 4) * 4
    if end < start + 20 or end > length or end > len(header):
        raise FrameError("data_offset", header[start + 12], start + 12)
    if wanted.segment_size < MIN_SEGMENT:
        raise FrameError("mss", wanted.segment_size, 0, f"less than {MIN_SEGMENT}")
    pseudo = ones_complement_sum(addresses) + TCP + (length - start)
    pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
    pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
    header[start + TCP_CHECKSUM : start + TCP_CHECKSUM + 2] = pseudo.to_bytes(2, "big")
    offload = Offload(needs_checksum=True, start=start, offset=TCP_CHECKSUM)
    if length - end > wanted.segment_size:
        offload = Offload(
            needs_checksum=True,
            start=start,
            offset=TCP_CHECKSUM,
            gso=Gso.TCPV6 if wanted.ipv6 else Gso.TCPV4,
            segment_size=wanted.segment_size,
            header_length=end,
        )
    return bytes(header), offload


def _fits_16_bits(size: int) -> None:
    if not 0 < size <= 0xFFFF:
        raise FrameError("length", size, 0, "no IP packet has this length")


def completed_checksum(frame: bytes, offload: Offload) -> tuple[int, bytes] | None:
    """``(position, bytes)`` that complete a received frame's checksum; None if it says nonsense.

    ``frame`` is all of it. The sum of the pseudo-header is in the field.
    """
    at = offload.start + offload.offset
    if not 0 < offload.start < len(frame) or at + 2 > len(frame):
        return None
    value = checksum(frame[offload.start :])
    if not value and offload.offset == UDP_CHECKSUM:
        value = 0xFFFF  # 0 says in UDP that there is none
    return at, struct.pack(">H", value)


def transport(head: bytes | bytearray) -> int:
    """:data:`TCP`, :data:`UDP` or 0: what an unfragmented IP packet carries right behind IP."""
    ethertype, network = network_layer(head)
    if ethertype == IPV4 and len(head) >= network + 20:
        fragment = (head[network + 6] << 8 | head[network + 7]) & 0x3FFF
        protocol = 0 if fragment else head[network + 9]
    elif ethertype == IPV6 and len(head) >= network + 40:
        protocol = head[network + 6]
    else:
        return 0
    return protocol if protocol in (TCP, UDP) else 0
