# SPDX-License-Identifier: GPL-2.0-or-later
"""One open channel at the host's end.

A worker thread waits for the guest's signal, takes packets in batches and hands them up. Packets
are completed from any thread. Invariants:

* never more packets outstanding (completions that wait for space included) than the quota;
* a completion becomes visible to the guest only after translated code was discarded;
* after :meth:`Channel.close` returned, nothing touches the ring or the external data.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import Any

from vhostvmbus.channel.deferred import DeferredPackets
from vhostvmbus.channel.gpadl import Gpadl, GpadlTable
from vhostvmbus.channel.handler import ChannelHandler, ChannelInfo
from vhostvmbus.channel.request import Awaited
from vhostvmbus.channel.sender import Sender
from vhostvmbus.channel.stats import ChannelStats, RateLimitedLog
from vhostvmbus.memory import ExternalData
from vhostvmbus.packet import Packet
from vhostvmbus.ring import Done, Outgoing, Plan, RawPacket, Ring, RingState, wait
from vhostvmbus.wire.errors import (
    AlreadyCompleted,
    ChannelClosed,
    CodeInvalidationFailed,
    CompletionUnexpected,
    GuestError,
    GuestMemoryLost,
    PacketFailed,
    PacketTooBig,
    UsageError,
)
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, PacketType

log = logging.getLogger(__name__)

BATCH = 64
"""Packets taken from the ring at a time, at most."""
GATHER = 16
"""Completions published together, at most, for devices with ``gather_completions``."""
SPACE_POLL_SECONDS = 0.01
"""How often a full ring is looked at when the guest does not announce ``pending_send_sz``."""
_KICK, _STOP, _WAKE = 1, 2, 4


class ChannelState(Enum):
    """Life of a channel object; one object lives from an opening to the closing."""

    OPENING = "opening"
    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


class Channel:
    """An open channel. Made by :class:`~vhostvmbus.device.DeviceHost`, given to every callback.

    Devices may hang attributes of their own on it (KMCL's channel context).
    """

    def __init__(
        self,
        handler: ChannelHandler,
        info: ChannelInfo,
        ring: Ring,
        kick_fd: int,
        call_fd: int,
        gpadls: GpadlTable,
    ) -> None:
        """``kick_fd`` and ``call_fd`` are duplicated; both must be eventfds that do not block."""
        self.info = info
        self.name = f"{handler.name}/{info.index}"
        self.stats = ChannelStats()
        self.error: GuestError | None = None
        self.state = ChannelState.OPENING
        self.target_vp = info.target_vp
        self._handler = handler
        self._ring = ring
        self._gpadls = gpadls
        self._quota = self._wanted_quota = handler.transaction_quota
        self._paused = False
        self._resting = False  # paused, and the worker has seen it
        self._gather = handler.gather_completions
        self._log = RateLimitedLog(log)
        self._outstanding: dict[int, Packet] = {}
        self._gathered: list[Outgoing] = []
        self._gathered_spans: list[tuple[int, int]] = []
        self._awaited: dict[int, Callable[[bytes | None], None]] = {}
        self._transaction_ids = count(1 << 32)
        self._serials = count(1)
        self._starved = False
        self._stopping = False
        self._draining = False
        self._plan: Plan | None = None
        self._planning = threading.Lock()  # held while the engine may do something by the plan
        self._plan_turn = threading.Lock()  # passed by the worker first: no wait for two receives
        self._idle = threading.Condition()
        self._handles = threading.Lock()  # ring and eventfds exist until the state is CLOSED
        self._kick_fd = os.dup(kick_fd)
        self._call_fd = os.dup(call_fd)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sender = Sender(ring, self._call_fd, self.stats)
        self._worker = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._beside: threading.Thread | None = None
        self._deferred = DeferredPackets(self.name, self._deliver_again)
        self._to_defer: list[Packet] = []
        self._last_ring_state: RingState | None = None
        self.ring_gpadl: Gpadl | None = None
        """The GPADL that the ring was attached from."""

    # -- what a device sees --------------------------------------------------------------------

    @property
    def index(self) -> int:
        """0 for the primary channel, 1 and up for subchannels."""
        return self.info.index

    @property
    def user_data(self) -> bytes:
        """The 120 bytes that the guest's driver gave when it opened the channel."""
        return self.info.user_data

    @property
    def vmbus_version(self) -> int:
        """Protocol version of the bus: major in the high, minor in the low 16 bits."""
        return self.info.version

    @property
    def outstanding(self) -> int:
        """Packets taken from the ring whose completion has not entered the other ring."""
        return len(self._outstanding) + len(self._gathered) + self._sender.queued

    @property
    def transaction_quota(self) -> int:
        """Most packets outstanding. May be lowered below what is: nothing new is taken then."""
        return self._wanted_quota

    @transaction_quota.setter
    def transaction_quota(self, quota: int) -> None:
        if quota < 1:
            raise ValueError("the transaction quota must be at least 1")
        with self._idle:
            self._wanted_quota = quota
            if not self._paused:
                self._quota = quota
        with self._plan_turn, self._planning:
            pass  # a receive that began with the quota before has ended
        self._wake()

    def set_plan(self, plan: Plan | None) -> None:
        """Has the engine do the packets that fit ``plan``, or none; any thread.

        Returns when no packet is being done by the plan before: what it referred to may be closed
        then. Packets that fit are not seen by ``packet_received``, which otherwise gets packets in
        the order of the ring: the engine does none before the callback for every earlier packet
        that fits no rule has returned.
        """
        with self._plan_turn, self._planning:
            self._plan = plan

    def send(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        transaction_id: int | None = None,
        on_completion: Callable[[bytes | None], None] | None = None,
        packet_type: int = PacketType.DATA_INBAND,
        header: bytes = b"",
    ) -> int:
        """Sends a packet to the guest (VmbPacketSend); returns its transaction id.

        With ``on_completion`` a completion is requested; the callback gets its payload on the
        worker thread, or ``None`` if the channel closes first. Without, the id is 0 unless given.
        If the ring is full the packet waits, in order. Raises :exc:`ChannelClosed`,
        :exc:`PacketTooBig`, :exc:`SendQueueFull`, or :exc:`UsageError` for an id in use.
        """
        flags = 0
        if on_completion is not None:
            flags = COMPLETION_REQUESTED
            if transaction_id is None:
                transaction_id = next(self._transaction_ids)
            if self._awaited.setdefault(transaction_id, on_completion) is not on_completion:
                raise UsageError(f"transaction {transaction_id:#x} is in flight already")
        elif transaction_id is None:
            transaction_id = 0
        if not isinstance(payload, bytes):
            payload = bytes(memoryview(payload))  # changes after the return do not count
        outgoing = Outgoing(packet_type, payload, transaction_id, flags, header)
        try:
            self._before_publish([])
            if not self._sender.send([outgoing], bounded=True):
                raise ChannelClosed(f"channel {self.name} is closed")
        except GuestError as error:
            self._awaited.pop(transaction_id, None)
            self._fail(error)
            raise ChannelClosed(f"channel {self.name} has failed: {error}") from error
        except BaseException:
            if on_completion is not None:
                self._awaited.pop(transaction_id, None)
            raise
        self._wake_for_space()
        return transaction_id

    def request(
        self,
        payload: bytes,
        timeout: float | None = None,
        *,
        wait_for_completion: bool = True,
        cancel: threading.Event | None = None,
    ) -> bytes:
        """Sends a packet and waits for its completion's payload (VmbChannelSendSynchronousRequest).

        Not on the worker thread. ``timeout`` is in seconds, ``None`` for ever; setting ``cancel``
        ends the wait. Without ``wait_for_completion`` nothing is waited for and nothing returned;
        with a ``timeout`` of 0 as well, a full ring raises :exc:`RingFull` where it would queue.
        Raises :exc:`TimeoutError`, :exc:`RequestCancelled`, :exc:`ChannelClosed` (also when it
        closes meanwhile), and what :meth:`send` raises.
        """
        if not wait_for_completion:
            if timeout == 0:
                self._send_now(bytes(payload))
            else:
                self.send(payload)
            return b""
        self._check_may_wait("a request")
        awaited = Awaited()
        transaction_id = self.send(payload, on_completion=awaited.completed)
        try:
            return awaited.wait(timeout, cancel)
        finally:
            self._awaited.pop(transaction_id, None)

    def _send_now(self, payload: bytes) -> None:
        try:
            self._before_publish([])
            if not self._sender.send_now(Outgoing(PacketType.DATA_INBAND, payload, 0)):
                raise ChannelClosed(f"channel {self.name} is closed")
        except GuestError as error:
            self._fail(error)
            raise ChannelClosed(f"channel {self.name} has failed: {error}") from error

    def _check_may_wait(self, what: str) -> None:
        if threading.current_thread() is self._worker:
            raise UsageError(f"{what} would wait for the thread that it is made on")

    def map_gpadl(self, handle: int, *, read_only: bool = False) -> ExternalData:
        """Maps a GPADL that the guest made for this channel (VmbChannelMapGpadl).

        What is written through it is looked up in the code map before the next packet is
        published; with ``read_only`` writing is refused, and nothing has to be looked up. Raises
        :exc:`GpadlUnknown`, or :exc:`UsageError` if it is mapped already.
        """
        self._sender.check_open()
        return self._gpadls.map(handle, self.index, read_only=read_only)

    def unmap_gpadl(self, handle: int) -> None:
        """Ends a mapping (VmbChannelUnmapGpadl)."""
        self._gpadls.unmap(handle)

    @property
    def ring_state(self) -> RingState | None:
        """Occupancy of both rings; the last one known if the channel is closed."""
        with self._handles:
            if self.state is not ChannelState.CLOSED:
                self._note_ring_state()
            return self._last_ring_state

    def _note_ring_state(self) -> None:
        state = self._last_ring_state = self._ring.state
        self.stats.signals_suppressed = state.signals_suppressed

    # -- completions (PacketOwner) -------------------------------------------------------------

    def _take(self, packet: Packet) -> bool:
        """Makes sure that a packet ends once; false if the channel closed before."""
        if self._outstanding.pop(packet.serial, None) is not None:  # atomic: one caller gets it
            packet.completed = True
            return True
        if packet.dropped:
            return False
        raise AlreadyCompleted(f"{packet!r} was completed before")

    def packet_completed(self, packet: Packet, payload: bytes | bytearray | memoryview) -> None:
        """See :meth:`Packet.complete`."""
        if len(payload) > 0xFFFF * 8 - 16:
            raise PacketTooBig(f"a completion of {len(payload)} bytes")
        if not self._take(packet):
            return
        spans: list[tuple[int, int]] = []
        external = packet.external_data
        if external is not None:
            if external.lost:
                self._count_error(GuestMemoryLost("memory", packet.transaction_id))
            if self._handler.tracks_writes():
                spans = external.written
            external.close()
        if not packet.completion_requested:
            self._publish([], spans)
            return
        outgoing = Outgoing(PacketType.COMP, bytes(payload), packet.transaction_id)
        if self._gather and threading.current_thread() is self._worker:
            self._gathered.append(outgoing)
            self._gathered_spans.extend(spans)
            if len(self._gathered) >= GATHER:
                self._flush_gathered()
        else:
            self._publish([outgoing], spans)

    def packet_failed(self, packet: Packet, reason: str) -> None:
        """See :meth:`Packet.fail`."""
        if not self._take(packet):
            return
        if packet.external_data is not None:
            packet.external_data.close()
        self._fail(PacketFailed("packet", packet.transaction_id, packet.ring_offset, reason))
        self._packet_ended()

    def _before_publish(self, spans: list[tuple[int, int]]) -> None:
        if self._handler.tracks_writes():
            spans = spans + self._gpadls.take_written(self.index)
            if not spans:
                return
            try:
                self.stats.code_invalidations += self._handler.before_publish(spans)
            except Exception as error:
                # The guest must not be told: it might go on executing what was overwritten.
                raise CodeInvalidationFailed("gpa", spans[0][0], detail=str(error)) from error

    def _publish(self, completions: list[Outgoing] | Done, spans: list[tuple[int, int]]) -> None:
        try:
            self._before_publish(spans)
            if isinstance(completions, Done):
                self._sender.send_done(completions)
            elif completions:
                self._sender.send(completions)
        except GuestError as error:
            self._fail(error)
        finally:
            self._packet_ended()

    def _flush_gathered(self) -> None:
        if self._gathered:
            completions, self._gathered = self._gathered, []
            spans, self._gathered_spans = self._gathered_spans, []
            self._publish(completions, spans)

    def _packet_ended(self) -> None:
        if self._starved:
            self._wake()
        self._wake_for_space()
        if self._stopping or self._paused:
            with self._idle:
                self._idle.notify_all()

    def _wake_for_space(self) -> None:
        """The worker polls if the guest will not tell when it has made space."""
        if self._sender.queued and threading.current_thread() is not self._worker:
            state = self.ring_state
            if state is not None and not state.peer_signals_space:
                self._wake()

    def _wake(self) -> None:
        with self._handles:
            if self.state is not ChannelState.CLOSED:
                os.eventfd_write(self._wake_fd, 1)

    # -- the worker ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the worker, once."""
        self.state = ChannelState.RUNNING
        self._worker.start()

    def pause(self, timeout: float | None = None) -> None:
        """Takes no packets any more; returns when none is outstanding (VmbChannelPause).

        Before the channel runs (in ``opened`` or ``started``) it returns at once, and the channel
        starts paused. Completions for the host's own packets are not taken either. Not on a thread
        that delivers packets, nor on the device's event loop. Raises :exc:`TimeoutError` after
        ``timeout`` seconds (the channel stays paused), :exc:`ChannelClosed` if it ends meanwhile.
        """
        if self._deferred.is_current_thread:
            raise UsageError("a pause would wait for the packet that it is made in")
        self._check_may_wait("a pause")
        with self._idle:
            self._paused = True
            self._resting = False
            self._quota = 0
        self._wake()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._idle:
            while self._paused and self.state is not ChannelState.OPENING:
                if self.state is not ChannelState.RUNNING or self._stopping:
                    raise ChannelClosed(f"channel {self.name} ended before it was paused")
                if self._resting and not self._outstanding:
                    return
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{len(self._outstanding)} packets are not completed")
                self._idle.wait(left)

    def start(self) -> None:
        """Takes packets again after :meth:`pause` (VmbChannelStart); else does nothing."""
        with self._idle:
            self._paused = self._resting = False
            self._quota = self._wanted_quota
            self._idle.notify_all()
        self._wake()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` was called, and :meth:`start` not since."""
        return self._paused

    def _at_quota(self) -> None:
        """The worker, with nothing in its hands, takes nothing more for now."""
        if not self._paused:
            self.stats.quota_reached += 1
            return
        with self._idle:
            self._resting = True
            self._idle.notify_all()

    def run_beside(self, function: Callable[[], None]) -> None:
        """Runs ``function`` once on a thread of its own, which :meth:`close` waits for."""

        def run() -> None:
            try:
                function()
            except ChannelClosed:
                log.debug("%s: closed while a callback waited", self.name)
            except Exception:
                self.stats.errors["DeviceException"] += 1
                log.exception("%s: the device's code failed", self.name)

        self._beside = threading.Thread(target=run, name=f"{self.name} start", daemon=True)
        self._beside.start()

    def _run(self) -> None:
        fds = (self._kick_fd, self._stop_fd, self._wake_fd)
        try:
            # Before the first wait: packets may have waited here for a new back end, and the one
            # before may have left the ring masked.
            self._process()
            while self.state is not ChannelState.FAILED:
                timeout = None
                if self._sender.queued and not self._ring.state.peer_signals_space:
                    timeout = SPACE_POLL_SECONDS
                fired = wait(fds, timeout)
                self.stats.wakeups += 1
                if fired & _STOP or self._stopping:
                    return
                self._process()
        except GuestError as error:
            self._fail(error)
        except Exception:
            log.exception("%s: the worker died", self.name)
            self._fail(PacketFailed("worker", 0, -1, "internal error"))

    def _process(self) -> None:
        """Takes and hands up everything that is in the ring."""
        ring = self._ring
        ring.mask()
        delivered = 0
        while not self._stopping:
            self._sender.flush()
            if self._quota - self.outstanding <= 0:
                # Announce the wait, then look again: pairs with _packet_ended(), which takes the
                # packet off first and looks at the announcement then.
                self._starved = True
                if self._quota - self.outstanding <= 0:
                    self._at_quota()
                    return  # still masked: what is next is a completion, not the guest's signal
            self._starved = False
            with self._plan_turn:
                self._planning.acquire()
            try:
                budget = self._quota - self.outstanding  # not what it was before the lock
                if budget <= 0:
                    continue
                batch = ring.receive(min(budget, BATCH), self._plan)
            finally:
                self._planning.release()
            taken = len(batch.packets)
            if batch.signal:
                self._sender.signal_space()
            if batch.done is not None:
                taken += batch.done.completions
                self._count_done(batch.done)
                spans = batch.done.written() if self._handler.tracks_writes() else []
                self._publish(batch.done, spans)
            if taken:
                self.stats.batches += 1
                self.stats.max_batch = max(self.stats.max_batch, taken)
                delivered += taken
                self._deliver(batch.packets)
            if batch.error is not None:
                self._fail(batch.error)
            if self.state is ChannelState.FAILED:
                return
            if not taken:
                if delivered:
                    self._handler.processing_complete(self, delivered)
                    delivered = 0
                if not ring.unmask():
                    return
                ring.mask()

    def _count_done(self, done: Done) -> None:
        """What :meth:`_deliver_one` counts, for packets that the plan did."""
        stats = self.stats
        stats.packets_received += done.completions
        stats.packets_planned += done.completions
        stats.bytes_received += done.payload_bytes
        stats.external_bytes += done.external_bytes

    def _deliver(self, packets: list[RawPacket]) -> None:
        try:
            for position, raw in enumerate(packets):
                if self._dropping or self.state is ChannelState.FAILED:
                    for rest in packets[position:]:
                        self.stats.dropped += 1
                        if rest.external_data is not None:
                            rest.external_data.close()
                    return
                self._deliver_one(raw)
        finally:
            self._flush_gathered()
            if self._to_defer:
                deferred, self._to_defer = self._to_defer, []
                self._deferred.put(deferred)

    def packet_deferred(self, packet: Packet) -> None:
        """See :meth:`Packet.defer`."""
        if (
            threading.current_thread() is not self._worker
            or not packet.deferrable
            or [*self._outstanding][-1:] != [packet.serial]  # atomic: others complete packets
        ):
            raise UsageError(f"{packet!r} cannot be deferred here")
        packet.deferrable = False
        self._to_defer.append(packet)

    def _deliver_again(self, packet: Packet) -> None:
        packet.deferred = True
        try:
            self._handler.packet_received(self, packet)
        except Exception as error:
            self.packet_raised(packet, error)

    @property
    def _dropping(self) -> bool:
        """Whether what was taken from the ring is not delivered any more."""
        return self._stopping and not self._draining

    def _deliver_one(self, raw: RawPacket) -> None:
        payload = raw.payload
        self.stats.packets_received += 1
        self.stats.bytes_received += len(payload)
        if raw.type == PacketType.COMP:
            self._completion_arrived(raw, payload)
            return
        if raw.type == PacketType.CANCEL_REQUEST:
            return  # a wish, without an answer: the transaction's completion still comes
        external = raw.external_data
        packet = Packet(
            self,
            next(self._serials),
            raw.transaction_id,
            payload,
            external,
            raw.completion_requested,
            raw.ring_offset,
        )
        self._outstanding[packet.serial] = packet
        try:
            if raw.error is not None:
                self._count_error(raw.error)
                packet.deferrable = False  # there is nothing to receive
                self._handler.packet_rejected(self, packet, raw.error)
            else:
                if external is not None:
                    self.stats.external_bytes += len(external)
                self._handler.packet_received(self, packet)
        except Exception as error:
            self.packet_raised(packet, error)

    def packet_raised(self, packet: Packet, error: BaseException) -> None:
        """The device's code raised ``error`` for this packet: it fails, unless it was completed."""
        if isinstance(error, GuestError):
            # A mistake that the device found while it parsed, or pages that vanished.
            self._count_error(error)
            self._end_after_error(packet, str(error))
        else:
            self.stats.errors["DeviceException"] += 1
            log.error("%s: the device's code failed on %r", self.name, packet, exc_info=error)
            self._end_after_error(packet, "exception in the device's code")

    def _end_after_error(self, packet: Packet, reason: str) -> None:
        if packet.serial in self._outstanding:
            try:
                packet.fail(reason)
            except AlreadyCompleted:
                return

    def _completion_arrived(self, raw: RawPacket, payload: bytes) -> None:
        callback = self._awaited.pop(raw.transaction_id, None)
        if callback is None:
            self._count_error(
                CompletionUnexpected("transaction_id", raw.transaction_id, raw.ring_offset)
            )
            return
        self.stats.completions_received += 1
        try:
            callback(payload)
        except Exception:
            self.stats.errors["DeviceException"] += 1
            log.exception("%s: a completion callback failed", self.name)

    def _count_error(self, error: GuestError) -> None:
        with self._idle:  # from any thread
            self.stats.errors[type(error).__name__] += 1
        self._log.warning("%s: %s", self.name, error)

    def _fail(self, error: GuestError) -> None:
        """Stops for good: no packet is taken any more. Completions may still go out."""
        with self._idle:
            if self.state is not ChannelState.RUNNING:
                return
            self.state = ChannelState.FAILED
            self.error = error
            self._idle.notify_all()
        self._count_error(error)
        self._wake()
        self._handler.channel_failed(self, error)

    # -- the end -------------------------------------------------------------------------------

    def _stop(self, between: Callable[[], None] | None, grace: float, publish: bool) -> None:
        if threading.current_thread() is self._worker or self._deferred.is_current_thread:
            raise UsageError("a channel cannot be closed on its own worker thread")
        self._draining = publish
        self._stopping = True
        if not publish:
            self._sender.detach()
        os.eventfd_write(self._stop_fd, 1)
        with self._idle:
            self._idle.notify_all()  # a pause that waits
        if self._worker.ident is not None:
            self._worker.join()
        self._deferred.close(drop=not publish)
        deadline = time.monotonic() + grace
        if between is not None:
            between()
        with self._idle:
            while self._outstanding and (left := deadline - time.monotonic()) > 0:
                self._idle.wait(left)
        self._sender.detach()
        self._drop_outstanding()
        for transaction_id in list(self._awaited):
            callback = self._awaited.pop(transaction_id, None)
            if callback is not None:
                callback(None)
        if self._beside is not None:
            self._beside.join()

    def _drop_outstanding(self) -> None:
        for serial in list(self._outstanding):
            packet = self._outstanding.pop(serial, None)
            if packet is None:
                continue  # completed at this moment
            packet.completed = packet.dropped = True
            self.stats.dropped += 1
            if packet.external_data is not None:
                packet.external_data.close(wait=True)

    def drop_packets_in(self, guest_phys_addr: int, size: int) -> int:
        """Ends outstanding packets with external data in memory that goes away. How many."""
        dropped = 0
        for serial, packet in list(self._outstanding.items()):
            external = packet.external_data
            if external is None or not any(
                gpa < guest_phys_addr + size and guest_phys_addr < gpa + length
                for gpa, length in external.segments
            ):
                continue
            if self._outstanding.pop(serial, None) is not None:
                packet.completed = packet.dropped = True
                external.close(wait=True)
                if packet.completion_requested:
                    self._publish([Outgoing(PacketType.COMP, b"", packet.transaction_id)], [])
                dropped += 1
        return dropped

    def close(
        self,
        between: Callable[[], None] | None = None,
        grace: float = 1.0,
        *,
        publish: bool = False,
    ) -> None:
        """Stops the worker, ends every packet, detaches the ring.

        ``between`` runs when no packet is delivered any more. Packets that nobody completes within
        ``grace`` seconds are taken away from whoever holds them. Completions are dropped, or, with
        ``publish``, still go to the guest: for a guest that keeps the channel open and waits for
        the next back end, so that what was taken is answered. Returns when neither the ring nor
        external data is touched.
        """
        if self.state is ChannelState.CLOSED:
            return
        self._stop(between, grace, publish)
        with self._handles:
            self._note_ring_state()
            self.state = ChannelState.CLOSED
            self._ring.close()
            for fd in (self._kick_fd, self._call_fd, self._stop_fd, self._wake_fd):
                os.close(fd)

    def as_dict(self) -> dict[str, Any]:
        """State and counters, ready for JSON."""
        ring = self.ring_state
        return {
            "index": self.index,
            "state": self.state.value,
            "error": str(self.error) if self.error else None,
            "paused": self._paused,
            "quota": self._wanted_quota,
            "outstanding": self.outstanding,
            "queued": self._sender.queued,
            "ring": ring._asdict() if ring else None,
            **self.stats.as_dict(),
        }

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.state.value}>"
