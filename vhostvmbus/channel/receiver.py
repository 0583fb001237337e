# SPDX-License-Identifier: GPL-2.0-or-later
"""The receiving half of a channel: the worker thread, which takes packets and hands them up.

It waits for the guest's signal, takes packets in batches, has the engine do those that fit the
device's plan, and delivers the others in the order of the ring. Invariants:

* it takes no more than the quota leaves at the moment when it takes;
* it rests, with the ring masked, only after it announced that it starves and looked again;
* the plan is exchanged, and a new quota in force, when no receive by the old one runs.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from vhostvmbus.channel.deferred import DeferredPackets
from vhostvmbus.channel.handler import ChannelHandler
from vhostvmbus.channel.host_packets import HostPackets
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.channel.packet import Packet
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.sender import Sender
from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.ring import AnyPlan, Batch, Done, Outgoing, RawPacket, Ring, Served, wait
from vhostvmbus.wire.errors import GuestError, PacketFailed, UsageError
from vhostvmbus.wire.vmbus import PacketType

if TYPE_CHECKING:
    from vhostvmbus.channel.channel import Channel

log = logging.getLogger("vhostvmbus.channel.channel")  # one name for all that a channel logs

BATCH = 64
"""Packets taken from the ring at a time, at most."""
SPACE_POLL_SECONDS = 0.01
"""How often a full ring is looked at when the guest does not announce ``pending_send_sz``."""
_KICK, _STOP, _WAKE = 1, 2, 4


class Receiver:
    """The worker of one channel.

    ``publish`` sends what the plan completed; ``delivered`` is called after each batch that was
    handed up, however that ended. ``outstanding`` is the channel's table: a packet enters it here
    and leaves it when it ends.
    """

    def __init__(
        self,
        channel: "Channel",
        handler: ChannelHandler,
        ring: Ring,
        life: ChannelLife,
        quota: Quota,
        sender: Sender,
        host_packets: HostPackets,
        outstanding: dict[int, Packet],
        stats: ChannelStats,
        publish: Callable[[list[Outgoing] | Done, list[tuple[int, int]]], None],
        delivered: Callable[[], None],
    ) -> None:
        self.starved = False
        """The worker waits for a packet to end: who ends one has to wake it."""
        self.thread = threading.Thread(target=self._run, name=life.name, daemon=True)
        self.caught_up = threading.Event()
        """Set when what was in the in-flight region has been delivered, or never will be."""
        self.deferred = DeferredPackets(life.name, self._deliver_again)
        self._channel = channel
        self._handler = handler
        self._ring = ring
        self._life = life
        self._quota = quota
        self._sender = sender
        self._host_packets = host_packets
        self._outstanding = outstanding
        self._publish = publish
        self._delivered = delivered
        self._stats = stats
        self._serials = count(1)
        self._to_defer: list[Packet] = []
        self._plan: AnyPlan | None = None
        self._planned = False  # a receive by the plan runs: it may be waiting
        self._planning = threading.Lock()  # held while the engine may do something by the plan
        self._plan_turn = threading.Lock()  # passed by the worker first: no wait for two receives

    def set_plan(self, plan: AnyPlan | None) -> None:
        """See :meth:`Channel.set_plan`."""
        with self._engine_left():
            self._plan = plan

    def wait_for_engine(self) -> None:
        """Returns when the receive that runs, by the quota before, has ended and is counted."""
        with self._engine_left():
            pass

    @contextmanager
    def _engine_left(self) -> Iterator[None]:
        """While nothing is received."""
        with self._plan_turn:
            if self._planned:
                self._life.wake()
            with self._planning:
                yield

    def defer(self, packet: Packet) -> None:
        """See :meth:`Packet.defer`."""
        if (
            threading.current_thread() is not self.thread
            or not packet.deferrable
            or [*self._outstanding][-1:] != [packet.serial]  # atomic: others complete packets
        ):
            raise UsageError(f"{packet!r} cannot be deferred here")
        packet.deferrable = False
        self._to_defer.append(packet)

    def _run(self) -> None:
        life = self._life
        fds = (life.kick_fd, life.stop_fd, life.wake_fd)
        try:
            self._look_for_more()
            # Before the first wait: packets may have waited here for a new back end, and the one
            # before may have left the ring masked.
            self._process()
            while life.state is not ChannelState.FAILED and not life.stopping:
                timeout = None
                if self._sender.queued and not self._ring.state.peer_signals_space:
                    timeout = SPACE_POLL_SECONDS
                fired = wait(fds, timeout)
                self._stats.wakeups += 1
                if fired & _STOP or life.stopping:
                    return
                self._process()
        except GuestError as error:
            life.fail(error)
        except Exception:
            log.exception("%s: the worker died", life.name)
            life.fail(PacketFailed("worker", 0, -1, "internal error"))
        finally:
            self.caught_up.set()

    def _look_for_more(self) -> None:
        """Whether packets of the back end before are still to come."""
        if not self._ring.to_replay:
            self.caught_up.set()

    def _process(self) -> None:
        """Takes and hands up everything that is in the ring."""
        channel, life, quota, ring = self._channel, self._life, self._quota, self._ring
        ring.mask()
        delivered = 0
        while not life.stopping:
            self._sender.flush()
            if quota.now - channel.outstanding <= 0:
                # Announce the wait, then look again: pairs with Channel._packet_ended(), which
                # takes the packet off first and looks at the announcement then.
                self.starved = True
                if quota.now - channel.outstanding <= 0:
                    quota.reached()
                    return  # still masked: what is next is a completion, not the guest's signal
            self.starved = False
            with self._plan_turn:
                self._planning.acquire()
                self._planned = self._plan is not None
            try:
                budget = quota.now - channel.outstanding  # not what it was before the lock
                if budget <= 0:
                    continue
                plan, served = self._plan, None
                if plan is not None and not delivered and self._alone():
                    batch, served = self._serve(plan, min(budget, BATCH))
                else:
                    batch = ring.receive(min(budget, BATCH), plan)
            finally:
                self._planned = False
                self._planning.release()
            taken = len(batch.packets)
            if batch.signal:
                self._sender.signal_space()
            if served is not None:
                self._publish_done(batch.done, served.answered)
            elif batch.done is not None:
                taken += batch.done.packets
                self._count_done(batch.done)
                self._publish_done(batch.done)
            if taken:
                self._stats.batches += 1
                self._stats.max_batch = max(self._stats.max_batch, taken)
                delivered += taken
                self._deliver(batch.packets)
            if batch.replayed:
                self._stats.packets_replayed += batch.replayed
                self._look_for_more()
            if batch.error is not None:
                life.fail(batch.error)
            if life.state is ChannelState.FAILED:
                return
            if batch.no_slot and not taken:
                self.starved = True  # as above: announced, then looked at again
                if not ring.has_slot:
                    return
                continue
            if served is not None and not taken:
                if served.fired & _STOP:
                    return
                continue  # it did the waiting, too
            if not taken:
                if delivered:
                    self._handler.processing_complete(channel, delivered)
                    delivered = 0
                if not ring.unmask():
                    return
                ring.mask()

    def _alone(self) -> bool:
        """Whether nobody but the plan has anything to do while nothing else comes."""
        return not (self._sender.queued or self._handler.wants_processing_complete)

    def _serve(self, plan: AnyPlan, most: int) -> tuple[Batch, Served]:
        """Has the engine go on by itself as long as the plan fits; counts what it did."""
        life, stats = self._life, self._stats
        fds = (life.kick_fd, life.stop_fd, life.wake_fd, life.call_fd)
        batch, served = self._ring.serve(most, plan, fds, self._handler.gather_microseconds)
        stats.packets_received += served.packets
        stats.packets_planned += served.packets
        stats.completions_received += served.packets - served.wanted
        stats.bytes_received += served.payload_bytes
        stats.external_bytes += served.external_bytes
        stats.batches += served.batches
        stats.max_batch = max(stats.max_batch, served.max_batch)
        stats.wakeups += served.wakeups
        stats.rests += served.rests
        self._sender.count_answers(served.completions, served.signals)
        return batch, served

    def _publish_done(self, done: Done | None, first: int = 0) -> None:
        """Sends what a plan has left to be answered, from number ``first`` on."""
        if done is not None and (first < done.completions or not done.completions):
            spans = done.written() if self._handler.written.watched else []
            self._publish(done.outgoing(first) if first else done, spans)

    def _count_done(self, done: Done) -> None:
        """What :meth:`_deliver_one` counts, for packets that the plan did."""
        stats = self._stats
        stats.packets_received += done.packets
        stats.packets_planned += done.packets
        stats.completions_received += done.packets - done.completions
        stats.bytes_received += done.payload_bytes
        stats.external_bytes += done.external_bytes

    def _deliver(self, packets: list[RawPacket]) -> None:
        life = self._life
        try:
            for position, raw in enumerate(packets):
                if life.dropping or life.state is ChannelState.FAILED:
                    for rest in packets[position:]:
                        self._stats.dropped += 1
                        if rest.external_data is not None:
                            rest.external_data.close()
                    return
                self._deliver_one(raw)
        finally:
            self._delivered()
            if self._to_defer:
                deferred, self._to_defer = self._to_defer, []
                self.deferred.put(deferred)

    def _deliver_one(self, raw: RawPacket) -> None:
        payload = raw.payload
        self._stats.packets_received += 1
        self._stats.bytes_received += len(payload)
        if raw.type == PacketType.COMP:
            self._host_packets.completion_arrived(raw, payload)
            return
        if raw.type == PacketType.CANCEL_REQUEST:
            return  # a wish, without an answer: the transaction's completion still comes
        external = raw.external_data
        packet = Packet(
            self._channel,
            next(self._serials),
            raw.transaction_id,
            payload,
            external,
            raw.completion_requested,
            raw.ring_offset,
            raw.slot,
        )
        if raw.replayed:
            packet.replayed = True
        self._outstanding[packet.serial] = packet
        try:
            if raw.error is not None:
                self._life.count_error(raw.error)
                packet.deferrable = False  # there is nothing to receive
                self._handler.packet_rejected(self._channel, packet, raw.error)
            else:
                if external is not None:
                    self._stats.external_bytes += len(external)
                self._handler.packet_received(self._channel, packet)
        except Exception as error:
            self._channel.packet_raised(packet, error)

    def _deliver_again(self, packet: Packet) -> None:
        packet.deferred = True
        try:
            self._handler.packet_received(self._channel, packet)
        except Exception as error:
            self._channel.packet_raised(packet, error)
