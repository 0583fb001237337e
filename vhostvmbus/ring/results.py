# SPDX-License-Identifier: GPL-2.0-or-later
"""The values that a ring takes and returns: limits, packets, batches, sends, occupancy.

Invariant: a value is private: nothing that the peer does changes it, but for the guest's pages that
a packet's external data stands for.
"""

from typing import TYPE_CHECKING, NamedTuple

from vhostvmbus.engine import ffi, lib
from vhostvmbus.engine.faults import error_of
from vhostvmbus.memory import ExternalData
from vhostvmbus.memory.external import SEG_SIZE
from vhostvmbus.ring.plan import Done
from vhostvmbus.wire.errors import GuestError, PacketError, PacketTooBig, RingFull
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED

if TYPE_CHECKING:
    from vhostvmbus._engine import vvb_batch, vvb_fault


class PacketLimits(NamedTuple):
    """The limits of a packet: payload bytes, bytes of external data, GPA ranges."""

    max_payload: int = 0xFFFF * 8
    max_external_data: int = 0xFFFFFFFF
    max_external_ranges: int = 0xFFFF


class RawPacket:
    """A packet as it came: private copies only, except for ``external_data``.

    ``raw`` is the whole packet from its descriptor on, without trailer. ``error`` is set if the
    packet is wrong but the ring goes on; then there is no external data. ``slot`` is where it is
    recorded until its completion, with the same number, is published; 0: nowhere. ``replayed``: a
    back end before this one took it.
    """

    __slots__ = (
        "error",
        "external_data",
        "flags",
        "payload_offset",
        "raw",
        "replayed",
        "ring_offset",
        "slot",
        "transaction_id",
        "type",
    )

    def __init__(
        self,
        type_: int,
        flags: int,
        transaction_id: int,
        ring_offset: int,
        raw: bytes,
        payload_offset: int,
        external_data: ExternalData | None,
        error: PacketError | None,
        slot: int = 0,
        replayed: bool = False,
    ) -> None:
        self.type = type_
        self.flags = flags
        self.transaction_id = transaction_id
        self.ring_offset = ring_offset
        self.raw = raw
        self.payload_offset = payload_offset
        self.external_data = external_data
        self.error = error
        self.slot = slot
        self.replayed = replayed

    @property
    def payload(self) -> bytes:
        """The in-band bytes; a multiple of 8, since the wire has no finer length."""
        return self.raw[self.payload_offset :]

    @property
    def completion_requested(self) -> bool:
        """Tells whether the sender waits for a completion packet."""
        return bool(self.flags & COMPLETION_REQUESTED)

    def __repr__(self) -> str:
        return (
            f"<RawPacket type {self.type} transaction {self.transaction_id:#x}"
            f" at {self.ring_offset:#x}, {len(self.raw)} bytes>"
        )


class Batch(NamedTuple):
    """The packets that one receive took from the ring.

    ``error`` is set if the ring cannot be followed beyond these packets. ``signal`` says that the
    peer waits for space, has it now, and has to be signalled. ``size`` is in ring bytes. ``done``
    is what a plan did: packets that are not in ``packets``. ``no_slot`` says that the record of
    packets in flight is full, ``replayed`` how many packets came out of it.
    """

    packets: list[RawPacket]
    error: GuestError | None
    signal: bool
    size: int
    done: Done | None = None
    no_slot: bool = False
    replayed: int = 0


class Served(NamedTuple):
    """The work of one :meth:`Ring.serve`, the last batch's share included."""

    packets: int
    """Done by the plan, of so many bytes:"""
    payload_bytes: int
    external_bytes: int
    wanted: int
    """Completions that they need."""
    completions: int
    """The number of them that are in the ring."""
    batches: int
    wakeups: int
    rests: int
    """Times that packets were given time to gather."""
    signals: int
    max_batch: int
    answered: int
    """Of the last batch's completions the first so many are in the ring; the caller sends the
    others."""
    fired: int
    """Eventfds that fired and were emptied: bit 1 for the second, bit 2 for the third."""


class Sent(NamedTuple):
    """The outcome of sending packets together.

    ``entered`` of them are in the ring and published. ``signal`` says whether the peer has to be
    signalled for what it was shown on the way, whatever else this says. ``full`` says that the next
    one does not fit now, and that ``pending_send_sz`` asks the peer for space; ``error`` what is
    wrong with the next one, or with the ring.
    """

    entered: int
    signal: bool
    full: bool = False
    error: Exception | None = None

    def check(self) -> None:
        """Raises what kept a packet out: ``error``, or :exc:`RingFull`."""
        if self.error is not None:
            raise self.error
        if self.full:
            raise RingFull("the packet does not fit into the ring now")


def cut_short(result: int, entered: int, signal: bool, fault: "vvb_fault") -> Sent:
    """Returns what the engine says, ``result`` and ``fault``, unless it says that all is well."""
    if result == lib.VVB_E_FULL:
        return Sent(entered, signal, full=True)
    if result == lib.VVB_E_TOO_BIG:
        text = f"a packet of {fault.value} bytes can never fit into the ring"
        return Sent(entered, signal, error=PacketTooBig(text))
    return Sent(entered, signal, error=error_of(fault))


def put_segments(batch: "vvb_batch", first: int) -> None:
    """Gives back the uses of regions of the packets from number ``first`` on: nobody has them."""
    segs = memoryview(ffi.buffer(batch.segs.v, batch.segs.count * SEG_SIZE))
    for packet in batch.packets[first : batch.count]:
        start = packet.first_seg * SEG_SIZE
        stop = start + packet.seg_count * SEG_SIZE
        lib.vvb_segs_put(bytes(segs[start:stop]), packet.seg_count)


class RingState(NamedTuple):
    """Sizes and occupancy in bytes, and how often the peer was to be signalled."""

    rx_size: int
    tx_size: int
    rx_available: int
    tx_free: int
    peer_signals_space: bool
    tx_pending: int
    signals_sent: int
    signals_suppressed: int
    space_signals: int
