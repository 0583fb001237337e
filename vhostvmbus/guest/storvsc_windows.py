# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage driver in software with the ways of Windows' ``storvsc.sys`` that differ from Linux's.

From what is public about it (the protocol's sources with comments by Microsoft, its documents on
storage drivers), not from looking at a Windows guest: it wants every packet of the host to have
exactly the length of the version, asks for subchannels before it ends the initialization, may do
without autosense and fetch sense data by REQUEST SENSE, and tells an absent unit by the SRB status
with CHECK CONDITION.

Invariant: whatever such a driver would not take from a host raises :class:`BadAnswer`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.errors import ReceiveTimeout
from vhostvmbus.guest.software_guest import SoftwareGuest
from vhostvmbus.guest.storvsc import (
    BEGIN,
    END,
    ENUMERATE_BUS,
    LONG,
    QUERY_PROPERTIES,
    QUERY_VERSION,
    SHORT,
    BadAnswer,
    Completion,
    Storvsc,
)

VERSIONS = (0x0602, 0x0600, 0x0501, 0x0402, 0x0200)
"""The versions of Windows 10, 8.1, 8, 7 and Vista, in the order in which a new one asks."""
_MULTI_CHANNEL = 0x1
_DISABLE_AUTOSENSE = 0x20
_ABSENT = (0xC00000C0, 0x20, 2)
"""NTSTATUS, SRB status and SCSI status for an address without a unit."""
_TEST_UNIT_READY, _REQUEST_SENSE = bytes(6), bytes.fromhex("03 00 00 00 12 00")


class WindowsStorvsc(Storvsc):
    """The driver of one controller, or of a subchannel; :meth:`initialize` comes first."""

    def __init__(
        self, guest: SoftwareGuest, channel: GuestChannel, *, autosense: bool = True
    ) -> None:
        """Drives ``channel``; without ``autosense`` no request has room for sense data."""
        super().__init__(guest, channel)
        self.autosense = autosense

    # ---- initialization ----

    def initialize(
        self, versions: Sequence[int] = VERSIONS, sub_channels: int = 0, **options: object
    ) -> int:
        """Does the handshake; returns the accepted version.

        Opens as many of ``sub_channels`` as the host has, as :attr:`others`, before it ends the
        initialization; ``options`` as for ``enable``.
        """
        self.packet_size = SHORT if max(versions) < 0x0501 else LONG
        self._must(BEGIN)
        for version in versions:
            answer = self.control(QUERY_VERSION, struct.pack("<HH", version, 0))
            if answer[8:12] == bytes(4):
                break
        else:
            raise BadAnswer("the host accepts no version")
        self.version, self.packet_size = version, LONG if version >= 0x0501 else SHORT
        properties = self._must(QUERY_PROPERTIES)
        self.max_sub_channels, flags, self.max_transfer_bytes = struct.unpack_from(
            "<H2xII", properties, 16
        )
        if bool(flags & _MULTI_CHANNEL) != (version >= 0x0501):
            raise BadAnswer(f"version {version:#x} with channel flags {flags:#x}")
        self.others: list[WindowsStorvsc] = []
        if flags & _MULTI_CHANNEL:
            count = min(sub_channels, self.max_sub_channels)
            for each in self.create_sub_channels(count, **options):
                other = WindowsStorvsc(self.guest, each.channel, autosense=self.autosense)
                other.version, other.packet_size = self.version, self.packet_size
                self.others.append(other)
        self._must(END)
        return self.version

    def control(self, operation: int, body: bytes = b"") -> bytes:
        """Does as the base does, and looks at the length."""
        answer = super().control(operation, body)
        self._check_length(answer)
        return answer

    def _check_length(self, packet: bytes) -> None:
        if len(packet) != self.packet_size:
            raise BadAnswer(f"a packet of {len(packet)} bytes, not {self.packet_size}")

    def wait_for_rescan(self, timeout: float = 10.0) -> None:
        """Waits until the host says that disks have come or gone."""
        try:
            packet = self.channel.receive(timeout)
        except ReceiveTimeout:
            raise BadAnswer("no notification") from None
        self._check_length(packet.payload)
        if packet.payload[:4] != struct.pack("<I", ENUMERATE_BUS):
            raise BadAnswer(f"a notification {packet.payload.hex(' ')}")

    # ---- requests ----

    def packet(
        self, cdb: bytes, *, lun: int = 0, target: int = 0, size: int = 0, direction: int = 2
    ) -> bytes:
        """Does as the base does, and takes the room for sense data away."""
        packet = bytearray(
            super().packet(cdb, lun=lun, target=target, size=size, direction=direction)
        )
        if not self.autosense:
            packet[21] = 0
            if self.packet_size == LONG:
                packet[52] |= _DISABLE_AUTOSENSE
        return bytes(packet)

    def command(self, cdb: bytes | str, **options: object) -> Completion:
        """Does as the base does, and fetches the sense data that did not come along."""
        done = super().command(cdb, **options)
        if done.scsi_status == 2 and done.srb_status & 0x3F == 0x04 and not done.sense:
            fetched = self.submit(
                _REQUEST_SENSE,
                room=18,
                lun=options.get("lun", 0),  # type: ignore[arg-type]
            ).wait()
            if not fetched.good:
                raise BadAnswer(f"REQUEST SENSE was answered with {fetched}")
            return replace(done, sense=fetched.data[: fetched.transferred])
        return done

    def is_absent(self, lun: int, target: int = 0) -> bool:
        """Looks whether there is no unit; a wrong way to say so raises :class:`BadAnswer`."""
        inquiry = super().command("12 00 00 00 24 00", room=36, lun=lun, target=target)
        if not inquiry.good:
            raise BadAnswer(f"INQUIRY was answered with {inquiry}")
        done = super().command(_TEST_UNIT_READY, lun=lun, target=target)
        absent = (done.status, done.srb_status & 0x3F, done.scsi_status) == _ABSENT
        if absent != (inquiry.data[0] == 0x7F) or (done.srb_status == 0x20 and not absent):
            raise BadAnswer(f"INQUIRY says {inquiry.data[0]:#x}, the unit {done}")
        return absent

    def decode(self, answer: bytes, data: bytes = b"") -> Completion:
        """Does as the base does, and looks at the length."""
        self._check_length(answer)
        return super().decode(answer, data)
