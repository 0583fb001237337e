# SPDX-License-Identifier: GPL-2.0-or-later
"""One open channel at the host's end: what devices and packets see of it, and its end.

Here the parts of a channel are put together and taken apart; each has a file of its own. The
receiver takes packets and hands them up, on the worker thread; completions are what becomes of
them, from any thread; host packets are what the host sends of its own accord; the sender brings
both into the ring. Invariants:

* never more packets outstanding (completions that wait for space included) than the quota;
* after :meth:`Channel.close` returned, nothing touches the ring or the external data; only who is
  inside an access to the latter, and does not return, may: :attr:`ChannelEnd.touching`.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vhostvmbus.channel.closing import ChannelEnd, close_together
from vhostvmbus.channel.completions import Completions
from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.gpadl import Gpadl, GpadlTable
from vhostvmbus.channel.handler import ChannelHandler
from vhostvmbus.channel.host_packets import HostPackets
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.channel.packet import Packet
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.receiver import Receiver
from vhostvmbus.channel.sender import Sender
from vhostvmbus.channel.standstill import Standstill
from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.channel.written import ChannelWrites
from vhostvmbus.memory import ExternalData
from vhostvmbus.ring import AnyPlan, Ring, RingState
from vhostvmbus.ring.ring import RingHandle
from vhostvmbus.wire.errors import ChannelClosed, GuestError, UsageError
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PacketType

log = logging.getLogger(__name__)

COUNT_SECONDS = 1.0
"""The seconds that a transfer of a plan, on the host's disk, may keep its counters from readers."""


class Channel:
    """An open channel. Made by :class:`~vhostvmbus.device.DeviceHost`, given to every callback.

    Devices may hang attributes of their own on it (KMCL's channel context).
    """

    def __init__(
        self,
        handler: "ChannelHandler[Channel]",
        info: Opening,
        ring: Ring,
        kick_fd: int,
        call_fd: int,
        gpadls: GpadlTable,
    ) -> None:
        """Duplicates ``kick_fd`` and ``call_fd``, which must be eventfds that do not block."""
        self.info = info
        self.name = f"{handler.name}/{info.index}"
        self.target_vp = info.target_vp
        self._gpadls = gpadls
        self._life = life = ChannelLife(
            self.name,
            ring,
            kick_fd,
            call_fd,
            lambda error: handler.channel_failed(self, error),
            handler.left,
        )
        writes = ChannelWrites(handler.written, gpadls, info.index, life.stats)
        self._sender = Sender(life, writes)
        self._quota = Quota(handler.transaction_quota, life)
        self._completions = Completions(life, self._quota, self._sender, handler.gather_completions)
        self._host_packets = HostPackets(life, self._sender)
        self._receiver = Receiver(
            self, handler, life, self._quota, self._sender, self._completions, self._host_packets
        )
        self.end = ChannelEnd(
            life,
            self._receiver,
            self._sender,
            self._completions,
            self._host_packets,
            info.resumed,
        )
        """The way to the end, for whoever closes it."""
        self.standstill = Standstill(self._quota, self._sender, self._completions)
        """The way to hold the channel, for whoever hears that its machine stands still."""
        self._receiver.ended = self.end.worker_ended
        self.ring_gpadl: Gpadl | None = None
        """The GPADL that the ring was attached from."""

    @property
    def stats(self) -> ChannelStats:
        """Returns the counters, up to this moment."""
        if not self._life.on_worker:
            self._receiver.wait_for_engine(COUNT_SECONDS)
        return self._life.stats

    @property
    def end_stats(self) -> ChannelStats:
        """Returns the counters as they are, without waiting for a transfer that is under way."""
        return self._life.stats

    # -- what a device sees --------------------------------------------------------------------

    @property
    def state(self) -> ChannelState:
        """Tells where in its life the channel is."""
        return self._life.state

    @property
    def error(self) -> GuestError | None:
        """Returns why the channel failed, ``None`` if it did not."""
        return self._life.error

    @property
    def index(self) -> int:
        """Returns 0 for the primary channel, 1 and up for subchannels."""
        return self.info.index

    @property
    def user_data(self) -> bytes:
        """Returns the 120 bytes that the guest's driver gave when it opened the channel."""
        return self.info.user_data

    @property
    def vmbus_version(self) -> int:
        """Returns the bus's protocol version: major in the high, minor in the low 16 bits."""
        return self.info.version

    @property
    def draining(self) -> bool:
        """Tells, from ``suspended`` on, whether completions still go to the guest.

        They do while the guest keeps the channel open and only the connection ends; they do not
        when the guest closes the channel or resets, and whatever is outstanding is for nobody.
        """
        return self._life.draining

    @property
    def stopping(self) -> bool:
        """Tells whether the channel is about to close: nobody need wait for the guest any more."""
        return self._life.stopping

    @property
    def worker(self) -> threading.Thread:
        """The thread that takes packets, and does those that a plan is for.

        It has ended when ``closed`` comes, unless it hangs in the device's code or on the host's
        disk and could not be waited for any longer.
        """
        return self._receiver.thread

    @property
    def outstanding(self) -> int:
        """Counts the packets taken from the ring whose completion is not in the other one yet."""
        return self._completions.outstanding

    @property
    def transaction_quota(self) -> int:
        """Bounds the packets outstanding. If it is set below what is, nothing new is taken then."""
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
        if self._life.on_worker:
            raise UsageError(f"{what} would wait for the thread that it is made on")

    @property
    def note(self) -> bytes:
        """Keeps up to 256 bytes that outlive the back end, with the packets in flight.

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
        """Returns ``(struct vvb_ring *, call eventfd)``, for a device that sends from C.

        ``before_detach`` is called, on any thread, when the channel closes, after its worker has
        ended, and returns when neither is used any more. Raises :exc:`ChannelClosed`.
        """
        self._sender.check_open()
        self.end.before_detach = before_detach
        return self._life.ring.handle, self._life.call_fd

    def count_sent(self, packets: int, payload_bytes: int, signals: int) -> None:
        """Counts what such a device sent."""
        self._sender.count(0, packets, payload_bytes, signals)

    def signal(self) -> None:
        """Signals the guest, whether or not there is anything new for it."""
        self._sender.signal_space()

    @property
    def ring_state(self) -> RingState | None:
        """Returns the occupancy of both rings, the last one known if the channel is closed."""
        return self._life.ring_state

    def packet_raised(self, packet: Packet, error: BaseException) -> None:
        """Fails a packet for which the device's code raised ``error``, unless it was completed."""
        self._completions.raised(packet, error)

    # -- the worker ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the worker, once."""
        self._life.state = ChannelState.RUNNING
        self._receiver.thread.start()

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
        self._quota.pause(timeout, self._completions.packets)

    def start(self) -> None:
        """Takes packets again after :meth:`pause` (VmbChannelStart); else does nothing."""
        self._quota.start()

    @property
    def paused(self) -> bool:
        """Tells whether :meth:`pause` was called, and :meth:`start` not since."""
        return self._quota.paused

    @property
    def held(self) -> bool:
        """Tells whether the channel is held where it is: the guest's machine stands still."""
        return self._quota.held

    def run_beside(self, function: Callable[[], None]) -> None:
        """Runs ``function`` once on a thread of its own, which :meth:`close` waits for."""

        def run() -> None:
            try:
                function()
            except ChannelClosed:
                log.debug("%s: closed while a callback waited", self.name)
            except BaseException as error:
                self._life.count_exception("the device's code failed", error)
            self._life.left.returned()

        self.end.beside = threading.Thread(target=run, name=f"{self.name} start", daemon=True)
        self.end.beside.start()

    # -- the end -------------------------------------------------------------------------------

    def drop_packets_in(self, guest_phys_addr: int, size: int, timeout: float) -> None:
        """Ends outstanding packets with external data in memory that goes.

        Waits ``timeout`` seconds at most, in all, for whoever is at their data.
        """
        deadline = Deadline(timeout)

        def drop() -> None:
            self._completions.drop_in(guest_phys_addr, size, deadline)

        if self._completions.packets:
            self.end.call("end of packets", drop, deadline)

    def close(self, grace: float = 1.0) -> None:
        """Stops the worker, ends every packet, detaches the ring; within 2 seconds by itself.

        :func:`~vhostvmbus.channel.closing.close_together` says how, and does it for several.
        """
        if self.state is not ChannelState.CLOSED:
            alone = [(self.end, lambda: None)]
            close_together(alone, Deadline(2.0), grace=grace, publish=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns state and counters, ready for JSON."""
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
