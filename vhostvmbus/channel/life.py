# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of an open channel: its state, and the ring and eventfds that it holds.

Everything else about a channel looks here whether it may go on, and stops it here. Invariants:

* a channel fails once, and only while it runs; what was the matter is counted, logged, and told to
  the handler, while neither lock of this file is held;
* ring and eventfds exist until the state is CLOSED; one lock is for that, and
  :attr:`ChannelLife.idle` is for those who wait until the channel is idle. Neither is taken inside
  the other.
"""

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from enum import Enum

from vhostvmbus.channel.deadline import SLICE_SECONDS, Deadline, LeftBehind
from vhostvmbus.channel.stats import ChannelStats, RateLimitedLog
from vhostvmbus.ring import Ring, RingState
from vhostvmbus.wire.errors import GuestError

log = logging.getLogger("vhostvmbus.channel.channel")  # one name for all that a channel logs


class ChannelState(Enum):
    """A stage in the life of a channel object, which lasts from an opening to the closing."""

    OPENING = "opening"
    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


class ChannelLife:
    """The state of one channel, with its ring, its eventfds and its counters.

    ``failed`` is told why it stopped, without a lock held.
    """

    def __init__(
        self,
        name: str,
        ring: Ring,
        kick_fd: int,
        call_fd: int,
        failed: Callable[[GuestError], None],
        left: LeftBehind,
    ) -> None:
        self.name = name
        self.left = left
        """The threads of the device that do not return."""
        self.ring = ring
        self.stats = ChannelStats()
        self.worker: threading.Thread | None = None
        """The thread that delivers packets, which is the receiver's."""
        self.state = ChannelState.OPENING
        self.error: GuestError | None = None
        self.stopping = False
        self.draining = False
        """Set if, while stopping, what was taken from the ring is delivered all the same."""
        self.idle = threading.Condition()
        with contextlib.ExitStack() as undo:

            def keep(fd: int) -> int:
                undo.callback(os.close, fd)
                return fd

            self.kick_fd, self.call_fd = keep(os.dup(kick_fd)), keep(os.dup(call_fd))
            self.stop_fd = keep(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.wake_fd = keep(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            for fd in (self.kick_fd, self.call_fd):
                # Against accidents only: it is a property of the open file, which the front end
                # has as well. So nothing relies on it: see unblock().
                os.set_blocking(fd, False)
            undo.pop_all()
        self._left_open = False
        self._handles = threading.Lock()  # ring and eventfds exist until the state is CLOSED
        self._last_ring_state: RingState | None = None
        self._failed = failed
        self._log = RateLimitedLog(log)
        left.watch(self)

    @property
    def dropping(self) -> bool:
        """Tells whether what was taken from the ring is dropped instead of delivered."""
        return self.stopping and not self.draining

    @property
    def ring_state(self) -> RingState | None:
        """Returns the occupancy of both rings, the last one known if the channel is closed."""
        with self._handles:
            if self.state is not ChannelState.CLOSED:
                self._note_ring_state()
            return self._last_ring_state

    def _note_ring_state(self) -> None:
        state = self._last_ring_state = self.ring.state
        self.stats.signals_suppressed = state.signals_suppressed

    def note(self) -> bytes:
        """See :attr:`Channel.note`."""
        with self._handles:
            return self.ring.note

    def keep_note(self, data: bytes) -> None:
        """See :attr:`Channel.note`."""
        with self._handles:
            self.ring.note = data

    def wake(self) -> None:
        """Has the worker look at everything again."""
        with self._handles:
            if self.state is not ChannelState.CLOSED:
                os.eventfd_write(self.wake_fd, 1)

    def notify(self) -> None:
        """Has those who wait until the channel is idle look again."""
        with self.idle:
            self.idle.notify_all()

    @property
    def on_worker(self) -> bool:
        """Tells whether the caller runs on the worker."""
        return threading.current_thread() is self.worker

    def count_error(self, error: GuestError) -> None:
        """Counts and logs a mistake of the guest's, whether the channel survives it or not."""
        with self.idle:  # from any thread
            self.stats.errors[type(error).__name__] += 1
        self._log.warning("%s: %s", self.name, error)

    def count_exception(self, what: str, error: BaseException | None) -> None:
        """Counts and logs an exception in the device's code, or that it does not return."""
        with self.idle:
            self.stats.errors["DeviceException"] += 1
        log.error("%s: %s", self.name, what, exc_info=error)

    def fail(self, error: GuestError) -> None:
        """Stops the channel for good: it takes no packet any more. Completions may still go out."""
        with self.idle:
            if self.state is not ChannelState.RUNNING:
                return
            self.state = ChannelState.FAILED
            self.error = error
            self.idle.notify_all()
        self.count_error(error)
        self.wake()
        try:
            self._failed(error)
        except BaseException as raised:
            self.count_exception("who is told of a failed channel failed", raised)

    # -- the end -------------------------------------------------------------------------------

    def stop(self) -> None:
        """Has the worker see that it is to stop."""
        os.eventfd_write(self.stop_fd, 1)

    def unblock(self) -> None:
        """Frees whoever is blocked in signalling the guest.

        That takes a call eventfd that blocks, and whose counter is at its limit. Both are the front
        end's doing, and emptying the counter ends it. Any other counter is left alone: it is a
        signal that the front end has not seen yet.
        """
        full = select.poll()
        with self._handles:
            if self.state is not ChannelState.CLOSED or self._left_open:
                full.register(self.call_fd, select.POLLOUT)
                if full.poll(0):
                    return
                with contextlib.suppress(OSError):
                    os.preadv(self.call_fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def wait_for(self, wait: Callable[[float], bool], deadline: Deadline) -> bool:
        """Returns whether ``wait`` says, before the deadline, that what it waits for has come.

        It is called with a number of seconds, again and again; whoever is blocked in signalling
        the guest, on any channel of the device, is freed in between.
        """
        while not wait(min(SLICE_SECONDS, deadline.left)):
            if not deadline.left:
                return False
            self.left.unblock()
        return True

    def close(self, *, in_use: bool = False) -> None:
        """Gives the ring and the eventfds up; nobody may be using them.

        With ``in_use`` somebody may be who does not return: then the ring shows him private zeros
        from now on, and the eventfds stay open until :meth:`let_go`.
        """
        with self._handles:
            self._note_ring_state()
            self.state = ChannelState.CLOSED
            self._left_open = in_use
            if in_use:
                self.ring.forsake()
                return
            self.ring.close()
            self._close_eventfds()

    def let_go(self) -> None:
        """Closes the eventfds that :meth:`close` left open, once nobody uses them any more."""
        with self._handles:
            if self._left_open:
                self._left_open = False
                self._close_eventfds()

    def _close_eventfds(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.stop_fd, self.wake_fd):
            os.close(fd)
