# SPDX-License-Identifier: GPL-2.0-or-later
"""Per-packet information: what stands beside a frame in an RNDIS packet message.

Layouts: Linux ``hyperv_net.h``, ``struct rndis_per_packet_info`` and the unions behind it. A chain
of elements: ``size u32, type u31 + internal u1, offset u32``, data from ``offset`` (counted from
the element) up to ``size``. Every element that is understood here has 4 bytes of data.

Invariants: parsing goes forward by at least an element's header each time; nothing but
:class:`PacketInfoError` is raised; elements that are not understood are skipped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from vhostvmbus.devices.net.errors import PacketInfoError

HEADER_SIZE: Final = 12
ELEMENT_SIZE: Final = 16
"""A header and 4 bytes of data."""
MAX_SIZE: Final = 1024
"""Longest chain taken, in bytes. Linux sends at most 64, Windows a few hundred."""
INTERNAL: Final = 1 << 31
"""In the type field: a type of RNDIS's own, not of NDIS."""

CHECKSUM: Final = 0
LARGE_SEND: Final = 2
VLAN: Final = 6
HASH_VALUE: Final = 8
PACKET_ID: Final = INTERNAL | 1

_ELEMENT = struct.Struct("<IIII")
_HEADER = struct.Struct("<III")
_U32 = struct.Struct("<I")
_WANTED = {CHECKSUM: "checksum", LARGE_SEND: "large_send", VLAN: "vlan", HASH_VALUE: "hash"}


@dataclass(slots=True)
class PacketInfo:
    """The 4 bytes of each element that came, as a number; None: it did not."""

    checksum: int | None = None
    large_send: int | None = None
    vlan: int | None = None
    hash: int | None = None


def parse(data: bytes) -> PacketInfo:
    """The chain in ``data``, all of it, private memory. Raises :class:`PacketInfoError`."""
    found = PacketInfo()
    at, end = 0, len(data)
    if end > MAX_SIZE:
        raise PacketInfoError("per_pkt_info_len", end, 0, f"at most {MAX_SIZE}")
    while at < end:
        if end - at < HEADER_SIZE:
            raise PacketInfoError("size", end - at, at, "the chain ends inside an element")
        size, kind, offset = _HEADER.unpack_from(data, at)
        if size < HEADER_SIZE or size > end - at:
            raise PacketInfoError("size", size, at, f"{end - at} bytes are left")
        if offset < HEADER_SIZE or offset > size:
            raise PacketInfoError("ppi_offset", offset, at + 8)
        name = _WANTED.get(kind)
        if name is not None:
            if size - offset < 4:
                raise PacketInfoError("size", size, at, f"no data for type {kind}")
            if getattr(found, name) is not None:
                raise PacketInfoError("type", kind, at + 4, "a second time")
            setattr(found, name, _U32.unpack_from(data, at + offset)[0])
        at += size
    return found


def element(kind: int, value: int) -> bytes:
    """One element with 4 bytes of data."""
    return _ELEMENT.pack(ELEMENT_SIZE, kind, HEADER_SIZE, value)


# -- what the 4 bytes say -------------------------------------------------------------------------


class SendChecksum(NamedTuple):
    """``ndis_tcp_ip_checksum_info.transmit``: what the guest left to be computed."""

    ipv4: bool
    ipv6: bool
    tcp: bool
    udp: bool
    ip_header: bool
    transport_offset: int
    """Bytes from the start of the frame to the TCP or UDP header."""


class LargeSend(NamedTuple):
    """``ndis_tcp_lso_info.lso_v2_transmit``: a segment to be cut into frames."""

    segment_size: int
    """Bytes of TCP payload in each frame."""
    transport_offset: int
    version2: bool
    ipv6: bool


def send_checksum(value: int) -> SendChecksum:
    """Decodes the data of a CHECKSUM element of the guest."""
    return SendChecksum(
        bool(value & 1),
        bool(value & 2),
        bool(value & 4),
        bool(value & 8),
        bool(value & 16),
        value >> 16 & 0x3FF,
    )


def large_send(value: int) -> LargeSend:
    """Decodes the data of a LARGE_SEND element of the guest."""
    return LargeSend(value & 0xFFFFF, value >> 20 & 0x3FF, bool(value >> 30 & 1), bool(value >> 31))


def vlan_tag(value: int) -> int:
    """The 802.1Q tag control information that the data of a VLAN element says.

    NDIS has priority in bits 0-2, CFI in bit 3, the id in bits 4-15; the wire has them in the
    opposite order.
    """
    return (value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF


def vlan_value(tag: int) -> int:
    """The data of a VLAN element for an 802.1Q tag control information."""
    return tag >> 13 | (tag >> 12 & 1) << 3 | (tag & 0xFFF) << 4


TCP_VALID: Final = 1 << 3
"""``receive.tcp_checksum_succeeded``."""
UDP_VALID: Final = 1 << 4
"""``receive.udp_checksum_succeeded``."""
SUBALLOCATED: Final = 1
FIRST_FRAGMENT: Final = 2
LAST_FRAGMENT: Final = 4


def fragment(number: int, count: int, packet: int) -> bytes:
    """A PACKET_ID element: this message has part ``number`` of ``count`` of a frame."""
    flags = SUBALLOCATED
    flags |= FIRST_FRAGMENT if number == 0 else 0
    flags |= LAST_FRAGMENT if number == count - 1 else 0
    return element(PACKET_ID, 1 | flags << 8 | (packet & 0xFFFF) << 16)
