# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from the guest to the link: out of the RNDIS messages of one packet.

A packet's bytes are a send section, pages, or one after the other: Linux puts the messages that it
gathered, and the last one's header, into the section, and the last one's frame stays in pages. All
of them come here as one private copy: that costs less than views of a large send's pages do.

Invariants: what was looked at is what is sent; the frames in front of a malformed message are sent,
those behind it are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vhostvmbus.devices.net import frame, ppi, rndis
from vhostvmbus.devices.net.errors import FrameError, RndisError
from vhostvmbus.devices.net.link import PLAIN, Buffer, Offload
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.ppi import PacketInfo
from vhostvmbus.devices.net.statistics import Counters

_NO_INFO = PacketInfo()
MAX_FRAME = 65535 + frame.ETHERNET_SIZE

Send = Callable[[Sequence[Buffer], Offload], bool]


def send_packet(data: bytes, adapter: Adapter, send: Send, counters: Counters) -> None:
    """Sends every frame of a packet. Raises a :class:`NetError` for the first malformed one."""
    at = count = 0
    end = len(data)
    view = memoryview(data)
    while at < end:
        count += 1
        if count > rndis.MAX_PACKETS_PER_MESSAGE:
            raise RndisError("messages", count, at, "more than announced")
        layout = rndis.packet_layout(data, end - at, at)
        start = at + layout.data_offset
        length = layout.data_length
        info = _NO_INFO
        if layout.info_length:
            begin = at + layout.info_offset
            info = ppi.parse(data[begin : begin + layout.info_length])
        limit = MAX_FRAME if info.large_send is not None else adapter.longest
        # A tag may be in the frame, or beside it.
        if not frame.ETHERNET_SIZE <= length <= limit + frame.VLAN_SIZE:
            raise FrameError("data_len", length, 12, f"{frame.ETHERNET_SIZE} to {limit}")
        offload = PLAIN
        pieces: list[Buffer]
        if info is _NO_INFO:
            pieces = [view[start : start + length]]
        else:
            headers = data[start : start + min(length, frame.MAX_HEADERS)]
            copied = len(headers)
            headers, offload = _offload(headers, length, info, adapter)
            pieces = [headers, view[start + copied : start + length]]
        if send(pieces, offload):
            counters.sent.count(data[start : start + 6], length)
            if offload.gso:
                counters.large_sends += 1
        else:
            counters.send_refused += 1
        at += layout.length
    if not count:
        raise RndisError("length", 0, 0, "no message")


def _offload(
    headers: bytes, length: int, info: PacketInfo, adapter: Adapter
) -> tuple[bytes, Offload]:
    """The headers to send, and what the link has still to do. Raises :class:`FrameError`."""
    offload = PLAIN
    enabled = adapter.offloads
    if info.large_send is not None:
        large = ppi.large_send(info.large_send)
        if not (enabled.lso6 if large.ipv6 else enabled.lso4):
            raise FrameError("type", info.large_send, 0, "large sends are not switched on")
        headers, offload = frame.segmentation_offload(headers, length, large)
    elif info.checksum is not None:
        wanted = ppi.send_checksum(info.checksum)
        allowed = (
            (not wanted.ip_header or wanted.ipv6 or enabled.ip_checksum)
            and (not wanted.tcp or (enabled.tcp6_send if wanted.ipv6 else enabled.tcp4_send))
            and (not wanted.udp or (enabled.udp6_send if wanted.ipv6 else enabled.udp4_send))
        )
        if not allowed:
            raise FrameError("transmit", info.checksum, 0, "checksums are not switched on")
        headers, offload = frame.checksum_offload(headers, length, wanted)
    if info.vlan is not None:
        headers = frame.insert_tag(headers, ppi.vlan_tag(info.vlan))
        if offload is not PLAIN:
            shift = frame.VLAN_SIZE
            offload = Offload(
                offload.needs_checksum,
                False,
                offload.start + shift if offload.needs_checksum else 0,
                offload.offset,
                offload.gso,
                offload.segment_size,
                offload.header_length + shift if offload.gso else 0,
            )
    return headers, offload
