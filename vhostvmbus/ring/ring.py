# SPDX-License-Identifier: GPL-2.0-or-later
"""The two rings of one channel, seen from one end.

Invariants: a packet is copied once into private memory and checked there; indices of the peer are
believed only if they lie in the ring; our own are never read back. One thread receives; any thread
may send.
"""

import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, TypeAlias

from vhostvmbus.engine import ffi, lib
from vhostvmbus.engine.faults import error_of, guest_error
from vhostvmbus.memory import ExternalData, GuestMemory
from vhostvmbus.memory.external import SEG_SIZE
from vhostvmbus.memory.mappings import count_runs
from vhostvmbus.ring.plan import AnyPlan, Done, Outgoing
from vhostvmbus.ring.results import (
    Batch,
    PacketLimits,
    RawPacket,
    RingState,
    Sent,
    Served,
    cut_short,
    put_segments,
)
from vhostvmbus.wire.errors import (
    ChannelClosed,
    GuestError,
    InflightInvalid,
    PacketError,
    RingInvalid,
)
from vhostvmbus.wire.gpa import GpaRange, build_ranges, parse_ranges
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, GPA_DIRECT_HEADER_SIZE, PacketType

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, c_uint8_t, vvb_outgoing, vvb_ring

_PACKET = struct.Struct("=QQQQIIIIIIIIIHHII")
_OUTGOING = struct.Struct("=QIIHHI")
if _PACKET.size != ffi.sizeof("struct vvb_packet") or (
    _OUTGOING.size != ffi.sizeof("struct vvb_outgoing")
):
    raise ImportError("the ring engine does not match its Python side: build it again")
_GPA_HEADER = struct.Struct("<II")
DEFAULT_BATCH = 64
_ONE_SENT = Sent(1, False), Sent(1, True)
"""The two usual results of sending one packet, made once: by whether the peer is signalled."""
RingHandle: TypeAlias = "Pointer[vvb_ring]"
"""A ring as the engine's C, and a device's, know it."""


class Role(IntEnum):
    """Which end of the channel this is; decides which ring is received from."""

    HOST = lib.VVB_ROLE_HOST
    GUEST = lib.VVB_ROLE_GUEST


class Ring:
    """Both rings of a channel, attached.

    ``pfns`` are all pages of the ring's GPADL, ``ring_offset`` the index of the page at which the
    in ring (host to guest) starts. ``initialize`` clears both headers, which is for the guest role
    before the channel is opened. Raises :exc:`RingInvalid` if that makes no two rings, or if the
    indices in the headers are no indices; its ``__cause__`` is then the :exc:`GuestError`.
    """

    def __init__(
        self,
        memory: GuestMemory,
        pfns: Sequence[int],
        ring_offset: int,
        role: Role = Role.HOST,
        *,
        initialize: bool = False,
        limits: PacketLimits | None = None,
        batch: int = DEFAULT_BATCH,
    ) -> None:
        self._memory = memory
        self.role = role
        self.pfns = pfns
        limits = limits or PacketLimits()
        self._fault = ffi.new("struct vvb_fault *")
        if len(pfns) > 1 << 19 or not 0 <= ring_offset <= len(pfns):
            raise RingInvalid(f"{len(pfns)} pages split at {ring_offset} do not make two rings")
        self._share = memory.mappings.take(count_runs(pfns))
        error = ffi.new("int *")
        handle = lib.vvb_ring_attach(
            memory.handle,
            ffi.new("uint64_t[]", list(pfns)),
            len(pfns),
            ring_offset,
            int(role),
            initialize,
            self._fault,
            error,
        )
        if handle == ffi.NULL:
            if self._fault.error:
                cause = error_of(self._fault)
                raise RingInvalid(f"the ring cannot be used: {cause}") from cause
            status = NtStatus.INVALID_PARAMETER
            if error[0] in (errno.ENOMEM, errno.ENOSPC, errno.EAGAIN, errno.EMFILE):
                status = NtStatus.INSUFFICIENT_RESOURCES
            text = f"{len(pfns)} pages split at {ring_offset}: {os.strerror(error[0])}"
            raise RingInvalid(text, status)
        self._ring = ffi.gc(handle, lib.vvb_ring_free)
        self._batch = ffi.gc(lib.vvb_batch_new(self._ring, batch), lib.vvb_batch_free)
        if self._batch == ffi.NULL:
            raise MemoryError("ring batch")
        self._limits = ffi.new("struct vvb_limits *")
        self._limits.max_payload = min(limits.max_payload, 0xFFFFFFFF)
        self._limits.max_ranges = min(limits.max_external_ranges, 0xFFFFFFFF)
        self._limits.max_external = limits.max_external_data
        self._serving = ffi.new("struct vvb_serving *")
        self._served = ffi.new("struct vvb_served *")
        self._closed = False
        # Descriptor and trailer are in the ring as well, and a ring is never filled wholly.
        self.longest_payload = min(0xFFFF * 8 - 16, self.state.tx_size - 16 - 8 - 8)
        """The most bytes that header and payload of a packet may have, each a multiple of 8."""

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, max_packets: int = DEFAULT_BATCH, plan: AnyPlan | None = None) -> Batch:
        """Takes up to ``max_packets`` packets; one read-index store for all of them.

        With a ``plan``, what fits it is done; what does not, or came behind such a packet and fits
        none either, is handed up. Never raises for what the peer did: see :class:`Batch`. One
        thread at a time.
        """
        self._check_open()
        result = lib.vvb_ring_receive(
            self._ring,
            self._batch,
            max_packets,
            self._memory.handle,
            self._limits,
            ffi.NULL if plan is None else plan.handle,
        )
        return self._received(result)

    def serve(
        self,
        max_packets: int,
        plan: AnyPlan,
        fds: Sequence[int],
        gather_microseconds: int = 0,
    ) -> tuple[Batch, Served]:
        """Receives packets, answers them and waits in between, while the plan does all that comes.

        ``fds``: the eventfds that say that the guest kicked, that the work ends, that the caller
        has something to do, and the one that signals the guest. What a plan wrote is
        reported to the memory's tracker. With ``gather_microseconds`` an empty ring is left alone
        for about so long before it is looked at again, if several packets can be expected by then.
        The batch is the last one: see :class:`Served`. The ring is masked when this is called, and
        when it returns.
        Raises :exc:`OSError` if the eventfds are none.
        """
        self._check_open()
        serving, served = self._serving, self._served
        serving.kick_fd, serving.stop_fd, serving.wake_fd, serving.call_fd = fds
        serving.gather_us = gather_microseconds
        result = lib.vvb_ring_serve(
            self._ring,
            self._batch,
            max_packets,
            self._memory.handle,
            self._limits,
            plan.handle,
            serving,
            served,
        )
        if served.error:
            raise OSError(served.error, os.strerror(served.error))
        return self._received(result), Served(
            served.packets,
            served.payload,
            served.external,
            served.wanted,
            served.answers,
            served.batches,
            served.wakeups,
            served.rests,
            served.signals,
            served.max_batch,
            served.answered,
            served.fired,
        )

    def _received(self, result: int) -> Batch:
        batch = self._batch
        error = None
        if result:
            fault = error_of(batch.fault)
            if not isinstance(fault, GuestError):
                raise fault
            error = fault
        done = Done(batch) if batch.done_count else None
        rest = (error, bool(batch.signal), batch.bytes, done, bool(batch.no_slot), batch.replayed)
        if not batch.count:
            return Batch([], *rest)
        packets: list[RawPacket] = []
        try:
            # Three copies for the whole batch: packets and their segments are slices of them.
            data = bytes(ffi.buffer(batch.data, batch.data_len))
            segs = b""
            if batch.segs.count:
                segs = bytes(ffi.buffer(batch.segs.v, batch.segs.count * SEG_SIZE))
            records = bytes(ffi.buffer(batch.packets, batch.count * _PACKET.size))
            unpacked = _PACKET.iter_unpack(records)
            packets.extend(map(self._packet, unpacked, repeat(data), repeat(segs)))
        except BaseException:
            put_segments(batch, len(packets))
            raise
        return Batch(packets, *rest)

    def _packet(self, record: tuple[int, ...], data: bytes, segs: bytes) -> RawPacket:
        (
            transaction_id,
            external_length,
            fault_value,
            written,
            ring_offset,
            data_offset,
            length,
            payload_offset,
            first_seg,
            seg_count,
            error_code,
            fault_field,
            fault_offset,
            type_,
            flags,
            slot,
            replayed,
        ) = record
        raw = data[data_offset : data_offset + length]
        external = None
        error = None
        if seg_count:
            external = ExternalData(
                self._memory,
                segs[first_seg * SEG_SIZE : (first_seg + seg_count) * SEG_SIZE],
                external_length,
                partial(_ranges_of, raw, payload_offset),
                written,
            )
        elif error_code:
            fault = guest_error(error_code, fault_field, fault_value, fault_offset)
            if not isinstance(fault, PacketError):
                raise fault
            error = fault
        return RawPacket(
            type_,
            flags,
            transaction_id,
            ring_offset,
            raw,
            payload_offset,
            external,
            error,
            slot,
            bool(replayed),
        )

    def mask(self) -> None:
        """Tells the peer that packets need no signal: we are looking."""
        self._check_open()
        lib.vvb_ring_mask(self._ring)

    def unmask(self) -> bool:
        """Asks for signals again; returns true if packets came meanwhile: look once more."""
        self._check_open()
        return bool(lib.vvb_ring_unmask(self._ring))

    # -- sending -------------------------------------------------------------------------------

    def send(
        self,
        type_: int,
        payload: bytes | bytearray | memoryview = b"",
        *,
        transaction_id: int = 0,
        flags: int = 0,
        header: bytes = b"",
        publish: bool = True,
    ) -> Sent:
        """Puts one packet into the ring.

        ``header`` stands between descriptor and payload; both are padded to 8 bytes. Without
        ``publish`` the peer sees the packet only after :meth:`publish`. Nothing is raised for what
        the peer did, nor for a packet that does not fit: see :class:`Sent`. Its ``error`` is a
        :exc:`PacketTooBig`, :exc:`RingIndexInvalid` or :exc:`RingMemoryLost`.
        """
        self._check_open()
        signal = ffi.new("int *")
        fault = ffi.new("struct vvb_fault *")
        source = payload if isinstance(payload, bytes) else ffi.from_buffer(payload)
        result = lib.vvb_ring_send(
            self._ring,
            type_,
            flags,
            transaction_id,
            header,
            len(header),
            source,
            len(payload) if isinstance(payload, bytes) else len(source),
            publish,
            signal,
            fault,
        )
        if not result:
            return _ONE_SENT[signal[0]]
        return cut_short(result, 0, bool(signal[0]), fault)

    def send_many(self, packets: Sequence[Outgoing] | Done) -> Sent:
        """Puts packets into the ring, as many as fit, with one write-index store.

        They may be the completions that a plan left. If they do not all fit, ``pending_send_sz``
        is set for the first that did not. Otherwise like :meth:`send`.
        """
        self._check_open()
        records: Pointer[vvb_outgoing] | bytes
        data: Pointer[c_uint8_t] | bytes
        if isinstance(packets, Done):
            records, count, data, size = packets.records
        else:
            records = b"".join(
                [
                    _OUTGOING.pack(transaction_id, len(header), len(payload), type_, flags, slot)
                    for type_, payload, transaction_id, flags, header, slot in packets
                ]
            )
            data = b"".join(
                [part for packet in packets for part in (packet.header, packet.payload)]
            )
            count, size = len(packets), len(data)
        sent = ffi.new("struct vvb_sent *")
        result = lib.vvb_ring_send_many(self._ring, records, count, data, size, sent)
        if not result:
            return _ONE_SENT[sent.signal] if count == 1 else Sent(count, bool(sent.signal))
        return cut_short(result, sent.count, bool(sent.signal), sent.fault)

    def send_gpa_direct(
        self,
        payload: bytes | bytearray | memoryview,
        ranges: Sequence[GpaRange],
        *,
        transaction_id: int = 0,
        flags: int = COMPLETION_REQUESTED,
    ) -> Sent:
        """Sends a packet with external data (guest role); otherwise like :meth:`send`."""
        header = _GPA_HEADER.pack(0, len(ranges)) + build_ranges(ranges)
        return self.send(
            PacketType.DATA_USING_GPA_DIRECT,
            payload,
            transaction_id=transaction_id,
            flags=flags,
            header=header,
        )

    def hold(self, held: bool) -> None:
        """Keeps C's data paths from sending while packets wait in line at the caller."""
        self._check_open()
        lib.vvb_ring_hold(self._ring, held)

    @property
    def handle(self) -> RingHandle:
        """The engine's ``struct vvb_ring *``, valid until :meth:`close`."""
        return self._ring

    def publish(self) -> bool:
        """Shows the peer what was sent without ``publish``; returns true if it needs a signal."""
        self._check_open()
        signal = ffi.new("int *")
        lib.vvb_ring_publish(self._ring, signal)
        return bool(signal[0])

    # -- the record of packets in flight: see inflight.py --------------------------------------

    def record(self, fd: int, offset: int, size: int, slots: int, *, resume: bool) -> None:
        """Records packets that want a completion, from when they are taken until it is published.

        The record is in ``size`` bytes of ``fd`` at ``offset``, which nobody else may use. This is
        called once, before anything is received or sent. With ``resume``, what is recorded there is
        received first. Raises :exc:`InflightInvalid` if the part has no such size, or is not what
        this ring left; the ring goes on without then.
        """
        self._check_open()
        result = lib.vvb_ring_record(self._ring, fd, offset, size, slots, resume)
        if result == -errno.EBADMSG:
            raise InflightInvalid("what is in the in-flight region makes no sense")
        if result == -errno.ESTALE:
            raise InflightInvalid("the in-flight region is not about this ring")
        if result:
            raise InflightInvalid(f"the in-flight region: {os.strerror(-result)}")

    @property
    def note(self) -> bytes:
        """The note in the record, of this back end or the one before; empty without a record."""
        self._check_open()
        data = ffi.new("char[]", lib.VVB_NOTE_BYTES)
        length = lib.vvb_ring_get_note(self._ring, data)
        return bytes(ffi.buffer(data, length))

    @note.setter
    def note(self, data: bytes) -> None:
        self._check_open()
        if len(data) > lib.VVB_NOTE_BYTES:
            raise ValueError(f"a note has at most {lib.VVB_NOTE_BYTES} bytes")
        lib.vvb_ring_keep_note(self._ring, data, len(data))

    @property
    def to_replay(self) -> int:
        """Recorded packets that have not been received again."""
        self._check_open()
        return int(lib.vvb_ring_to_replay(self._ring))

    @property
    def has_slot(self) -> bool:
        """Tells whether one packet more can be recorded; for the thread that receives."""
        self._check_open()
        return bool(lib.vvb_ring_has_slot(self._ring))

    # -- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> RingState:
        """Occupancy and counters, a snapshot."""
        self._check_open()
        state = ffi.new("struct vvb_ring_state *")
        lib.vvb_ring_get_state(self._ring, state)
        return RingState(
            state.rx_size,
            state.tx_size,
            state.rx_avail,
            state.tx_free,
            bool(state.peer_signals_space),
            state.tx_pending,
            state.signals_sent,
            state.signals_suppressed,
            state.space_signals,
        )

    @property
    def lost(self) -> bool:
        """Tells whether pages of the ring vanished."""
        self._check_open()
        return bool(lib.vvb_ring_lost(self._ring))

    def pages(self, sending: bool) -> memoryview:
        """Returns header page and data (once) of one of the rings: for tests and diagnosis."""
        state = self.state
        size = 4096 + (state.tx_size if sending else state.rx_size)
        return memoryview(ffi.buffer(lib.vvb_ring_pages(self._ring, int(sending)), size))

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the ring is detached")

    def close(self) -> None:
        """Detaches the ring. Nobody may be inside another method."""
        if not self._closed:
            self._closed = True
            ffi.release(self._batch)
            ffi.release(self._ring)
            self._share.give_back()

    def stop_plan(self) -> None:
        """Has plans begin nothing more from now on; any thread."""
        lib.vvb_batch_stop(self._batch)

    def forsake(self) -> None:
        """Detaches the ring from guest memory while somebody may be inside another method.

        He sees private zeros from now on. The ring is freed with its last reference.
        """
        if not self._closed:
            self._closed = True
            lib.vvb_ring_forsake(self._ring)
            self._share.give_back()


def _ranges_of(raw: bytes, payload_offset: int) -> list[GpaRange]:
    _, count = _GPA_HEADER.unpack_from(raw, 16)
    return parse_ranges(raw[:payload_offset], count, offset=GPA_DIRECT_HEADER_SIZE)
