# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that a device put off until it may block: KMCL's VmbChannelPacketDeferToPassive.

The worker thread goes on with the ring while a thread of this room's own delivers the deferred
packets a second time, one after the other, in the order in which they were deferred. The thread
exists only on channels whose device defers. Invariant: after :meth:`DeferredPackets.close`
returned, nothing is delivered.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from vhostvmbus.channel.packet import Packet


class DeferredPackets:
    """The queue of one channel; ``deliver`` gets each packet and never raises."""

    def __init__(self, name: str, deliver: Callable[[Packet], None]) -> None:
        self._name = f"{name} deferred"
        self._deliver = deliver
        self._queue: deque[Packet] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def is_current_thread(self) -> bool:
        """Tells whether the caller runs inside a delivery."""
        return threading.current_thread() is self._thread

    def put(self, packets: Sequence[Packet]) -> None:
        """Hands packets over; only the worker does, and not after :meth:`close`."""
        with self._changed:
            self._queue.extend(packets)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                packet = self._queue.popleft()
            if not packet.completed:  # it may have been, by somebody who kept it
                self._deliver(packet)

    def close(self, *, drop: bool) -> None:
        """Ends the thread; what still waits is delivered first, or with ``drop`` is not."""
        with self._changed:
            self._closed = True
            if drop:
                self._queue.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
