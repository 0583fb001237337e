# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from the guest to the link: out of the RNDIS messages of one packet.

A packet's bytes are a send section, pages, or one after the other: Linux puts the messages that it
gathered, and the last one's header, into the section, and the last one's frame stays in pages.

Invariants: message headers, per-packet information and every frame header that is looked at are
private copies; a frame's other bytes go from the guest's pages to the link without one. The frames
in front of a malformed message are sent, those behind it are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vhostvmbus.devices.net import frame, ppi, rndis
from vhostvmbus.devices.net.errors import FrameError, RndisError
from vhostvmbus.devices.net.link import PLAIN, Buffer, Offload
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.ppi import PacketInfo
from vhostvmbus.devices.net.statistics import Counters
from vhostvmbus.memory import ExternalData

HEAD = 256
"""Bytes of each message that are copied at once: RNDIS header, information, frame headers."""
COPY_BELOW = 4096
"""Frames of fewer bytes in pages are copied: that costs less than a view of them."""
MAX_FRAME = 65535 + frame.ETHERNET_SIZE

Send = Callable[[Sequence[Buffer], Offload], bool]


class Stream:
    """The bytes of one packet: ``section``, private memory, and then ``external``."""

    __slots__ = ("_external", "_section", "length")

    def __init__(self, section: bytes, external: ExternalData | None) -> None:
        self._section = section
        self._external = external
        self.length = len(section) + (0 if external is None else len(external))

    def copy(self, start: int, length: int) -> bytes:
        """A private copy of bytes, fewer at the end."""
        here = len(self._section)
        length = min(length, self.length - start)
        if start + length <= here:
            return self._section[start : start + length]
        assert self._external is not None
        if start >= here:
            return self._external.read(start - here, length)
        return self._section[start:] + self._external.read(0, start + length - here)

    def pieces(self, start: int, length: int) -> list[Buffer]:
        """The bytes as pieces, those in pages without a copy if there are many."""
        here = len(self._section)
        if start + length <= here:
            return [memoryview(self._section)[start : start + length]]
        pieces: list[Buffer] = []
        if start < here:
            pieces.append(memoryview(self._section)[start:])
            length -= here - start
            start = here
        assert self._external is not None
        if length < COPY_BELOW:
            pieces.append(self._external.read(start - here, length))
        else:
            pieces.extend(self._external.views(start - here, length))
        return pieces


def send_packet(stream: Stream, adapter: Adapter, send: Send, counters: Counters) -> None:
    """Sends every frame of a packet. Raises a :class:`NetError` for the first malformed one."""
    at = count = 0
    while at < stream.length:
        count += 1
        if count > rndis.MAX_PACKETS_PER_MESSAGE:
            raise RndisError("messages", count, at, "more than announced")
        head = stream.copy(at, HEAD)
        layout = rndis.packet_layout(head, stream.length - at)
        _send_frame(stream, at, head, layout, adapter, send, counters)
        at += layout.length
    if not count:
        raise RndisError("length", 0, 0, "no message")


def _send_frame(
    stream: Stream,
    at: int,
    head: bytes,
    layout: rndis.PacketLayout,
    adapter: Adapter,
    send: Send,
    counters: Counters,
) -> None:
    info = PacketInfo()
    if layout.info_length:
        end = layout.info_offset + layout.info_length
        if end > len(head):
            head = stream.copy(at, max(end, HEAD))
        info = ppi.parse(head[layout.info_offset : end])
    length = layout.data_length
    limit = MAX_FRAME if info.large_send is not None else adapter.mtu + frame.ETHERNET_SIZE
    # A tag may be in the frame, or beside it.
    if not frame.ETHERNET_SIZE <= length <= limit + frame.VLAN_SIZE:
        raise FrameError("data_len", length, 12, f"{frame.ETHERNET_SIZE} to {limit}")
    start = at + layout.data_offset
    offload = PLAIN
    destination = head[layout.data_offset : layout.data_offset + 6]
    if info.checksum is None and info.large_send is None and info.vlan is None:
        pieces = stream.pieces(start, length)
        if len(destination) < 6:
            destination = stream.copy(start, 6)
    else:
        headers = head[layout.data_offset : layout.data_offset + length]
        wanted = min(length, _headers_length(info))
        if len(headers) < wanted:
            headers = stream.copy(start, wanted)
        copied = len(headers)
        destination = headers[:6]
        headers, offload = _offload(headers, length, info, adapter)
        pieces = [headers]
        if copied < length:
            pieces += stream.pieces(start + copied, length - copied)
        if info.vlan is not None:
            length += frame.VLAN_SIZE
        if offload.gso:
            counters.large_sends += 1
    if send(pieces, offload):
        counters.sent.count(destination, length)
    else:
        counters.send_refused += 1


def _headers_length(info: PacketInfo) -> int:
    """How many bytes of the frame have to be looked at."""
    if info.large_send is not None:
        return min(ppi.large_send(info.large_send).transport_offset + 60, frame.MAX_HEADERS)
    return frame.ETHERNET_SIZE + frame.VLAN_SIZE + 60 if info.checksum is not None else 14


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
