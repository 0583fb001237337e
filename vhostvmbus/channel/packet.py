# SPDX-License-Identifier: GPL-2.0-or-later
"""A packet that the guest sent: what is in it, and completing it exactly once.

Invariants: the payload is a private copy; a packet is completed or failed once, by any thread;
its external data ends with it; when the channel closes first, the completion is dropped silently.
The channel is known here by what a packet needs of it, since it is built of packets itself.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.memory import ExternalData
from vhostvmbus.wire.vmbus import PacketType


class PacketChannel(Protocol):
    """The part of a channel that a device uses through a packet that it kept.

    It is the :class:`~vhostvmbus.channel.Channel` that the callbacks get, where all of it is
    described.
    """

    name: str

    @property
    def index(self) -> int:
        """See :attr:`Channel.index`."""

    @property
    def stats(self) -> ChannelStats:
        """See :attr:`Channel.stats`."""

    def send(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        transaction_id: int | None = None,
        on_completion: Callable[[bytes | None], None] | None = None,
        packet_type: int = PacketType.DATA_INBAND,
        header: bytes = b"",
        written: Sequence[tuple[int, int]] = (),
    ) -> int:
        """See :meth:`Channel.send`."""

    def map_gpadl(self, handle: int, *, read_only: bool = False) -> ExternalData:
        """See :meth:`Channel.map_gpadl`."""

    def unmap_gpadl(self, handle: int) -> None:
        """See :meth:`Channel.unmap_gpadl`."""


class PacketOwner(Protocol):
    """The one who ends a packet: its channel's completions."""

    def complete(self, packet: "Packet", payload: bytes | bytearray | memoryview) -> None:
        """Publishes the completion, or drops it if the channel is closed."""

    def fail(self, packet: "Packet", reason: str) -> None:
        """Stops the channel."""

    def defer(self, packet: "Packet") -> None:
        """Delivers the packet a second time, on a thread that may block."""


class Packet:
    """One packet from the guest.

    Devices may hang attributes of their own on it (KMCL's packet context).
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_owner",
        "channel",
        "completed",
        "completion_requested",
        "dropped",
        "external_data",
        "payload",
        "ring_offset",
        "serial",
        "slot",
        "transaction_id",
    )

    deferred: bool = False
    """Set if :meth:`defer` was called: the packet is delivered for the second time."""
    deferrable: bool = True
    """Set while :meth:`defer` may be called, inside ``packet_received``."""

    replayed: bool = False
    """Set if a back end before this one had the packet, and ended without completing it."""

    def __init__(
        self,
        channel: PacketChannel,
        owner: PacketOwner,
        serial: int,
        transaction_id: int,
        payload: bytes,
        external_data: ExternalData | None,
        completion_requested: bool,
        ring_offset: int = -1,
        slot: int = 0,
    ) -> None:
        self._owner = owner
        self.channel = channel
        """The :class:`~vhostvmbus.channel.Channel` that it came on."""
        self.serial = serial
        """Number of the packet on its channel, from 1, never reused."""
        self.transaction_id = transaction_id
        """The guest's 64-bit id, returned with the completion. Not checked for uniqueness."""
        self.payload = payload
        """The in-band bytes, padded to a multiple of 8 by the sender."""
        self.external_data = external_data
        """The guest's pages that the packet describes, or ``None``."""
        self.completion_requested = completion_requested
        """Set if the guest waits for a completion packet."""
        self.ring_offset = ring_offset
        """The packet's place in the ring's data, in bytes."""
        self.slot = slot
        """Its in-flight slot, from 1; 0 if it has none."""
        self.completed = False
        """Set once :meth:`complete` or :meth:`fail` was called, or the channel closed."""
        self.dropped = False
        """Set if the channel closed, or the guest's memory went, before it was completed."""

    def complete(self, payload: bytes | bytearray | memoryview = b"") -> None:
        """Ends the packet; sends ``payload`` as its completion if one was requested.

        May be called from any thread, in any order. External data cannot be used any more. Before
        the guest can see the completion, translated code in the pages that were written is
        discarded. If the ring is full, the completion waits its turn. Raises
        :exc:`AlreadyCompleted` the second time; nothing then goes to the guest. For a packet that
        was dropped, does nothing.
        """
        self._owner.complete(self, payload)

    def fail(self, reason: str) -> None:
        """Fails the packet, which is malformed beyond repair, and stops the channel.

        KMCL calls this VmbChannelPacketFail.

        Nothing is sent to the guest. Raises :exc:`AlreadyCompleted` like :meth:`complete`.
        """
        self._owner.fail(self, reason)

    def defer(self) -> None:
        """Has the packet delivered again, on a thread that may block (…DeferToPassive).

        Only from inside the first ``packet_received`` of this packet, which should return then;
        the worker thread goes on with the ring, and ``packet_received`` is called once more with
        :attr:`deferred` set. Deferred packets of a channel come one after the other, in order.
        Raises :exc:`UsageError` anywhere else, a coroutine (which may wait as it is) included.
        """
        self._owner.defer(self)

    def __repr__(self) -> str:
        state = "completed" if self.completed else "open"
        return (
            f"<Packet transaction {self.transaction_id:#x}, {len(self.payload)} bytes"
            f" + {self.external_data!r}, {state}>"
        )
