# SPDX-License-Identifier: GPL-2.0-or-later
"""One open channel at the host's end: what devices and packets see of it, and its end.

The receiver takes packets and hands them up, on the worker thread; they are completed here, from
any thread; what the host sends of its own accord is the host packets' business. Invariants:

* never more packets outstanding (completions that wait for space included) than the quota;
* a completion becomes visible to the guest only after translated code was discarded;
* after :meth:`Channel.close` returned, nothing touches the ring or the external data.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from vhostvmbus.channel.gpadl import Gpadl, GpadlTable
from vhostvmbus.channel.handler import ChannelHandler, ChannelInfo
from vhostvmbus.channel.host_packets import HostPackets
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.channel.packet import Packet
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.receiver import Receiver
from vhostvmbus.channel.sender import Sender
from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.memory import ExternalData
from vhostvmbus.ring import AnyPlan, Done, Outgoing, Ring, RingState
from vhostvmbus.ring.ring import RingHandle
from vhostvmbus.wire.errors import (
    AlreadyCompleted,
    ChannelClosed,
    CodeInvalidationFailed,
    GuestError,
    GuestMemoryLost,
    PacketFailed,
    PacketTooBig,
    UsageError,
)
from vhostvmbus.wire.vmbus import PacketType

log = logging.getLogger(__name__)

GATHER = 16
"""Completions published together, at most, for devices with ``gather_completions``."""


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
        self._stats = ChannelStats()
        self.target_vp = info.target_vp
        self._handler = handler
        self._gpadls = gpadls
        self._gather = handler.gather_completions
        self._outstanding: dict[int, Packet] = {}
        self._gathered: list[Outgoing] = []
        self._gathered_spans: list[tuple[int, int]] = []
        self._ring = ring
        self._before_detach: Callable[[], None] | None = None
        self._life = life = ChannelLife(
            self.name,
            ring,
            kick_fd,
            call_fd,
            self._stats,
            lambda error: handler.channel_failed(self, error),
        )
        self._sender = Sender(ring, life.call_fd, self._stats, life.wake)
        self._quota = Quota(handler.transaction_quota, self._outstanding, life, self._stats)
        self._host_packets = HostPackets(life, self._sender, self._stats, self._before_publish)
        self._receiver = Receiver(
            self,
            handler,
            ring,
            life,
            self._quota,
            self._sender,
            self._host_packets,
            self._outstanding,
            self._stats,
            self._publish,
            self._flush_gathered,
        )
        self._worker = self._receiver.thread
        self._beside: threading.Thread | None = None
        self.ring_gpadl: Gpadl | None = None
        """The GPADL that the ring was attached from."""

    @property
    def stats(self) -> ChannelStats:
        """Counters, up to this moment."""
        if threading.current_thread() is not self._worker:
            self._receiver.wait_for_engine()
        return self._stats

    # -- what a device sees --------------------------------------------------------------------

    @property
    def state(self) -> ChannelState:
        """Where in its life the channel is."""
        return self._life.state

    @property
    def error(self) -> GuestError | None:
        """Why it failed."""
        return self._life.error

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
        return self._quota.wanted

    @transaction_quota.setter
    def transaction_quota(self, quota: int) -> None:
        self._quota.set(quota)
        self._receiver.wait_for_engine()
        self._life.wake()

    def set_plan(self, plan: AnyPlan | None) -> None:
        """Has the engine do the packets that fit ``plan``, or none; any thread.

        Returns when no packet is being done by the plan before: what it referred to may be closed
        then. Packets that fit are not seen by ``packet_received``, which otherwise gets packets in
        the order of the ring: the engine does none before the callback for every earlier packet
        that fits no rule has returned.
        """
        self._receiver.set_plan(plan)

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
        """Sends a packet to the guest (VmbPacketSend); returns its transaction id.

        ``header`` stands between the descriptor and the payload of types that have one
        (:func:`~vhostvmbus.wire.transfer.build_transfer_pages`). ``written`` is guest memory,
        as ``(gpa, length)``, that the packet points to and that nothing else counts as written.
        With ``on_completion`` a completion is requested; the callback gets its payload on the
        worker thread, or ``None`` if the channel closes first. Without, the id is 0 unless given.
        If the ring is full the packet waits, in order. Raises :exc:`ChannelClosed`,
        :exc:`PacketTooBig`, :exc:`SendQueueFull`, or :exc:`UsageError` for an id in use.
        """
        return self._host_packets.send(
            payload, transaction_id, on_completion, packet_type, header, written
        )

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
        if wait_for_completion:
            self._check_may_wait("a request")
            return self._host_packets.request(payload, timeout, cancel)
        if timeout == 0:
            self._host_packets.send_now(bytes(payload))
        else:
            self.send(payload)
        return b""

    def _check_may_wait(self, what: str) -> None:
        if threading.current_thread() is self._worker:
            raise UsageError(f"{what} would wait for the thread that it is made on")

    @property
    def note(self) -> bytes:
        """Up to 256 bytes that outlive the back end, with the packets in flight.

        What is set here is found by a device that is resumed, of this back end or of the next one
        after it was killed. Empty when the guest opens the channel, and always if the front end
        keeps no in-flight region. What is found comes from a file that has been in other hands.
        Raises :exc:`ChannelClosed`; setting, :exc:`ValueError` for more bytes.
        """
        return self._life.note()

    @note.setter
    def note(self, data: bytes) -> None:
        self._life.keep_note(data)

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

    def lend_ring(self, before_detach: Callable[[], None]) -> tuple[RingHandle, int]:
        """``(struct vvb_ring *, call eventfd)``, for a device that sends from C.

        ``before_detach`` is called, on any thread, when the channel closes, after its worker has
        ended, and returns when neither is used any more.
        """
        self._before_detach = before_detach
        return self._ring.handle, self._life.call_fd

    def count_sent(self, packets: int, payload_bytes: int, signals: int) -> None:
        """Counts what such a device sent."""
        self._sender.count_sent(packets, payload_bytes, signals)

    @property
    def ring_state(self) -> RingState | None:
        """Occupancy of both rings; the last one known if the channel is closed."""
        return self._life.ring_state

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
                self._life.count_error(GuestMemoryLost("memory", packet.transaction_id))
            if self._handler.written.watched:
                spans = external.written
            external.close()
        if not packet.completion_requested:
            self._publish([], spans)
            return
        outgoing = Outgoing(
            PacketType.COMP, bytes(payload), packet.transaction_id, slot=packet.slot
        )
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
        self._life.fail(PacketFailed("packet", packet.transaction_id, packet.ring_offset, reason))
        self._packet_ended()

    def packet_deferred(self, packet: Packet) -> None:
        """See :meth:`Packet.defer`."""
        self._receiver.defer(packet)

    def packet_raised(self, packet: Packet, error: BaseException) -> None:
        """The device's code raised ``error`` for this packet: it fails, unless it was completed."""
        if isinstance(error, GuestError):
            # A mistake that the device found while it parsed, or pages that vanished.
            self._life.count_error(error)
            self._end_after_error(packet, str(error))
        else:
            self._stats.errors["DeviceException"] += 1
            log.error("%s: the device's code failed on %r", self.name, packet, exc_info=error)
            self._end_after_error(packet, "exception in the device's code")

    def _end_after_error(self, packet: Packet, reason: str) -> None:
        if packet.serial in self._outstanding:
            try:
                packet.fail(reason)
            except AlreadyCompleted:
                return

    def _before_publish(self, spans: list[tuple[int, int]]) -> None:
        written = self._handler.written
        if written.watched:
            spans = spans + self._gpadls.take_written(self.index)
            if not spans:
                return
            try:
                self._stats.code_invalidations += written.report(spans)
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
            self._life.fail(error)
        finally:
            self._packet_ended()

    def _flush_gathered(self) -> None:
        if self._gathered:
            completions, self._gathered = self._gathered, []
            spans, self._gathered_spans = self._gathered_spans, []
            self._publish(completions, spans)

    def _packet_ended(self) -> None:
        if self._receiver.starved:
            self._life.wake()
        if self._life.stopping or self._quota.paused:
            self._life.notify()

    # -- the worker ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the worker, once."""
        self._life.state = ChannelState.RUNNING
        self._worker.start()

    def pause(self, timeout: float | None = None) -> None:
        """Takes no packets any more; returns when none is outstanding (VmbChannelPause).

        Before the channel runs (in ``opened`` or ``started``) it returns at once, and the channel
        starts paused. Completions for the host's own packets are not taken either. Not on a thread
        that delivers packets, nor on the device's event loop. Raises :exc:`TimeoutError` after
        ``timeout`` seconds (the channel stays paused), :exc:`ChannelClosed` if it ends meanwhile.
        """
        if self._receiver.deferred.is_current_thread:
            raise UsageError("a pause would wait for the packet that it is made in")
        self._check_may_wait("a pause")
        self._quota.pause(timeout)

    def start(self) -> None:
        """Takes packets again after :meth:`pause` (VmbChannelStart); else does nothing."""
        self._quota.start()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` was called, and :meth:`start` not since."""
        return self._quota.paused

    def run_beside(self, function: Callable[[], None]) -> None:
        """Runs ``function`` once on a thread of its own, which :meth:`close` waits for."""

        def run() -> None:
            try:
                function()
            except ChannelClosed:
                log.debug("%s: closed while a callback waited", self.name)
            except Exception:
                self._stats.errors["DeviceException"] += 1
                log.exception("%s: the device's code failed", self.name)

        self._beside = threading.Thread(target=run, name=f"{self.name} start", daemon=True)
        self._beside.start()

    # -- the end -------------------------------------------------------------------------------

    def _stop(self, between: Callable[[], None] | None, grace: float, publish: bool) -> None:
        if threading.current_thread() is self._worker or self._receiver.deferred.is_current_thread:
            raise UsageError("a channel cannot be closed on its own worker thread")
        if self.info.resumed and not publish and self._worker.ident is not None:
            # Nobody else will do these: their guest may wait for them without end.
            self._receiver.caught_up.wait(grace)
        self._life.draining = publish
        self._life.stopping = True
        if not publish:
            self._sender.detach()
        os.eventfd_write(self._life.stop_fd, 1)
        self._life.notify()  # a pause that waits
        if self._worker.ident is not None:
            self._worker.join()
        self._receiver.deferred.close(drop=not publish)
        if self._before_detach is not None:
            self._before_detach()
        deadline = time.monotonic() + grace
        if between is not None:
            between()
        with self._life.idle:
            while self._outstanding and (left := deadline - time.monotonic()) > 0:
                self._life.idle.wait(left)
        self._sender.detach()
        self._drop_outstanding()
        self._host_packets.close()
        if self._beside is not None:
            self._beside.join()

    def _drop_outstanding(self) -> None:
        for serial in list(self._outstanding):
            packet = self._outstanding.pop(serial, None)
            if packet is None:
                continue  # completed at this moment
            packet.completed = packet.dropped = True
            self._stats.dropped += 1
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
                    empty = Outgoing(PacketType.COMP, b"", packet.transaction_id, slot=packet.slot)
                    self._publish([empty], [])
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

        Packets that were in flight when a back end before this one ended are delivered first, as
        far as that takes no longer than ``grace`` seconds.
        ``between`` runs when no packet is delivered any more. Packets that nobody completes within
        ``grace`` seconds are taken away from whoever holds them. Completions are dropped, or, with
        ``publish``, still go to the guest: for a guest that keeps the channel open and waits for
        the next back end, so that what was taken is answered. Returns when neither the ring nor
        external data is touched.
        """
        if self.state is ChannelState.CLOSED:
            return
        self._stop(between, grace, publish)
        self._life.close()

    def as_dict(self) -> dict[str, Any]:
        """State and counters, ready for JSON."""
        ring = self.ring_state
        return {
            "index": self.index,
            "state": self.state.value,
            "error": str(self.error) if self.error else None,
            "paused": self._quota.paused,
            "quota": self._quota.wanted,
            "outstanding": self.outstanding,
            "queued": self._sender.queued,
            "ring": ring._asdict() if ring else None,
            **self.stats.as_dict(),
        }

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.state.value}>"
