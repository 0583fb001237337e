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
from typing import Generic, TypeVar

from vhostvmbus.channel.completions import Completions
from vhostvmbus.channel.deferred import DeferredPackets
from vhostvmbus.channel.handler import ChannelHandler
from vhostvmbus.channel.host_packets import HostPackets
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.channel.packet import Packet, PacketChannel
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.sender import Sender
from vhostvmbus.ring import AnyPlan, Batch, RawPacket, Served, wait
from vhostvmbus.wire.errors import GuestError, PacketFailed
from vhostvmbus.wire.vmbus import PacketType

log = logging.getLogger("vhostvmbus.channel.channel")  # one name for all that a channel logs

BATCH = 64
"""Packets taken from the ring at a time, at most."""
SPACE_POLL_SECONDS = 0.01
"""Seconds between two looks at a full ring when the guest does not announce ``pending_send_sz``."""
_KICK, _STOP, _WAKE = 1, 2, 4

AnyChannel = TypeVar("AnyChannel", bound=PacketChannel)
"""The channel that the handler's callbacks, and packets, get."""


class Receiver(Generic[AnyChannel]):
    """The worker of one channel. A packet that it delivers is in ``completions`` until it ends."""

    def __init__(
        self,
        channel: AnyChannel,
        handler: ChannelHandler[AnyChannel],
        life: ChannelLife,
        quota: Quota,
        sender: Sender,
        completions: Completions,
        host_packets: HostPackets,
    ) -> None:
        self.thread = threading.Thread(target=self._run, name=life.name, daemon=True)
        life.worker = self.thread
        self.caught_up = threading.Event()
        """Set when what was in the in-flight region has been delivered, or never will be."""
        self.deferred = DeferredPackets(life.name, self._deliver_again, life.left.returned)
        self.ended: Callable[[], None] = life.left.returned
        """Called on the worker as the last thing."""
        self._channel = channel
        self._handler = handler
        self._ring = life.ring
        self._life = life
        self._stats = life.stats
        self._quota = quota
        self._sender = sender
        self._completions = completions
        self._host_packets = host_packets
        self._serials = count(1)
        self._plan: AnyPlan | None = None
        self._planned = False  # a receive by the plan runs: it may be waiting
        self._planning = threading.Lock()  # held while the engine may do something by the plan
        self._plan_turn = threading.Lock()  # passed by the worker first: no wait for two receives

    def set_plan(self, plan: AnyPlan | None) -> None:
        """See :meth:`Channel.set_plan`."""
        with self._engine_left():
            self._plan = plan

    def wait_for_engine(self, timeout: float = -1) -> None:
        """Returns when the receive that runs, by the quota before, has ended and is counted.

        With a ``timeout`` it returns after so many seconds all the same.
        """
        if not self._plan_turn.acquire(timeout=timeout):
            return
        try:
            if self._planned:
                self._life.wake()
            if self._planning.acquire(timeout=timeout):
                self._planning.release()
        finally:
            self._plan_turn.release()

    @property
    def in_engine(self) -> bool:
        """Tells whether the worker may be doing something by the plan."""
        return self._planned

    @contextmanager
    def _engine_left(self) -> Iterator[None]:
        """Holds the worker off the ring: nothing is received meanwhile."""
        with self._plan_turn:
            if self._planned:
                self._life.wake()
            with self._planning:
                yield

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
                if self._sender.waits and not self._ring.state.peer_signals_space:
                    timeout = SPACE_POLL_SECONDS
                fired = wait(fds, timeout)
                self._stats.wakeups += 1
                if fired & _STOP or life.stopping:
                    return
                self._process()
        except GuestError as error:
            life.fail(error)
        except BaseException as error:  # the device's code may raise anything
            if life.state is ChannelState.CLOSED:
                log.debug("%s: what was left behind has ended: %r", life.name, error)
            else:
                log.exception("%s: the worker died", life.name)
                life.fail(PacketFailed("worker", 0, -1, "internal error"))
        finally:
            self.caught_up.set()
            self.ended()

    def _look_for_more(self) -> None:
        """Sets :attr:`caught_up` unless packets of the back end before are still to come."""
        if not self._ring.to_replay:
            self.caught_up.set()

    def _process(self) -> None:
        """Takes and hands up everything that is in the ring."""
        life, quota, ring, completions = self._life, self._quota, self._ring, self._completions
        if quota.still:
            return
        ring.mask()
        delivered = 0
        while not life.stopping:
            self._sender.flush()
            if completions.room <= 0:
                # Announce the wait, then look again: pairs with Quota.packet_ended(), which is
                # called when the packet is off, and looks at the announcement then.
                quota.starved = True
                if completions.room <= 0:
                    quota.reached()
                    return  # still masked: what is next is a completion, not the guest's signal
            quota.starved = False
            with self._plan_turn:
                self._planning.acquire()
                self._planned = self._plan is not None
            try:
                budget = completions.room  # not what it was before the lock
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
            done = batch.done
            if done is not None:
                if served is not None:
                    completions.publish_done(done, served.answered)
                else:
                    taken += done.packets
                    self._stats.count_planned(
                        done.packets, done.completions, done.payload_bytes, done.external_bytes
                    )
                    completions.publish_done(done)
            if taken:
                self._stats.count_batches(1, taken)
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
                quota.starved = True  # as above: announced, then looked at again
                if not ring.has_slot:
                    return
                continue
            if served is not None and not taken:
                if served.fired & _STOP:
                    return
                continue  # it did the waiting, too
            if not taken:
                if delivered:
                    self._tell_of(delivered)
                    delivered = 0
                if not ring.unmask():
                    return
                ring.mask()

    def _tell_of(self, delivered: int) -> None:
        try:
            self._handler.processing_complete(self._channel, delivered)
        except BaseException as error:
            self._life.count_exception("processing_complete() failed", error)
            raise PacketFailed("worker", 0, -1, "exception in the device's code") from error

    def _alone(self) -> bool:
        """Tells whether nobody but the plan has anything to do while nothing else comes."""
        return not (self._sender.queued or self._handler.wants_processing_complete)

    def _serve(self, plan: AnyPlan, most: int) -> tuple[Batch, Served]:
        """Has the engine go on by itself as long as the plan fits, and counts what it did."""
        life, stats = self._life, self._stats
        fds = (life.kick_fd, life.stop_fd, life.wake_fd, life.call_fd)
        batch, served = self._ring.serve(most, plan, fds, self._handler.gather_microseconds)
        stats.count_planned(
            served.packets, served.wanted, served.payload_bytes, served.external_bytes
        )
        stats.count_batches(served.batches, served.max_batch)
        stats.wakeups += served.wakeups
        stats.rests += served.rests
        self._sender.count(completions=served.completions, signals=served.signals)
        return batch, served

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
            self._completions.flush()
            if deferred := self._completions.take_deferred():
                self.deferred.put(deferred)

    def _deliver_one(self, raw: RawPacket) -> None:
        payload, external = raw.payload, raw.external_data
        self._stats.count_received(1, len(payload), 0 if external is None else len(external))
        if raw.type == PacketType.COMP:
            self._host_packets.completion_arrived(raw, payload)
            return
        if raw.type == PacketType.CANCEL_REQUEST:
            return  # a wish, without an answer: the transaction's completion still comes
        packet = Packet(
            self._channel,
            self._completions,
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
        self._completions.packets[packet.serial] = packet
        if self._completions.ended:
            self._completions.drop_late(packet)
            return
        try:
            if raw.error is not None:
                self._life.count_error(raw.error)
                packet.deferrable = False  # there is nothing to receive
                self._handler.packet_rejected(self._channel, packet, raw.error)
            else:
                self._handler.packet_received(self._channel, packet)
        except BaseException as error:
            self._completions.raised(packet, error)

    def _deliver_again(self, packet: Packet) -> None:
        packet.deferred = True
        try:
            self._handler.packet_received(self._channel, packet)
        except BaseException as error:
            self._completions.raised(packet, error)
