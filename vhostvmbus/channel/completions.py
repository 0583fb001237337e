# SPDX-License-Identifier: GPL-2.0-or-later
"""The packets of one channel from their delivery to their completion, in the guest's ring.

A packet is outstanding from when it is delivered until whoever completes it takes it out of the
table, in one step, so that it ends once. What ends it is published here: at once, or, for a device
that gathers completions, some at a time. Invariants:

* a completion becomes visible to the guest only after what was written has been reported, which
  the sender sees to;
* whatever way a packet ends while the channel goes on, the quota hears of it afterwards;
* after :meth:`Completions.drop_all` returned, nobody touches external data but what it returned.
"""

import threading
from collections.abc import Sequence

from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.life import ChannelLife
from vhostvmbus.channel.packet import Packet
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.sender import Sender
from vhostvmbus.memory import ExternalData
from vhostvmbus.memory.written import Spans
from vhostvmbus.ring import Done, Outgoing
from vhostvmbus.wire.errors import (
    AlreadyCompleted,
    GuestError,
    GuestMemoryLost,
    PacketFailed,
    PacketTooBig,
    UsageError,
)
from vhostvmbus.wire.vmbus import PacketType

GATHER = 16
"""Completions published together, at most, for devices with ``gather_completions``."""
LONGEST = 0xFFFF * 8 - 16
"""Bytes of the longest payload that a packet can say it has."""


class Completions:
    """The table of one channel's outstanding packets, and the way to their ends.

    It is the packets' :class:`~vhostvmbus.channel.packet.PacketOwner`. Every method may be called
    from any thread, but for those that name the worker.
    """

    def __init__(self, life: ChannelLife, quota: Quota, sender: Sender, gather: bool) -> None:
        self.packets: dict[int, Packet] = {}
        """Packets that were delivered and have not ended, by serial, in the order of delivery."""
        self._life = life
        self._quota = quota
        self._sender = sender
        self._gather = gather
        self._longest = life.ring.longest_payload
        self.ended = False
        """Set when every packet has been taken away: those that come now are dropped."""
        self._gathered: list[Outgoing] = []
        self._gathered_written: list[tuple[int, int]] = []
        self._deferred: list[Packet] = []

    @property
    def outstanding(self) -> int:
        """Counts the packets taken from the ring whose completion is not in the other one yet."""
        return len(self.packets) + len(self._gathered) + self._sender.queued

    @property
    def room(self) -> int:
        """Returns how many packets more the quota allows; a lowered quota makes it negative."""
        return self._quota.now - self.outstanding

    # -- what packets ask for ------------------------------------------------------------------

    def complete(self, packet: Packet, payload: bytes | bytearray | memoryview) -> None:
        """See :meth:`Packet.complete`."""
        if len(payload) > self._longest and (packet.completion_requested or len(payload) > LONGEST):
            # Before anything has ended: the author can complete it with less.
            raise PacketTooBig(
                f"a completion of {len(payload)} bytes: the ring takes {self._longest} at most"
            )
        if not self._take(packet):
            return
        written: list[tuple[int, int]] = []
        external = packet.external_data
        if external is not None:
            if external.lost_at_the_end():
                self._life.count_error(GuestMemoryLost("memory", packet.transaction_id))
            if self._sender.reports_writes:
                written = external.written
            external.close()
        if not packet.completion_requested:
            self.publish((), written)
            return
        outgoing = Outgoing(
            PacketType.COMP, bytes(payload), packet.transaction_id, slot=packet.slot
        )
        if self._gather and threading.current_thread() is self._life.worker:
            self._gathered.append(outgoing)
            self._gathered_written.extend(written)
            if len(self._gathered) >= GATHER:
                self.flush()
        else:
            self.publish((outgoing,), written)

    def fail(self, packet: Packet, reason: str) -> None:
        """See :meth:`Packet.fail`."""
        if not self._take(packet):
            return
        if packet.external_data is not None:
            packet.external_data.close()
        self._life.fail(PacketFailed("packet", packet.transaction_id, packet.ring_offset, reason))
        self._quota.packet_ended()

    def defer(self, packet: Packet) -> None:
        """See :meth:`Packet.defer`."""
        if (
            not self._life.on_worker
            or not packet.deferrable
            or [*self.packets][-1:] != [packet.serial]  # atomic: others complete packets
        ):
            raise UsageError(f"{packet!r} cannot be deferred here")
        packet.deferrable = False
        self._deferred.append(packet)

    def raised(self, packet: Packet, error: BaseException) -> None:
        """Fails a packet whose delivery raised ``error``, unless it was completed."""
        if isinstance(error, GuestError):
            # A mistake that the device found while it parsed, or pages that vanished.
            self._life.count_error(error)
            reason = str(error)
        else:
            self._life.count_exception(f"the device's code failed on {packet!r}", error)
            reason = "exception in the device's code"
        if packet.serial in self.packets:
            try:
                self.fail(packet, reason)
            except AlreadyCompleted:
                return

    def drop_late(self, packet: Packet) -> None:
        """Drops a packet that was entered when all had been taken away already; on the worker.

        The worker looks at :attr:`ended` behind the entry, and :meth:`drop_all` sets it before it
        looks at the entries.
        """
        self._drop(packet, 0)

    def _take(self, packet: Packet) -> bool:
        """Makes sure that a packet ends once. Returns false if the channel closed before."""
        if self.packets.pop(packet.serial, None) is not None:  # atomic: one caller gets it
            packet.completed = True
            return True
        if packet.dropped:
            self._life.left.count_late()
            return False
        raise AlreadyCompleted(f"{packet!r} was completed before")

    # -- publishing ----------------------------------------------------------------------------

    def publish(self, completions: Sequence[Outgoing] | Done, written: Spans) -> None:
        """Sends completions of packets that have ended, once ``written`` is reported."""
        try:
            self._sender.complete(completions, written)
        except GuestError as error:
            self._life.fail(error)
        finally:
            self._quota.packet_ended()

    def publish_done(self, done: Done, answered: int = 0) -> None:
        """Sends what a plan has left to be completed, behind the first ``answered``."""
        if not done.completions or answered < done.completions:
            written = done.written() if self._sender.reports_writes else []
            self.publish(done.outgoing(answered) if answered else done, written)

    def flush(self) -> None:
        """Publishes what was gathered; on the worker."""
        if self._gathered:
            completions, self._gathered = self._gathered, []
            written, self._gathered_written = self._gathered_written, []
            self.publish(completions, written)

    def take_deferred(self) -> list[Packet]:
        """Returns the packets that were deferred since the last call; on the worker."""
        deferred, self._deferred = self._deferred, []
        return deferred

    # -- ends that nobody asked for ------------------------------------------------------------

    def wait(self, deadline: Deadline) -> None:
        """Returns when nothing is outstanding any more, or at the deadline."""
        with self._life.idle:
            while self.packets and (left := deadline.left) > 0:
                self._life.idle.wait(left)

    def drop_all(self, deadline: Deadline) -> list[ExternalData]:
        """Takes every packet away from whoever holds it, those that come too late included.

        Returns the data that somebody is at still who does not return.
        """
        self.ended = True
        dropped = [packet for packet in list(self.packets.values()) if self._drop(packet, 0)]
        self._life.stats.dropped += len(dropped)
        data = [packet.external_data for packet in dropped if packet.external_data is not None]
        return [external for external in data if not external.wait_unused(deadline.left)]

    def drop_in(self, guest_phys_addr: int, size: int, deadline: Deadline) -> int:
        """Ends packets with external data in memory that goes away. Returns how many.

        Waits until the deadline for whoever is at their data.
        """
        dropped = 0
        for packet in list(self.packets.values()):
            external = packet.external_data
            if external is None or not any(
                gpa < guest_phys_addr + size and guest_phys_addr < gpa + length
                for gpa, length in external.segments
            ):
                continue
            if self._drop(packet, deadline.left):
                empty = Outgoing(PacketType.COMP, b"", packet.transaction_id, slot=packet.slot)
                self.publish((empty,) if packet.completion_requested else (), ())
                dropped += 1
        return dropped

    def _drop(self, packet: Packet, seconds: float) -> bool:
        """Ends a packet unless it is being completed at this moment.

        Waits so many seconds for whoever is at its data.
        """
        if self.packets.pop(packet.serial, None) is None:
            return False
        packet.completed = packet.dropped = True
        if packet.external_data is not None:
            packet.external_data.close()
            packet.external_data.wait_unused(seconds)
        return True
