# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of channels, in steps that several of them go through together.

Closing waits for much that may never come: a worker that is in the device's code, a transfer on the
host's disk, callbacks. So all channels are stopped first, and then all of them share one deadline,
of which each step has its part. What has not ended by then is left behind: its channel's ring shows
it private zeros, its packets' data are closed, what it completes or sends later is dropped. Only
who is inside an access to external data cannot be kept from it: :attr:`ChannelEnd.touching` says
so, and the owner of the memory has to take that away.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from vhostvmbus.channel.completions import Completions
from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.host_packets import HostPackets
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.channel.receiver import Receiver
from vhostvmbus.channel.sender import Sender
from vhostvmbus.memory import ExternalData
from vhostvmbus.wire.errors import DeviceTimeout, UsageError

WORKERS: Final = 0.45
"""The part of the time until the deadline after which workers are not waited for any more; the
others follow."""
RINGS: Final = 0.5
SUSPENDED: Final = 0.7
DATA: Final = 0.85
CALLBACKS: Final = 0.95


class ChannelEnd:
    """The steps to the end of one channel, in the order in which they are to be called."""

    def __init__(
        self,
        life: ChannelLife,
        receiver: Receiver[Any],
        sender: Sender,
        completions: Completions,
        host_packets: HostPackets,
        resumed: bool,
    ) -> None:
        self._life = life
        self._receiver = receiver
        self._sender = sender
        self._completions = completions
        self._host_packets = host_packets
        self._resumed = resumed
        self._in_use: list[list[ExternalData]] = []  # empty until all packets have been taken away
        self._taking = False
        self._using: set[str] = set()  # who may use the ring or the eventfds still
        self._worker_ended = self._device_left = False
        self._lock = threading.Lock()
        self.beside: threading.Thread | None = None
        """The thread that runs beside the worker, if there is one."""
        self.before_detach: Callable[[], None] | None = None
        """Called before the ring is detached."""
        self.unended = False
        """Set if the device or the engine has not ended, or packets could not be taken away."""

    @property
    def closed(self) -> bool:
        """Tells whether the channel is closed."""
        return self._life.state is ChannelState.CLOSED

    @property
    def left(self) -> bool:
        """Tells whether anybody may use the ring or the eventfds of the closed channel."""
        return bool(self._using)

    @property
    def touching(self) -> bool:
        """Tells whether somebody who does not return may be touching guest memory at this moment,
        or what the device stands for.
        """
        return self.unended or self._at_packets()

    def transferring(self) -> bool:
        """Tells whether somebody is still at the channel's external data, after its end."""
        return self._at_packets() or ("worker" in self._using and self._receiver.in_engine)

    def _at_packets(self) -> bool:
        """Tells whether packets are being taken away still, or somebody is at their data."""
        if self._taking and self._in_use:
            self._in_use[0] = [data for data in self._in_use[0] if not data.wait_unused(0)]
            self._taking = bool(self._in_use[0])
        return self._taking

    def check_thread(self) -> None:
        """Raises :exc:`UsageError` on a thread that the end waits for."""
        if self._life.on_worker or self._receiver.deferred.is_current_thread:
            raise UsageError("a channel cannot be closed on its own worker thread")

    def catch_up(self, deadline: Deadline) -> None:
        """Waits until the packets of the back end before have been delivered once more."""
        if self._resumed and self._receiver.thread.ident is not None:
            # Nobody else will do these: their guest may wait for them without end.
            self._receiver.caught_up.wait(deadline.left)

    def stop(self, publish: bool) -> None:
        """Has everything come to its end; waits for nothing."""
        life = self._life
        life.draining = publish
        life.stopping = True
        if not publish:
            self._sender.stop()
            life.ring.stop_plan()
        life.stop()
        life.notify()  # a pause that waits

    def await_worker(self, deadline: Deadline) -> None:
        """Waits until no packet is delivered any more."""
        life, receiver = self._life, self._receiver
        worker = receiver.thread
        if worker.ident is not None and not life.wait_for(_end_of(worker), deadline):
            life.draining = False  # what it takes from now on is nobody's
            life.ring.stop_plan()
            with self._lock:
                if not self._worker_ended:
                    self._using.add("worker")
            self.unended |= receiver.in_engine
            life.left.add(worker)
        receiver.deferred.close(drop=life.dropping)
        if not life.wait_for(receiver.deferred.join, deadline):
            assert receiver.deferred.thread is not None
            life.left.add(receiver.deferred.thread)

    def detach_others(self, deadline: Deadline) -> None:
        """Has the device's own data path leave the ring."""
        before = self.before_detach
        if before is None:
            return

        def leave() -> None:
            try:
                before()
            finally:
                with self._lock:
                    self._device_left = True
                    self._using.discard("device")

        if not self.call("detach", leave, deadline):
            with self._lock:
                if not self._device_left:
                    self._using.add("device")

    def suspend(self, suspended: Callable[[], None], deadline: Deadline) -> None:
        """Calls ``suspended``, when no packet is delivered any more."""
        self.call("suspended", suspended, deadline)

    def await_packets(self, deadline: Deadline) -> None:
        """Waits until the device has completed what it has."""
        self._completions.wait(deadline)

    def take_packets(self, deadline: Deadline) -> None:
        """Takes the packets that are left away from the device."""
        if not self._sender.detach(deadline):
            self._using.add("sender")

        def drop_all() -> None:
            self._taking = True
            self._in_use.append(self._completions.drop_all(deadline))

        if not self._completions.packets:
            drop_all()
        elif not self.call("end of packets", drop_all, deadline):
            # What a device has lent is given back by its own code; nobody may have called it.
            self.unended |= not self._taking

    def tell(self, deadline: Deadline) -> None:
        """Tells those who wait for completions of the guest that none will come."""
        if self._host_packets.awaited:
            self.call("completion callbacks", self._host_packets.close, deadline)
        else:
            self._host_packets.close()
        beside = self.beside
        if beside is not None and not self._life.wait_for(_end_of(beside), deadline):
            self._life.left.add(beside)

    def detach(self) -> None:
        """Gives up ring and eventfds, or makes them harmless if somebody may use them still."""
        with self._lock:
            self._life.close(in_use=bool(self._using))

    def worker_ended(self) -> None:
        """Notes that the worker has ended, in time or not; on the worker, as the last thing."""
        with self._lock:
            self._worker_ended = True
            self._using.discard("worker")
        self._life.left.returned()
        self.let_go()

    def let_go(self) -> bool:
        """Gives up what is left of the closed channel, if nobody uses it any more.

        Returns whether that is so.
        """
        if "sender" in self._using:
            self._life.unblock()
            if self._sender.detach(Deadline(0)):
                self._using.discard("sender")
        with self._lock:
            if self.closed and not self._using:
                self._life.let_go()
        return not self._using

    def call(self, what: str, function: Callable[[], None], deadline: Deadline) -> bool:
        """Calls into the device's code. Returns false if it does not return."""
        life = self._life
        try:
            outcome = life.left.call(f"{life.name} {what}", function, deadline)
        except DeviceTimeout as error:
            life.count_exception(str(error), None)
            return False
        if outcome.error is not None:
            life.count_exception(f"{what} failed", outcome.error)
        return True


def _end_of(thread: threading.Thread) -> Callable[[float], bool]:
    """Returns a function that waits so many seconds for the end of ``thread``."""

    def ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    return ended


def close_together(
    ends: Sequence[tuple[ChannelEnd, Callable[[], None]]],
    deadline: Deadline,
    between: Callable[[], None] = lambda: None,
    *,
    grace: float,
    publish: bool,
) -> None:
    """Closes channels, each with what is to be called when no packet of it is delivered any more.

    ``between`` is called after that, and has ``grace`` seconds.

    Returns at the deadline, whatever does not return. Packets have ``grace`` seconds to be
    completed. See :meth:`Channel.close`.
    """
    total = deadline.left
    steps = {part: Deadline(part * total) for part in (WORKERS, RINGS, SUSPENDED, DATA, CALLBACKS)}
    every = [end for end, _ in ends]
    for end in every:
        end.check_thread()
    if not publish:
        caught_up = steps[WORKERS].within(grace)
        for end in every:
            end.catch_up(caught_up)
    for end in every:
        end.stop(publish)
    for end in every:
        end.await_worker(steps[WORKERS])
    for behind, end in enumerate(every):
        end.detach_others(steps[RINGS].share(len(every) - behind))
    for behind, (end, suspended) in enumerate(ends):
        end.suspend(suspended, steps[SUSPENDED].share(len(every) - behind))
    packets = steps[DATA].within(grace)
    between()
    for end in every:
        end.await_packets(packets)
    for end in every:
        end.take_packets(steps[DATA])
    for behind, end in enumerate(every):
        end.tell(steps[CALLBACKS].share(len(every) - behind))
    for end in every:
        end.detach()
