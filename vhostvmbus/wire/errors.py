# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error of the project that has a name, as one hierarchy.

* :class:`GuestError`: the guest put something wrong into a ring, a packet or a GPA range. Carries
  the field's name, the offending value and the offset in the ring. docs/errors.md says for each
  whether it costs the packet or the channel.
* :class:`FrontEndError`: the front end (QEMU) asked for something wrong. Carries the NTSTATUS
  that the reply-ack brings back.
* :class:`UsageError`: the author of a device did something wrong; never visible to the guest.
"""

from typing import ClassVar

from vhostvmbus.wire.ntstatus import NtStatus


class VmbusError(Exception):
    """Base of every error that this project raises on purpose."""


class GuestError(VmbusError):
    """A mistake of the guest, as a value.

    ``field`` is the name in the wire format, ``value`` what was found there, ``offset`` where: the
    byte offset in the ring's data area (in the range list for a GPADL; -1 if there is none).
    """

    closes_channel: ClassVar[bool] = False

    def __init__(self, field: str, value: int, offset: int = -1, detail: str = "") -> None:
        self.field = field
        self.value = value
        self.offset = offset
        self.detail = detail
        where = f" at {offset:#x}" if offset >= 0 else ""
        super().__init__(
            f"{type(self).__name__}: {field} = {value:#x}{where}{': ' if detail else ''}{detail}"
        )

    def __reduce__(self) -> tuple[type["GuestError"], tuple[str, int, int, str]]:
        return type(self), (self.field, self.value, self.offset, self.detail)


class RingError(GuestError):
    """The ring itself can no longer be followed: the channel stops."""

    closes_channel = True


class RingIndexInvalid(RingError):
    """``write_index`` or ``read_index`` is outside the data area or not a multiple of 8."""


class RingMemoryLost(RingError):
    """The pages behind the ring have gone (file truncated: SIGBUS was taken)."""


class DescriptorTruncated(RingError):
    """Fewer bytes are in the ring than a descriptor and its trailer take."""


class PacketLengthInvalid(RingError):
    """``len8`` is smaller than the header or exceeds what is in the ring."""


class PacketOffsetInvalid(RingError):
    """``offset8`` is smaller than the descriptor or exceeds ``len8``."""


class PacketError(GuestError):
    """One packet is wrong, and where the next one starts is known: only the packet is refused."""


class PacketTypeUnexpected(PacketError):
    """A packet type that this end does not take."""


class PacketTooLarge(PacketError):
    """The payload exceeds the device's ``max_packet_size``."""


class PacketReplayedTooOften(PacketError):
    """More than 32 back ends in a row have ended with this packet: nobody is to do it any more."""


class GpaRangeError(PacketError):
    """Something is wrong with the description of external data."""


class GpaRangeCountInvalid(GpaRangeError):
    """``range_count`` is zero, exceeds the device's limit or cannot fit into the packet."""


class GpaRangeTruncated(GpaRangeError):
    """The packet's header ends before the ranges do."""


class GpaRangeEmpty(GpaRangeError):
    """A range of zero bytes."""


class GpaRangeTooLong(GpaRangeError):
    """The ranges describe more bytes than the device's ``max_external_data``."""


class PfnOutsideMemory(GpaRangeError):
    """A PFN that is not guest RAM."""


class GuestMemoryLost(GpaRangeError):
    """Guest pages vanished under an access (file truncated: SIGBUS was taken)."""


class CompletionUnexpected(PacketError):
    """A completion whose transaction id belongs to no packet in flight."""


class PacketFailed(GuestError):
    """The device called :meth:`Packet.fail`: the packet is malformed beyond repair."""

    closes_channel = True


class CodeInvalidationFailed(GuestError):
    """The front end could not be told that translated code was overwritten."""

    closes_channel = True


class FrontEndError(VmbusError):
    """A request of the front end that cannot be granted; ``status`` is its reply."""

    status: NtStatus = NtStatus.INVALID_PARAMETER

    def __init__(self, message: str, status: NtStatus | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class RegionInvalid(FrontEndError):
    """A memory region that is empty, misaligned, wraps around, or exceeds its file."""


class RegionOverlap(FrontEndError):
    """A memory region that overlaps another one in guest-physical addresses."""

    status = NtStatus.CONFLICTING_ADDRESSES


class InflightInvalid(FrontEndError):
    """An in-flight region that cannot be used: its size, its seals, its contents."""


class RegionUnknown(FrontEndError):
    """No such memory region."""


class RegionBusy(FrontEndError):
    """A memory region could not be given up in time: a packet still refers to it."""

    status = NtStatus.IO_TIMEOUT


class GpadlInvalid(FrontEndError):
    """A GPADL that is malformed, outside guest memory, or unfit for its use."""


class GpadlUnknown(FrontEndError):
    """No GPADL of this id."""

    status = NtStatus.INVALID_HANDLE


class GpadlExists(FrontEndError):
    """A GPADL of this id exists already."""

    status = NtStatus.OBJECT_NAME_COLLISION


class GpadlLimit(FrontEndError):
    """More GPADLs, or more GPADL pages, than one connection may have."""

    status = NtStatus.INSUFFICIENT_RESOURCES


class ChannelUnknown(FrontEndError):
    """No channel of this index."""


class ChannelStateError(FrontEndError):
    """The channel is open already, or not open."""

    status = NtStatus.INVALID_DEVICE_STATE


class RingInvalid(FrontEndError):
    """The GPADL and split given to an open do not make two rings."""


class MappingLimit(FrontEndError):
    """The rings of one connection are in more pieces than the process can map."""

    status = NtStatus.INSUFFICIENT_RESOURCES


class ThreadLimit(FrontEndError):
    """Too many threads of the device's code do not return."""

    status = NtStatus.INSUFFICIENT_RESOURCES


class DeviceBusy(FrontEndError):
    """A transfer of a channel that is closed has not ended: no channel is opened until then."""

    status = NtStatus.IO_TIMEOUT


class MemoryInUse(FrontEndError):
    """A channel that is to be closed uses guest memory in a call that does not return.

    No session outlives it: the end of the connection takes the memory away.
    """

    status = NtStatus.IO_TIMEOUT


class NotStill(FrontEndError):
    """A device that is to stand still with its machine has packets that it does not complete."""

    status = NtStatus.IO_TIMEOUT


class UsageError(VmbusError):
    """A mistake in a device's code."""


class OfferRefused(UsageError):
    """A channel cannot be offered or taken back; ``status`` says why, as an NTSTATUS.

    DEVICE_NOT_CONNECTED: no front end. NOT_SUPPORTED: it cannot. INSUFFICIENT_RESOURCES: more than
    the device's ``max_channels``. INVALID_DEVICE_STATE: the device itself is rescinded.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AlreadyCompleted(UsageError):
    """A packet was completed, or failed, a second time."""


class ExternalDataClosed(UsageError):
    """External data was used after its packet's completion."""


class ExternalDataReadOnly(UsageError):
    """A write to external data that was mapped read-only."""


class DeviceTimeout(UsageError):
    """The device's code did not return in time, or what it does has not ended."""

    status = NtStatus.IO_TIMEOUT


class RequestCancelled(UsageError):
    """Whoever made a request does not want to wait any more."""

    status = NtStatus.CANCELLED


class ChannelClosed(UsageError):
    """The channel is no longer open."""

    status = NtStatus.DEVICE_REMOVED


class RingFull(VmbusError):
    """The packet does not fit now; ``pending_send_sz`` asks the peer for a signal."""

    status = NtStatus.BUFFER_OVERFLOW


class SendQueueFull(UsageError):
    """Too many packets wait for space in the ring."""


class PacketTooBig(UsageError):
    """A packet that could never fit into the ring (or exceeds 65535 * 8 bytes)."""


class RefuseOpen(VmbusError):
    """Raised by :meth:`Device.opened` to refuse; ``status`` goes to the guest's open result."""

    def __init__(self, status: NtStatus = NtStatus.UNSUCCESSFUL, message: str = "") -> None:
        super().__init__(message or status.name)
        self.status = status
