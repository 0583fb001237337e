# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage driver in software: what a guest's ``hv_storvsc`` does, on a channel of the guest.

Packs and reads vstor packets by itself (layouts: Linux ``drivers/scsi/storvsc_drv.c``), so that
a test with it does not agree with a device merely because both share code.

Invariants: the pages of a request are the guest's until it is completed or its channel is gone;
a completion that a stock driver would drop (too short, wrong operation) raises :class:`BadAnswer`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhostvmbus.guest.channel import TIMEOUT, GuestChannel
from vhostvmbus.guest.errors import GuestSideError
from vhostvmbus.guest.software_guest import SoftwareGuest
from vhostvmbus.guest.transactions import Transaction
from vhostvmbus.wire.gpa import GpaRange, pfn_count

BEGIN, END, QUERY_VERSION, QUERY_PROPERTIES = 7, 8, 9, 10
EXECUTE_SRB, RESET_LUN, RESET_ADAPTER, RESET_BUS, ENUMERATE_BUS = 3, 4, 5, 6, 11
CREATE_SUB_CHANNELS = 13
LINUX_VERSIONS = (0x0602, 0x0600, 0x0501)
"""The versions that Linux 6.1 asks for, in its order."""
LONG, SHORT = 64, 48
"""Packet lengths: from protocol 5.1 on, and before."""

_REQUEST = struct.Struct("<IIIHBBBBBBBBBBI16s4s")


class BadAnswer(GuestSideError):
    """The host completed a packet with bytes that a driver could not use."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The host's answer to a request, and the data that came with it."""

    status: int
    """NTSTATUS of the packet."""
    srb_status: int
    """With its flag bits: 01h success, 84h error with sense data, 20h no such LUN."""
    scsi_status: int
    transferred: int
    """Bytes, of those asked for."""
    sense: bytes
    data: bytes
    """All bytes of the data buffer as they are now."""

    @property
    def good(self) -> bool:
        """Tells whether the request succeeded in every respect."""
        return (self.status, self.srb_status, self.scsi_status) == (0, 1, 0)

    @property
    def sense_code(self) -> tuple[int, int, int]:
        """Sense key, additional sense code, qualifier (fixed format)."""
        return self.sense[2] & 0x0F, self.sense[12], self.sense[13]


@dataclass(slots=True)
class PendingRequest:
    """A request that is under way."""

    driver: Storvsc
    transaction: Transaction
    ranges: list[GpaRange] = field(default_factory=list)

    def wait(self, timeout: float = TIMEOUT) -> Completion:
        """Returns the request's completion; the pages are given back."""
        try:
            answer = self.transaction.wait(timeout)
            data = self.driver.gather(self.ranges)
        finally:
            if self.transaction.done:
                self.release()
        return self.driver.decode(answer, data)

    def release(self) -> None:
        """Gives the pages back without looking at them."""
        for item in self.ranges:
            self.driver.guest.ram.free_pages(item.pfns)
        self.ranges = []


class Storvsc:
    """The driver of one controller.  ``channel`` is open; :meth:`initialize` comes first."""

    def __init__(self, guest: SoftwareGuest, channel: GuestChannel) -> None:
        self.guest = guest
        self.channel = channel
        self.version = 0
        self.max_transfer_bytes = 0
        self.max_sub_channels = 0
        self.packet_size = LONG

    # ---- initialization ----

    def control(self, operation: int, body: bytes = b"") -> bytes:
        """Sends an in-band control packet; returns the completing packet. Raises
        :class:`BadAnswer`.
        """
        packet = struct.pack("<III", operation, 1, 0) + body
        answer = self.channel.send(packet.ljust(self.packet_size, b"\0"))
        if len(answer) < self.packet_size or answer[:4] != b"\x01\0\0\0":
            raise BadAnswer(f"operation {operation} was answered with {answer.hex(' ')}")
        return answer

    def initialize(self, versions: Sequence[int] = LINUX_VERSIONS) -> int:
        """Does the handshake, offering ``versions`` in their order; returns the accepted one."""
        self.packet_size = SHORT if max(versions) < 0x0501 else LONG
        self._must(BEGIN)
        for version in versions:
            answer = self.control(QUERY_VERSION, struct.pack("<HH", version, 0))
            if answer[8:12] == bytes(4):
                self.version = version
                break
        else:
            raise BadAnswer("the host accepts no version")
        self.packet_size = LONG if self.version >= 0x0501 else SHORT
        properties = self._must(QUERY_PROPERTIES)
        self.max_sub_channels = struct.unpack_from("<H", properties, 16)[0]
        self.max_transfer_bytes = struct.unpack_from("<I", properties, 24)[0]
        self._must(END)
        return self.version

    def create_sub_channels(self, count: int, **options: object) -> list[Storvsc]:
        """Opens so many subchannels, as drivers of their own: whichever a request goes to.

        Raises :class:`BadAnswer` if the host does not offer them; ``options`` as for ``enable``.
        """
        before = set(self.guest.offered)
        self._must(CREATE_SUB_CHANNELS, struct.pack("<H", count))
        drivers = []
        for index in range(1, count + 1):
            self.guest.wait_for_offer(index)
            if index in before:
                continue
            channel = self.guest.enable(index, **options)  # type: ignore[arg-type]
            driver = Storvsc(self.guest, channel)
            driver.version, driver.packet_size = self.version, self.packet_size
            drivers.append(driver)
        return drivers

    def _must(self, operation: int, body: bytes = b"") -> bytes:
        answer = self.control(operation, body)
        if answer[8:12] != bytes(4):
            raise BadAnswer(f"operation {operation} failed: {answer[8:12][::-1].hex()}")
        return answer

    # ---- requests ----

    def packet(
        self, cdb: bytes, *, lun: int = 0, target: int = 0, size: int = 0, direction: int = 2
    ) -> bytes:
        """Returns an EXECUTE_SRB packet. ``direction``: 0 write, 1 read, 2 neither."""
        flags = {0: 0x88, 1: 0x48, 2: 0x08}[direction]
        length, room = (52, 20) if self.packet_size == LONG else (36, 18)
        packet = _REQUEST.pack(
            EXECUTE_SRB, 1, 0, length, 0, 0, 0, 0, target, lun, len(cdb), room, direction, 0,
            size, cdb, b"",
        )  # fmt: skip
        if self.packet_size == LONG:
            packet += struct.pack("<HBBIII", 0, 0xFF, 0x20, flags, 60, 0)
        return packet

    def submit(
        self,
        cdb: bytes,
        *,
        lun: int = 0,
        target: int = 0,
        data: bytes | None = None,
        room: int = 0,
        byte_offset: int = 0,
        pieces: Sequence[int] | None = None,
        timeout: float = TIMEOUT,
    ) -> PendingRequest:
        """Sends a command; ``data`` goes to the device, or up to ``room`` bytes come from it.

        The buffer lies in scattered pages, ``byte_offset`` into the first.  ``pieces`` are the
        byte counts of several GPA ranges (each begins ``byte_offset`` into its first page).
        """
        size = room if data is None else len(data)
        direction = 2 if not size else 1 if data is None else 0
        packet = self.packet(cdb, lun=lun, target=target, size=size, direction=direction)
        if not size:
            return PendingRequest(self, self.channel.submit(packet, timeout=timeout))
        ranges = []
        for piece in pieces or (size,):
            pfns = self.guest.ram.alloc_pages(pfn_count(byte_offset, piece))
            ranges.append(GpaRange(piece, byte_offset, pfns))
        request = PendingRequest(self, None, ranges)  # type: ignore[arg-type]
        try:
            self._scatter(ranges, bytes(size) if data is None else data)
            request.transaction = self.channel.submit_with_external_ranges(
                packet, ranges, timeout=timeout
            )
        except BaseException:
            request.release()
            raise
        return request

    def command(self, cdb: bytes | str, **options: object) -> Completion:
        """Sends a command as :meth:`submit` does and waits; the CDB may be written as hex."""
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        return self.submit(raw, **options).wait()  # type: ignore[arg-type]

    def read(self, lba: int, blocks: int, *, lun: int = 0, byte_offset: int = 0) -> PendingRequest:
        """Sends READ(16) and does not wait for it."""
        cdb = struct.pack(">BBQIxx", 0x88, 0, lba, blocks)
        return self.submit(cdb, lun=lun, room=blocks * 512, byte_offset=byte_offset)

    def write(
        self, lba: int, data: bytes, *, lun: int = 0, byte_offset: int = 0, fua: bool = False
    ) -> PendingRequest:
        """Sends WRITE(16) and does not wait for it."""
        cdb = struct.pack(">BBQIxx", 0x8A, 8 if fua else 0, lba, len(data) // 512)
        return self.submit(cdb, lun=lun, data=data, byte_offset=byte_offset)

    def flush(self, *, lun: int = 0) -> Completion:
        """Does SYNCHRONIZE CACHE(10) of the whole unit."""
        return self.command("35" + "00" * 9, lun=lun)

    def unmap(self, lba: int, blocks: int, *, lun: int = 0) -> Completion:
        """Does UNMAP of one extent."""
        parameters = struct.pack(">HH4xQI4x", 22, 16, lba, blocks)
        return self.command("42" + "00" * 6 + "0018" + "00", lun=lun, data=parameters)

    # ---- answers ----

    def gather(self, ranges: Sequence[GpaRange]) -> bytes:
        """Returns the bytes that ranges describe."""
        ram = self.guest.ram
        return b"".join(ram.read(item.pfns, item.byte_offset, item.byte_count) for item in ranges)

    def _scatter(self, ranges: Sequence[GpaRange], data: bytes) -> None:
        for item in ranges:
            part, data = data[: item.byte_count], data[item.byte_count :]
            self.guest.ram.write(item.pfns, part, item.byte_offset)

    def decode(self, answer: bytes, data: bytes = b"") -> Completion:
        """Returns what a completing packet says. Raises :class:`BadAnswer`."""
        if len(answer) < self.packet_size:
            raise BadAnswer(f"a completion of {len(answer)} bytes")
        operation, _, status, _, srb_status, scsi_status = struct.unpack_from("<IIIHBB", answer)
        if operation != 1:
            raise BadAnswer(f"a completion with operation {operation}")
        sense_length = answer[21]
        transferred = struct.unpack_from("<I", answer, 24)[0]
        sense = answer[28 : 28 + sense_length]
        if srb_status & 0x80 and not sense_length:
            raise BadAnswer("autosense without sense data")
        return Completion(status, srb_status, scsi_status, transferred, sense, data)
