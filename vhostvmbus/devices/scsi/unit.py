# SPDX-License-Identifier: GPL-2.0-or-later
"""The view of a SCSI command: the logical unit, its backing store, the request, the data buffer.

Nothing here does I/O.  :class:`Backing` is the only way from a command to a disk's bytes,
:class:`DataBuffer` the only way to the guest's; ``vhostvmbus.memory.ExternalData`` is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from vhostvmbus.devices.scsi.lease import Lease, Step, Stragglers
from vhostvmbus.devices.scsi.sense import NO_SENSE, Sense

BLOCK_SIZE = 512
"""Bytes of a logical block."""
BLOCKS_PER_PHYSICAL_EXPONENT = 3
"""log2 of logical blocks per physical block: 4096 bytes, the page of every host file system."""


class DataBuffer(Protocol):
    """The guest's data buffer of one request.  Offsets and lengths in bytes, bounds-checked."""

    def __len__(self) -> int: ...

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copies bytes out of the buffer."""
        ...

    def write(self, data: bytes, offset: int = 0) -> object:
        """Copies bytes into the buffer."""
        ...

    def preadv(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Reads from a file into the buffer; returns the bytes moved, fewer at its end."""
        ...

    def pwritev(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Writes the buffer to a file; returns the bytes moved."""
        ...


class NoData:
    """The buffer of a request that has none."""

    def __len__(self) -> int:
        return 0

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Returns no bytes."""
        return b""

    def write(self, data: bytes, offset: int = 0) -> None:
        """Refuses bytes, if there are any."""
        if data:
            raise ValueError("the request has no data buffer")

    def preadv(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Moves nothing."""
        return 0

    def pwritev(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Moves nothing."""
        return 0


class Backing(Protocol):
    """A disk's bytes.  Offsets and lengths are in bytes and lie within ``size``.

    Every method raises :class:`OSError` when the host's file fails; what was moved before is
    then unspecified, as on a real disk.  Methods may be called from several threads at once.
    """

    @property
    def size(self) -> int:
        """Bytes, a multiple of the block size."""
        ...

    @property
    def read_only(self) -> bool:
        """Tells whether writes are refused."""
        ...

    @property
    def can_discard(self) -> bool:
        """Tells whether :meth:`discard` can give space back."""
        ...

    @property
    def discard_zeroes(self) -> bool:
        """Tells whether discarded bytes read as zero from then on."""
        ...

    def would_wait(self, offset: int, length: int) -> bool:
        """Returns whether a read has to fetch something first: a guess, never an error."""
        ...

    def read_into(self, data: DataBuffer, offset: int, length: int) -> None:
        """Reads ``length`` bytes at ``offset`` to the start of ``data``."""
        ...

    def write_from(self, data: DataBuffer, offset: int, length: int) -> None:
        """Writes the first ``length`` bytes of ``data`` at ``offset``."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Reads bytes for the device's own use."""
        ...

    def write(self, offset: int, payload: bytes) -> None:
        """Writes bytes of the device's own."""
        ...

    def flush(self) -> None:
        """Makes every completed write durable."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Gives the space back, where the host can; otherwise does nothing."""
        ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Makes the range read as zeroes; ``unmap`` asks to give the space back too."""
        ...

    def mapped_extent(self, offset: int) -> tuple[bool, int]:
        """Returns whether the byte at ``offset`` has space allocated, and for how many bytes on."""
        ...


class Direct(NamedTuple):
    """A file that a disk's transfers may go to directly, block for block."""

    fd: int
    size: int
    """Bytes that are there; what lies behind is the disk's own affair."""
    nowait: bool
    """Set if reads can be asked not to wait for the host's disk."""


@runtime_checkable
class DirectBacking(Protocol):
    """A :class:`Backing` whose file may be handed to others, such as the ring engine's plan."""

    def direct(self) -> Direct | None:
        """Returns its file, open until the backing is closed; ``None`` if there is none now."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity that a logical unit reports.  ASCII, cut and padded with blanks where SCSI
    does."""

    serial: str
    """Unit serial number, VPD page 80h."""
    naa: bytes
    """8 bytes, NAA type 3 (locally assigned), VPD page 83h."""
    vendor: str = "VHVMBUS"
    product: str = "Virtual Disk"
    revision: str = "1.0"


def _nobody() -> None:
    """Tells nobody."""


@dataclass(slots=True)
class LogicalUnit:
    """One disk's SCSI state.  Lives as long as the disk is attached."""

    backing: Backing
    identity: Identity
    max_transfer_blocks: int = 4096
    """Blocks that one command may transfer; announced in VPD page B0h and enforced."""
    write_cache: bool = True
    """WCE of the caching mode page; without it every write is durable when completed."""
    kept_sense: Sense | None = None
    """The sense data of a command that could not take them along, for REQUEST SENSE to fetch."""
    attentions: deque[Sense] = field(default_factory=deque)
    """Unit attention conditions to report, oldest first."""
    replaced: bool = False
    """The disk is another one than the guest has had, and is not shown until the guest starts
    again."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    """The steps of channels that are closed, as long as they go on: the unit is not ready then."""
    changed: Callable[[], None] = _nobody
    """Called after the state changed in a way that READ and WRITE depend on.  When it returns,
    nothing is done any more by the state before."""

    @property
    def blocks(self) -> int:
        """The capacity in logical blocks."""
        return self.backing.size // BLOCK_SIZE

    def raise_attention(self, sense: Sense) -> None:
        """Has ``sense`` reported by the next command that may fail with a unit attention."""
        if sense not in self.attentions:
            self.attentions.append(sense)
            self.changed()

    def take_attention(self) -> Sense:
        """Reports the oldest pending unit attention; returns NO SENSE if there is none."""
        try:
            attention = self.attentions.popleft()
        except IndexError:
            return NO_SENSE
        self.changed()
        return attention

    def take_sense(self) -> Sense:
        """Reports what REQUEST SENSE asks for: what was kept, else a unit attention."""
        sense, self.kept_sense = self.kept_sense, None
        return sense if sense is not None else self.take_attention()

    def set_write_cache(self, on: bool) -> None:
        """Sets WCE; writes that begin after the return keep to it."""
        self.write_cache = on
        self.changed()

    def reset(self, attention: Sense | None, *, tell: bool = True) -> None:
        """Resets the unit (SAM-5 section 6.3.3): the mode pages return to their defaults.

        Without ``tell`` the caller sees to what :attr:`changed` is for, once for several units.
        """
        self.write_cache = True
        self.kept_sense = None
        self.attentions.clear()
        if attention is not None:
            self.attentions.append(attention)
        if tell:
            self.changed()


@dataclass(slots=True)
class Request:
    """One command on its way through a handler."""

    cdb: bytes
    """16 bytes; those past the command's own length are not looked at."""
    data: DataBuffer
    room: int
    """Bytes of ``data`` that the request may use."""
    lease: Lease = field(default_factory=Lease)
    """The right to act, of the channel that the request came on."""

    def step(self, unit: LogicalUnit) -> Step:
        """Returns the context in which the request changes ``unit``, or what is on its disk.

        Each holds what takes a bounded time. Beginning one raises
        :exc:`~vhostvmbus.devices.scsi.lease.Cancelled` once the channel is closed.
        """
        return self.lease.step(unit.stragglers)

    def u16(self, offset: int) -> int:
        """Returns a big-endian field of the CDB."""
        return int.from_bytes(self.cdb[offset : offset + 2], "big")

    def u32(self, offset: int) -> int:
        """Returns a big-endian field of the CDB."""
        return int.from_bytes(self.cdb[offset : offset + 4], "big")

    def u64(self, offset: int) -> int:
        """Returns a big-endian field of the CDB."""
        return int.from_bytes(self.cdb[offset : offset + 8], "big")

    def reply(self, payload: bytes, allocation_length: int) -> int:
        """Sends data to the guest, cut to the allocation length (SPC-4 section 4.2.5.6).

        Returns the bytes transferred.
        """
        count = min(len(payload), allocation_length, self.room)
        if count:
            self.data.write(payload[:count])
        return count
