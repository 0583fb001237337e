# SPDX-License-Identifier: GPL-2.0-or-later
"""What a network card is connected to: the interface between the card and the world.

A :class:`Link` carries Ethernet frames, without frame check sequence, between one card and
something on the host. The card knows no more of the host than this file; a link knows nothing of
VMBus. What may be left undone in a frame (a checksum, the cutting of a long segment) travels
beside it as an :class:`Offload`, whose fields are those of a virtio-net header (Virtual I/O Device
1.2, section 5.1.6), because that is what a TAP device takes.

Invariants: neither :meth:`Link.send` nor :meth:`Link.receive_into` ever waits; a frame that
cannot be delivered is dropped and counted, never kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

Buffer = bytes | bytearray | memoryview
"""What a piece of a frame may be; guest memory comes as a memoryview."""


class Gso(IntEnum):
    """How a frame longer than the MTU is to be cut; the values are virtio-net's gso_type."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4


@dataclass(frozen=True, slots=True)
class Offload:
    """What has still to be done to a frame, or was done; the fields of a virtio-net header."""

    needs_checksum: bool = False
    """The checksum from ``start`` to the end is to be stored at ``start + offset``, where the
    pseudo-header's sum is now."""
    checksum_valid: bool = False
    """Received frames only: somebody verified the checksum already."""
    start: int = 0
    """Bytes from the frame's first byte."""
    offset: int = 0
    """Bytes from ``start``."""
    gso: Gso = Gso.NONE
    segment_size: int = 0
    """With ``gso``: bytes of TCP payload in each segment."""
    header_length: int = 0
    """With ``gso``: bytes of headers, Ethernet to TCP; a hint."""


PLAIN = Offload()
"""Nothing to do and nothing known."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the host side takes (sending) and may be asked to give (receiving)."""

    checksum: bool = False
    tso4: bool = False
    tso6: bool = False


class LinkDown(OSError):
    """A link cannot be made or used; the message says why, and what would work, for the user."""


class Link(Protocol):
    """A connection of one card. Queues are numbered from 0; any thread may use any queue, but
    one thread at a time each direction of one queue."""

    @property
    def name(self) -> str:
        """For people: the interface's, or the kind of link."""

    @property
    def queues(self) -> int:
        """Most queues that :meth:`use_queues` takes."""

    @property
    def mtu(self) -> int:
        """Largest IP packet in bytes."""

    @property
    def mac(self) -> bytes | None:
        """The address that the card shall have, six bytes; None leaves the choice to the card."""

    @property
    def capabilities(self) -> Capabilities:
        """What may be left undone in frames that are sent, and asked for in those received."""

    @property
    def direct(self) -> bool:
        """Whether a queue's descriptor gives and takes whole frames, one a read or write, with
        :mod:`~vhostvmbus.devices.net.link.vnet`'s header in front, so that the card may do that
        itself. It does not block."""

    def start(self, changed: Callable[[], None]) -> None:
        """Begin. ``changed()`` is called, on any thread, when carrier or MTU may have changed."""

    def carrier(self) -> bool:
        """Whether frames can pass."""

    def fileno(self, queue: int) -> int:
        """A descriptor that is readable when a frame waits, and never while there is none.

        The number stays the same for the link's life, but what is behind it may be replaced
        before ``changed()`` is called: an epoll registration has to be renewed then.
        """

    def receive_into(self, queue: int, buffers: Sequence[memoryview]) -> tuple[int, Offload] | None:
        """One frame, scattered over *buffers*, and its length; None if none waits.

        A frame longer than the buffers is dropped and counted. While the link is down, None.
        """

    def send(self, queue: int, pieces: Sequence[Buffer], offload: Offload) -> bool:
        """Send one Ethernet frame, gathered from *pieces*; False if it was dropped."""

    def use_queues(self, count: int) -> None:
        """Spread what is received over the first *count* queues (ValueError: 1 to ``queues``)."""

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Frames with these offloads may be given from now on, and no others."""

    def set_mtu(self, mtu: int) -> None:
        """Make the host side's MTU *mtu* bytes. Raises OSError when that is impossible."""

    def stats(self) -> dict[str, int]:
        """Counters of what the link dropped or lost, ready for JSON."""

    def close(self) -> None:
        """End, and remove what was made for the card on the host; again does nothing.

        Nobody else uses the link any more.
        """
