# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that a device put off until it may block: KMCL's VmbChannelPacketDeferToPassive.

The worker thread goes on with the ring while a thread of this room's own delivers the deferred
packets a second time, one after the other, in the order in which they were deferred. The thread
exists only on channels whose device defers. Invariant: after :meth:`DeferredPackets.join`
returned true, nothing is delivered.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from vhostvmbus.channel.packet import Packet


class DeferredPackets:
    """The queue of one channel; ``deliver`` gets each packet and never raises."""

    def __init__(
        self,
        name: str,
        deliver: Callable[[Packet], None],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = f"{name} deferred"
        self._deliver = deliver
        self._ended = ended  # called on the thread, as the last thing
        self._queue: deque[Packet] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.thread: threading.Thread | None = None
        """The thread that delivers, once there is something to deliver."""

    @property
    def is_current_thread(self) -> bool:
        """Tells whether the caller runs inside a delivery."""
        return threading.current_thread() is self.thread

    def put(self, packets: Sequence[Packet]) -> None:
        """Hands packets over; only the worker does. Those that come after :meth:`close` stay
        where they are: whoever closes takes them.
        """
        with self._changed:
            if self._closed:
                return
            self._queue.extend(packets)
            self._changed.notify()
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while (packet := self._next()) is not None:
            if not packet.completed:  # it may have been, by somebody who kept it
                self._deliver(packet)
        self._ended()

    def _next(self) -> Packet | None:
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            return self._queue.popleft()

    def close(self, *, drop: bool) -> None:
        """Has the thread end; what still waits is delivered first, or with ``drop`` is not."""
        with self._changed:
            self._closed = True
            if drop:
                self._queue.clear()
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Returns whether the thread has ended, or does so within ``seconds``."""
        if self.thread is None:
            return True
        self.thread.join(seconds)
        return not self.thread.is_alive()
