# SPDX-License-Identifier: GPL-2.0-or-later
"""A network driver in software: what a guest's ``hv_netvsc`` does, on channels of the guest.

Packs and reads NVSP and RNDIS by itself (layouts: Linux ``drivers/net/hyperv/hyperv_net.h``), so
that a test with it does not agree with a device merely because both share code.

Invariants: a send section or pages are the guest's until the packet is completed; whatever a stock
driver would drop or refuse raises :class:`BadNetPacket`; receive sections are returned at once,
unless :attr:`Netvsc.keep` says otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhostvmbus.guest.channel import TIMEOUT, GuestChannel
from vhostvmbus.guest.errors import GuestSideError, ReceiveTimeout
from vhostvmbus.guest.gpadl import GuestGpadl
from vhostvmbus.guest.software_guest import SoftwareGuest
from vhostvmbus.guest.transactions import HostPacket, Transaction
from vhostvmbus.wire.gpa import GpaRange, pfn_count
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

VERSIONS = (0x60001, 0x60000, 0x50000, 0x40000, 0x30002, 0x00002)
"""NVSP versions as Linux tries them: 6.1, 6, 5, 4, 2, 1."""
RECEIVE_ID, SEND_ID = 0xCAFE, 0
NO_SECTION = 0xFFFFFFFF
VLAN_CAPABLE, RSC_CAPABLE = 0x08, 0x80
NVSP_SIZE = 40
"""The bytes of this driver's messages; the host's may be shorter."""
COMPLETE_RNDIS = 108
CHECKSUM, LARGE_SEND, VLAN, HASH, PACKET_ID = 0, 2, 6, 8, 0x80000001
"""Types of per-packet information."""
DIRECTED, MULTICAST, ALL_MULTICAST, BROADCAST, PROMISCUOUS = 1, 2, 4, 8, 0x20
QUERY, SET, KEEPALIVE, RESET = 4, 5, 8, 6
DONE = 0x80000000


class BadNetPacket(GuestSideError):
    """The host sent a packet that a driver could not use."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame; ``info`` is the per-packet information by type."""

    data: bytes
    info: dict[int, int]
    channel: int
    parts: int = 1


@dataclass(slots=True)
class Sending:
    """A packet with frames that is under way."""

    driver: Netvsc
    transaction: Transaction
    section: int | None
    ranges: list[GpaRange] = field(default_factory=list)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Returns the status in the packet's completion, 1 for success; section and pages are free
        again.
        """
        try:
            answer = self.transaction.wait(timeout)
        finally:
            if self.transaction.done:
                self.release()
        return self.driver.completed(answer)

    def release(self) -> None:
        """Gives section and pages back."""
        if self.section is not None:
            self.driver.free_sections.append(self.section)
            self.section = None
        for item in self.ranges:
            self.driver.guest.ram.free_pages(item.pfns)
        self.ranges = []


def element(kind: int, value: int) -> bytes:
    """Returns an element of per-packet information."""
    return struct.pack("<IIII", 16, kind, 12, value)


def packet_message(frame: bytes, info: bytes = b"", padding: int = 0) -> bytes:
    """Returns an RNDIS packet message as Linux lays it out: information right behind the header."""
    head = 44 + len(info)
    fields = (1, head + len(frame) + padding, head - 8, len(frame), 0, 0, 0, 36, len(info), 0, 0)
    return struct.pack("<11I", *fields) + info + frame + bytes(padding)


class Netvsc:
    """The driver of one card.  ``channel`` is the open primary one."""

    def __init__(self, guest: SoftwareGuest, channel: GuestChannel) -> None:
        self.guest = guest
        self.channel = channel
        self.channels: dict[int, GuestChannel] = {0: channel}
        self.version = 0
        self.receive_gpadl: GuestGpadl | None = None
        self.send_gpadl: GuestGpadl | None = None
        self.receive_section = 0
        self.receive_sections = 0
        self.send_section = 0
        self.free_sections: deque[int] = deque()
        self.frames: deque[Frame] = deque()
        self.indications: list[int] = []
        """Status values that the host indicated."""
        self.indicated: list[bytes] = []
        """The information that came with each."""
        self.send_table: tuple[int, ...] = ()
        self.keep = False
        """Set if receive sections are kept, in :attr:`kept`."""
        self.kept: list[HostPacket] = []
        self.transfer_packets = 0
        """Packets with frames, each of one or more."""
        self._request_ids = itertools.count(1)
        self._answers: dict[int, tuple[int, bytes]] = {}

    # ---- NVSP ----

    def nvsp(self, kind: int, body: bytes = b"", *, wait: bool = True) -> bytes:
        """Sends an NVSP message of 40 bytes; returns its completion, if waited for."""
        message = (struct.pack("<I", kind) + body).ljust(NVSP_SIZE, b"\0")
        return self.channel.send(message, wait=wait)

    def negotiate(self, version: int) -> bool:
        """Sends INIT with one version; returns whether the host takes it."""
        answer = self.nvsp(1, struct.pack("<II", version, version))
        kind, chosen, _, status = struct.unpack_from("<IIII", answer)
        if kind != 2 or len(answer) < 28:
            raise BadNetPacket(f"INIT was answered with {answer.hex(' ')}")
        if status != 1:
            return False
        if chosen != version:
            raise BadNetPacket(f"version {version:#x} was asked for, {chosen:#x} answered")
        self.version = version
        return True

    def configure(self, mtu: int = 1500, capabilities: int = VLAN_CAPABLE) -> None:
        """Sends SEND_NDIS_CONFIG (from version 2) and SEND_NDIS_VERSION, neither answered."""
        if self.version > 2:
            self.nvsp(125, struct.pack("<IIQ", mtu + 14, 0, capabilities), wait=False)
        minor = 0x1E if self.version >= 0x50000 else 1
        self.nvsp(100, struct.pack("<II", 6, minor), wait=False)

    def lend_receive_buffer(self, size: int = 1 << 20) -> bytes:
        """Sends SEND_RECEIVE_BUFFER of ``size`` bytes; returns the completion, also kept as
        attributes.
        """
        self.receive_gpadl = self.guest.create_gpadl(-(-size // PAGE_SIZE))
        answer = self.nvsp(101, struct.pack("<IH", self.receive_gpadl.gpadl_id, RECEIVE_ID))
        kind, status, runs, offset, section, count, end = struct.unpack_from("<7I", answer)
        if kind != 102:
            raise BadNetPacket(f"a receive buffer was answered with {answer.hex(' ')}")
        if status == 1:
            total = len(self.receive_gpadl.owned_pfns) * PAGE_SIZE
            if runs != 1 or offset or section < 68 or section * count > total or end > total:
                raise BadNetPacket(f"{runs} runs of {count} sections of {section} bytes")
            self.receive_section, self.receive_sections = section, count
        return answer

    def lend_send_buffer(self, size: int = 1 << 18) -> bytes:
        """Sends SEND_SEND_BUFFER of ``size`` bytes; returns the completion."""
        self.send_gpadl = self.guest.create_gpadl(-(-size // PAGE_SIZE))
        answer = self.nvsp(104, struct.pack("<IH", self.send_gpadl.gpadl_id, SEND_ID))
        kind, status, section = struct.unpack_from("<III", answer)
        if kind != 105:
            raise BadNetPacket(f"a send buffer was answered with {answer.hex(' ')}")
        if status == 1:
            self.send_section = section
            total = len(self.send_gpadl.owned_pfns) * PAGE_SIZE
            self.free_sections = deque(range(total // section))
        return answer

    def revoke(self, receive: bool) -> None:
        """Takes a buffer back: the host is done with it when this returns, and it is freed.

        What the host had told of a receive buffer is not looked at any more.
        """
        body = struct.pack("<H", RECEIVE_ID if receive else SEND_ID)
        self.nvsp(103 if receive else 106, body)
        if receive:
            for opened in self.channels.values():
                with contextlib.suppress(ReceiveTimeout):
                    while True:
                        packet = opened.receive(0.001)
                        if packet.completion_requested:
                            self.give_back(packet)
        gpadl = self.receive_gpadl if receive else self.send_gpadl
        if gpadl is not None:
            self.guest.delete_gpadl(gpadl)
        if receive:
            self.receive_gpadl = None
        else:
            self.send_gpadl = None

    def initialize(
        self,
        *,
        versions: Sequence[int] = VERSIONS,
        mtu: int = 1500,
        capabilities: int = VLAN_CAPABLE,
        receive_bytes: int = 1 << 20,
        send_bytes: int = 1 << 18,
        packet_filter: int = DIRECTED | ALL_MULTICAST | BROADCAST,
    ) -> None:
        """Does everything that a driver does before the first frame."""
        if not any(self.negotiate(version) for version in versions):
            raise BadNetPacket("the host takes no version")
        self.configure(mtu, capabilities)
        self.lend_receive_buffer(receive_bytes)
        self.lend_send_buffer(send_bytes)
        if not self.receive_sections or not self.send_section:
            raise BadNetPacket("the host takes no buffer")
        status, body = self.request(2, struct.pack("<III", 1, 0, 0x4000))
        if status or len(body) < 36:
            raise BadNetPacket(f"RNDIS was not initialized: {status:#x}")
        if packet_filter:
            self.set(0x0001010E, struct.pack("<I", packet_filter))

    def subchannels(self, count: int) -> int:
        """Asks for subchannels; returns how many will be offered."""
        answer = self.nvsp(133, struct.pack("<II", 1, count))
        kind, status, granted = struct.unpack_from("<III", answer)
        if kind != 133:
            raise BadNetPacket(f"SUBCHANNEL was answered with {answer.hex(' ')}")
        return int(granted) if status == 1 else 0

    # ---- RNDIS requests ----

    def send_control(self, message: bytes) -> int:
        """Sends an RNDIS message on the control channel, in pages; returns the status."""
        return self._send(message, None, channel_type=1).wait()

    def request(self, kind: int, body: bytes, timeout: float = TIMEOUT) -> tuple[int, bytes]:
        """Sends a request and waits for its answer: ``(status, what follows the status)``."""
        number = next(self._request_ids)
        message = struct.pack("<III", kind, 12 + len(body), number) + body
        if self.send_control(message) != 1:
            raise BadNetPacket(f"request {kind} was not taken")
        return self.answer(number, timeout)

    def answer(self, number: int, timeout: float = TIMEOUT) -> tuple[int, bytes]:
        """Waits for the answer to request ``number``."""
        deadline = time.monotonic() + timeout
        while number not in self._answers:
            self.pump(max(0.0, deadline - time.monotonic()))
        return self._answers.pop(number)

    def query(self, oid: int, information: bytes = b"") -> bytes:
        """Returns the value of an OID. Raises :class:`BadNetPacket` with the status if refused."""
        status, value = self.try_query(oid, information)
        if status:
            raise BadNetPacket(f"query of {oid:#x}: {status:#x}")
        return value

    def try_query(self, oid: int, information: bytes = b"") -> tuple[int, bytes]:
        """Returns ``(status, value)`` of an OID."""
        body = struct.pack("<IIII", oid, len(information), 20, 0) + information
        status, rest = self.request(QUERY, body)
        size, offset = struct.unpack_from("<II", rest)
        if offset < 16 or offset - 16 + size > len(rest) - 8:
            raise BadNetPacket(f"a query's answer of {size} bytes at {offset}")
        return status, rest[offset - 8 : offset - 8 + size]

    def set(self, oid: int, information: bytes) -> int:
        """Sets an OID; returns the status."""
        body = struct.pack("<IIII", oid, len(information), 20, 0) + information
        return self.request(SET, body)[0]

    # ---- frames out ----

    def send(
        self, frame: bytes, info: bytes = b"", *, pages: bool = False, channel: int = 0
    ) -> Sending:
        """Sends a frame in a send section, or in pages: with ``pages``, if it is too long, or if no
        section is free.
        """
        message = packet_message(frame, info)
        if pages or len(message) > self.send_section or not self.free_sections:
            return self._send(message, None, channel=channel)
        return self._send(b"", message, channel=channel)

    def send_many(self, messages: Sequence[bytes], rest: bytes = b"", channel: int = 0) -> Sending:
        """Sends RNDIS messages in one section; ``rest``, the end of the last one, in pages."""
        return self._send(rest, b"".join(messages), channel=channel)

    def _send(
        self, paged: bytes, section: bytes | None, *, channel_type: int = 0, channel: int = 0
    ) -> Sending:
        number, size = NO_SECTION, 0
        if section is not None:
            if self.send_gpadl is None or len(section) > self.send_section:
                raise BadNetPacket(f"{len(section)} bytes fit no send section")
            if not self.free_sections:
                raise BadNetPacket("no send section is free: wait for a completion first")
            number, size = self.free_sections.popleft(), len(section)
            self.guest.ram.write(self.send_gpadl.owned_pfns, section, number * self.send_section)
        body = struct.pack("<IIII", 107, channel_type, number, size).ljust(NVSP_SIZE, b"\0")
        out = self.channels[channel]
        ranges: list[GpaRange] = []
        if paged:
            ranges = self._scatter(paged)
            transaction = out.submit_with_external_ranges(body, ranges)
        else:
            transaction = out.submit(body)
        return Sending(self, transaction, None if section is None else number, ranges)

    def completed(self, answer: bytes) -> int:
        """Returns the status in the completion of a packet with frames, or with a request."""
        if len(answer) < 8 or struct.unpack_from("<I", answer)[0] != COMPLETE_RNDIS:
            raise BadNetPacket(f"an RNDIS packet was completed with {answer.hex(' ')}")
        return int(struct.unpack_from("<I", answer, 4)[0])

    def _scatter(self, data: bytes) -> list[GpaRange]:
        """Returns pages with ``data``: the first bytes in one range, the rest in another, as skbs
        are.
        """
        ranges = []
        for part, offset in ((data[:60], 4096 - 30), (data[60:], 100)):
            if part:
                pfns = self.guest.ram.alloc_pages(pfn_count(offset, len(part)))
                self.guest.ram.write(pfns, part, offset)
                ranges.append(GpaRange(len(part), offset, pfns))
        return ranges

    # ---- frames in ----

    def receive(self, timeout: float = TIMEOUT) -> Frame:
        """Returns the next frame. Raises :class:`ReceiveTimeout`."""
        deadline = time.monotonic() + timeout
        while not self.frames:
            self.pump(max(0.0, deadline - time.monotonic()))
        return self.frames.popleft()

    def pump(self, timeout: float = TIMEOUT, channel: int | None = None) -> None:
        """Takes one packet of the host from any channel (or that one).

        Raises :class:`ReceiveTimeout`.
        """
        if channel is not None or len(self.channels) == 1:
            index = channel or 0
            self._dispatch(index, self.channels[index].receive(timeout))
            return
        deadline = time.monotonic() + timeout
        while True:
            for index, opened in self.channels.items():
                try:
                    self._dispatch(index, opened.receive(0.002))
                    return
                except ReceiveTimeout:
                    if time.monotonic() >= deadline:
                        raise

    def _dispatch(self, index: int, packet: HostPacket) -> None:
        raw = packet.raw
        if raw.type == PacketType.DATA_INBAND:
            self._inband(packet.payload)
            return
        if raw.type != PacketType.DATA_USING_XFER_PAGES or not packet.completion_requested:
            raise BadNetPacket(f"a packet of type {raw.type}")
        kind, channel_type = struct.unpack_from("<II", packet.payload)
        if kind != 107 or len(packet.payload) < 16:
            raise BadNetPacket(f"transfer pages with NVSP message {kind}")
        header = raw.raw[16 : raw.payload_offset]
        set_id, count = struct.unpack_from("<HxxI", header)
        if set_id != RECEIVE_ID or 8 + 8 * count > len(header) or not count:
            raise BadNetPacket(f"{count} ranges of set {set_id:#x}")
        ranges = [struct.unpack_from("<II", header, 8 + 8 * number) for number in range(count)]
        if channel_type == 0:
            self.transfer_packets += 1
            self._frames(index, [self._message(*item) for item in ranges])
        else:
            for item in ranges:
                self._control(self._message(*item))
        if self.keep:
            self.kept.append(packet)
        else:
            self.give_back(packet)

    def give_back(self, packet: HostPacket) -> None:
        """Returns the receive sections of a packet."""
        packet.complete(struct.pack("<II", COMPLETE_RNDIS, 1))

    def _message(self, size: int, offset: int) -> bytes:
        """Returns the bytes of a range, as far as the RNDIS message in it goes."""
        assert self.receive_gpadl is not None
        pfns = self.receive_gpadl.owned_pfns
        if offset + size > len(pfns) * PAGE_SIZE or not 8 <= size <= self.receive_section:
            raise BadNetPacket(f"a range of {size} bytes at {offset}")
        first, skip = divmod(offset, PAGE_SIZE)
        data = self.guest.ram.read(pfns[first : first + pfn_count(skip, size)], skip, size)
        length = struct.unpack_from("<I", data, 4)[0]
        if not 8 <= length <= size:
            raise BadNetPacket(f"an RNDIS message of {length} bytes in {size}")
        return data[:length]

    def _control(self, message: bytes) -> None:
        kind, _, number = struct.unpack_from("<III", message)
        if kind == 7:
            self.indications.append(number)
            size, offset = struct.unpack_from("<II", message, 12)
            if size and (offset < 12 or offset + 8 + size > len(message)):
                raise BadNetPacket(f"a status with {size} bytes at {offset}")
            self.indicated.append(message[offset + 8 : offset + 8 + size])
        elif kind == DONE | RESET:
            self._answers[0] = (number, message[12:])
        elif kind in (DONE | 2, DONE | QUERY, DONE | SET, DONE | KEEPALIVE):
            self._answers[number] = (struct.unpack_from("<I", message, 12)[0], message[16:])
        else:
            raise BadNetPacket(f"RNDIS message {kind:#x} on the control channel")

    def _frames(self, index: int, messages: Sequence[bytes]) -> None:
        collected, parts = b"", 0
        info: dict[int, int] = {}
        for number, message in enumerate(messages):
            data, now = self._packet(message)
            identity = now.pop(PACKET_ID, None)
            if identity is None:
                if parts:
                    raise BadNetPacket("a frame in the middle of another")
                self.frames.append(Frame(data, now, index))
                continue
            flags = identity >> 8 & 0xFF
            if not flags & 1 or bool(flags & 2) != (parts == 0):
                raise BadNetPacket(f"part {parts} of a frame has flags {flags:#x}")
            info = now if parts == 0 else info
            collected, parts = collected + data, parts + 1
            if flags & 4:
                self.frames.append(Frame(collected, info, index, parts))
                collected, parts = b"", 0
            elif number == len(messages) - 1:
                raise BadNetPacket("a frame goes on in another packet")

    def _packet(self, message: bytes) -> tuple[bytes, dict[int, int]]:
        if len(message) < 44:
            raise BadNetPacket(f"a packet message of {len(message)} bytes")
        kind, _, at, size, _, _, _, info_at, info_size, _, _ = struct.unpack_from("<11I", message)
        if kind != 1 or at < 36 or at + 8 + size > len(message):
            raise BadNetPacket(f"message {kind} with {size} bytes at {at}")
        info: dict[int, int] = {}
        if info_size:
            if info_at < 36 or info_at + 8 + info_size > len(message):
                raise BadNetPacket(f"{info_size} bytes of information at {info_at}")
            position, end = info_at + 8, info_at + 8 + info_size
            while position < end:
                length, what, skip = struct.unpack_from("<III", message, position)
                if length < 16 or skip > length - 4 or position + length > end:
                    raise BadNetPacket(f"an element of {length} bytes")
                info[what] = struct.unpack_from("<I", message, position + skip)[0]
                position += length
        return message[at + 8 : at + 8 + size], info

    def _inband(self, payload: bytes) -> None:
        kind, count, offset = struct.unpack_from("<III", payload)
        if kind != 134 or count != 16 or offset > len(payload) - 64:
            raise BadNetPacket(f"NVSP message {kind} from the host")
        self.send_table = struct.unpack_from("<16I", payload, offset)
