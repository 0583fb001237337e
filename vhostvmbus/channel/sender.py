# SPDX-License-Identifier: GPL-2.0-or-later
"""The sending half of a channel: in order, whatever the ring's state, from any thread.

Invariants: packets enter the ring in the order in which they were handed over; when the ring is
full they wait here, ``pending_send_sz`` asks the guest for a signal, and :meth:`flush` goes on.
After :meth:`detach` returned, nothing touches the ring.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.ring import Done, Outgoing, Ring, Sent, signal
from vhostvmbus.wire.errors import ChannelClosed, RingFull, SendQueueFull
from vhostvmbus.wire.vmbus import PacketType

MAX_QUEUED = 4096
"""Host-initiated packets that may wait for space. Completions are bounded by the quota instead."""


FLUSH = 64
"""Packets that waited, put into the ring at a time."""


class Sender:
    """Puts packets into the ring and signals the guest when the protocol wants it.

    ``wake`` has the worker look at everything again: it may be waiting in the engine, which takes
    the guest's signal that there is space for one that packets have come.
    """

    def __init__(
        self, ring: Ring, call_fd: int, stats: ChannelStats, wake: Callable[[], None]
    ) -> None:
        self._ring = ring
        self._call_fd = call_fd
        self._stats = stats
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: deque[Outgoing] = deque()
        self._detached = False

    @property
    def queued(self) -> int:
        """Packets that wait for space in the ring."""
        return len(self._queue)

    def send(self, packets: Sequence[Outgoing], *, bounded: bool = False) -> bool:
        """Sends or queues packets, with one write-index store. False if detached.

        ``bounded`` refuses, with :exc:`SendQueueFull`, to queue beyond :data:`MAX_QUEUED`. Raises
        the error of a :class:`Sent`.
        """
        with self._lock:
            if self._detached:
                self._stats.dropped += sum(packet.type == PacketType.COMP for packet in packets)
                return False
            if bounded and len(self._queue) >= MAX_QUEUED:
                raise SendQueueFull(f"{len(self._queue)} packets wait for space in the ring")
            for packet in packets:
                self._count(packet)
            if self._queue:
                self._wait_in_line(packets)
                return True
            sent = self._ring.send_many(packets)
            self._signal_for(sent)
            if sent.full:
                self._stats.ring_full += 1
                self._wait_in_line(packets[sent.entered :])
        return True

    def send_done(self, done: Done) -> None:
        """Like :meth:`send`, for the completions that a plan left."""
        with self._lock:
            if self._detached:
                self._stats.dropped += done.completions
                return
            self._stats.completions_sent += done.completions
            if self._queue:
                self._wait_in_line(done.outgoing(0))
                return
            sent = self._ring.send_many(done)
            self._signal_for(sent)
            if sent.full:
                self._stats.ring_full += 1
                self._wait_in_line(done.outgoing(sent.entered))

    def send_now(self, packet: Outgoing) -> bool:
        """Sends a packet at once or not at all: :exc:`RingFull`. False if detached."""
        with self._lock:
            if self._detached:
                return False
            if self._queue:
                raise RingFull("packets wait for space in the ring")
            sent = self._ring.send_many([packet])
            self._signal_for(sent)
            sent.check()
            self._count(packet)
        return True

    def _count(self, packet: Outgoing) -> None:
        """Under the lock, and before the peer can know: counters are never behind the guest."""
        if packet.type == PacketType.COMP:
            self._stats.completions_sent += 1
        else:
            self._stats.packets_sent += 1
            self._stats.bytes_sent += len(packet.payload)

    def _signal_for(self, sent: Sent) -> None:
        """Signals for what went into the ring; raises what is wrong with the next packet."""
        if sent.signal:
            self._signal()
        if sent.error is not None:
            raise sent.error

    def _wait_in_line(self, packets: Sequence[Outgoing]) -> None:
        first = not self._queue
        self._queue.extend(packets)
        if first:
            self._ring.hold(True)
            self._wake()
        self._stats.max_queued = max(self._stats.max_queued, len(self._queue))

    def _signal(self) -> None:
        self._stats.signals_sent += 1
        signal(self._call_fd)

    def flush(self) -> None:
        """Sends what waits, as far as the ring has space now."""
        if not self._queue:
            return
        with self._lock:
            while self._queue and not self._detached:
                packets = list(islice(self._queue, FLUSH))
                sent = self._ring.send_many(packets)
                for _ in range(sent.entered):
                    self._queue.popleft()
                self._signal_for(sent)
                if sent.full:
                    return
            if not self._detached:
                self._ring.hold(False)

    def count_answers(self, completions: int, signals: int) -> None:
        """Counts what the engine answered by itself."""
        with self._lock:
            self._stats.completions_sent += completions
            self._stats.signals_sent += signals

    def count_sent(self, packets: int, payload_bytes: int, signals: int) -> None:
        """Counts packets that a device's data path in C has put into the ring."""
        with self._lock:
            self._stats.packets_sent += packets
            self._stats.bytes_sent += payload_bytes
            self._stats.signals_sent += signals

    def signal_space(self) -> None:
        """The guest waited for space in its ring and has it now."""
        with self._lock:
            if not self._detached:
                self._signal()

    def check_open(self) -> None:
        """Raises :exc:`ChannelClosed` after :meth:`detach`."""
        if self._detached:
            raise ChannelClosed("the channel is closed")

    def detach(self) -> None:
        """Drops what waits; from now on everything is dropped."""
        with self._lock:
            self._detached = True
            self._stats.dropped += len(self._queue)
            self._queue.clear()
