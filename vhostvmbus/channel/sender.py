# SPDX-License-Identifier: GPL-2.0-or-later
"""The sending half of a channel: in order, whatever the ring's state, from any thread.

Invariants: what was written is reported before a packet enters the ring; packets enter it in the
order in which they were handed over; when the ring is full they wait here, ``pending_send_sz`` asks
the guest for a signal, and :meth:`Sender.flush` goes on; while the sender is held they wait, too,
and nobody is signalled. After :meth:`Sender.detach` returned true, nothing touches the ring.
"""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.life import ChannelLife
from vhostvmbus.channel.written import ChannelWrites
from vhostvmbus.memory.written import Spans
from vhostvmbus.ring import Done, Outgoing, signal
from vhostvmbus.wire.errors import ChannelClosed, PacketTooBig, RingFull, SendQueueFull
from vhostvmbus.wire.vmbus import align8

MAX_QUEUED = 4096
"""Host-initiated packets that may wait for space. Completions are bounded by the quota instead."""
FLUSH = 64
"""Packets that waited, put into the ring at a time."""


class Sender:
    """One channel's way into the ring: it puts packets there, and signals as the protocol says.

    When a packet has to wait, the worker is woken: it may be waiting in the engine, which takes the
    guest's signal that there is space for one that packets have come.
    """

    def __init__(self, life: ChannelLife, writes: ChannelWrites) -> None:
        self._life = life
        self._ring = life.ring
        self._stats = life.stats
        self._writes = writes
        self._longest = life.ring.longest_payload
        self._lock = threading.Lock()  # held to send, and to count before the guest can know of it
        self._queue: deque[Outgoing] = deque()
        self._held = False
        self._resuming = False  # let go, and the worker has yet to see it
        self._owed = False  # a signal that came due while the sender was held
        self._detached = False

    @property
    def queued(self) -> int:
        """Counts the packets that wait for space in the ring."""
        return len(self._queue)

    @property
    def waits(self) -> bool:
        """Tells whether packets wait for space in the ring, and for nothing else."""
        return bool(self._queue) and not self._held

    def hold(self, deadline: Deadline) -> bool:
        """Keeps everything out of the ring from now on, whoever sends it.

        Returns false if somebody was sending and does not return before the deadline: he may use
        the ring still.
        """
        self._held = True
        if not self._life.wait_for(lambda left: self._lock.acquire(timeout=left), deadline):
            return False
        try:
            if not self._detached:
                self._ring.hold(True)
        finally:
            self._lock.release()
        return True

    def let_go(self) -> None:
        """Lets things into the ring again. The worker, to be woken, sends and signals what waits:
        either may block.
        """
        self._resuming, self._held = True, False

    @property
    def reports_writes(self) -> bool:
        """Tells whether anybody has to know what was written before a packet is published."""
        return self._writes.watched

    def check_fits(self, payload_bytes: int, header_bytes: int = 0) -> None:
        """Raises :exc:`PacketTooBig` for what the guest's ring can never hold."""
        length = align8(payload_bytes) + align8(header_bytes)
        if length > self._longest:
            raise PacketTooBig(
                f"a packet of {length} bytes can never fit into the ring: {self._longest} can"
            )

    def complete(self, completions: Sequence[Outgoing] | Done, written: Spans) -> None:
        """Sends or queues completions, with one write-index store; drops them once detached.

        Raises the ``error`` of a :class:`Sent`, or :exc:`CodeInvalidationFailed`.
        """
        self._writes.report(written)
        count = completions.completions if isinstance(completions, Done) else len(completions)
        if not count:
            return
        with self._lock:
            if self._detached:
                self._stats.dropped += count
                return
            self._stats.count_sent(count)
            self._put(completions)

    def send(self, packet: Outgoing, written: Spans) -> None:
        """Sends or queues a packet of the host's own.

        Raises :exc:`ChannelClosed`, :exc:`SendQueueFull`, :exc:`PacketTooBig`, and what
        :meth:`complete` raises.
        """
        self.check_fits(len(packet.payload), len(packet.header))
        self._writes.report(written)
        with self._lock:
            self.check_open()
            if len(self._queue) >= MAX_QUEUED:
                raise SendQueueFull(f"{len(self._queue)} packets wait for space in the ring")
            self._stats.count_sent(packets=1, payload_bytes=len(packet.payload))
            self._put((packet,))

    def send_now(self, packet: Outgoing) -> None:
        """Sends a packet of the host's own at once or not at all: :exc:`RingFull`.

        Otherwise like :meth:`send`.
        """
        self.check_fits(len(packet.payload), len(packet.header))
        self._writes.report(())
        with self._lock:
            self.check_open()
            if self._queue or self._held:
                raise RingFull("packets wait for space in the ring")
            sent = self._ring.send_many((packet,))
            if sent.signal:
                self._signal()
            sent.check()
            self._stats.count_sent(packets=1, payload_bytes=len(packet.payload))

    def count(
        self, completions: int = 0, packets: int = 0, payload_bytes: int = 0, signals: int = 0
    ) -> None:
        """Counts what the engine, or a device's data path in C, has sent by itself."""
        with self._lock:
            self._stats.count_sent(completions, packets, payload_bytes, signals)

    def _put(self, packets: Sequence[Outgoing] | Done) -> None:
        if self._queue or self._held:
            self._wait_in_line(packets, 0)
            return
        sent = self._ring.send_many(packets)
        if sent.signal:
            self._signal()
        if sent.error is not None:
            raise sent.error
        if sent.full:
            self._stats.ring_full += 1
            self._wait_in_line(packets, sent.entered)

    def _wait_in_line(self, packets: Sequence[Outgoing] | Done, first: int) -> None:
        begin = not self._queue
        rest = packets.outgoing(first) if isinstance(packets, Done) else packets[first:]
        self._queue.extend(rest)
        if begin:
            self._ring.hold(True)
            self._life.wake()
        self._stats.max_queued = max(self._stats.max_queued, len(self._queue))

    def _signal(self) -> None:
        self._stats.count_sent(signals=1)
        signal(self._life.call_fd)

    def flush(self) -> None:
        """Sends what waits, as far as the ring has space now."""
        if not self._queue and not self._resuming:
            return
        with self._lock:
            if self._held:
                return
            self._resuming = False
            if self._owed and not self._detached:
                self._owed = False
                self._signal()
            while self._queue and not self._detached:
                sent = self._ring.send_many(list(islice(self._queue, FLUSH)))
                for _ in range(sent.entered):
                    self._queue.popleft()
                if sent.signal:
                    self._signal()
                if sent.full:
                    return
                sent.check()
            if not self._detached:
                self._ring.hold(False)

    def signal_space(self) -> None:
        """Signals the guest, which waited for space in its ring and has it now."""
        with self._lock:
            if self._held:
                self._owed = True
            elif not self._detached:
                self._signal()

    def check_open(self) -> None:
        """Raises :exc:`ChannelClosed` after :meth:`detach`."""
        if self._detached:
            raise ChannelClosed(f"channel {self._life.name} is closed")

    def stop(self) -> None:
        """Has whoever sends from now on drop it; :meth:`detach` waits for those who are at it."""
        self._detached = True

    def detach(self, deadline: Deadline) -> bool:
        """Drops what waits; from now on everything is dropped.

        Returns false if somebody was sending and does not return: he may use the ring still.
        """
        self._detached = True
        if not self._life.wait_for(lambda left: self._lock.acquire(timeout=left), deadline):
            return False
        try:
            self._stats.dropped += len(self._queue)
            self._queue.clear()
        finally:
            self._lock.release()
        return True
