# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for the completion of a packet that the host sent: VmbChannelSendSynchronousRequest.

KMCL lets the server endpoint call that only without waiting, because it could wait in a callback
that the guest's answer has to pass. Here :meth:`Channel.request` may wait on every thread but those
that deliver packets.
"""

import threading
import time

from vhostvmbus.wire.errors import ChannelClosed, RequestCancelled

CANCEL_POLL_SECONDS = 0.02
"""How often a request looks at whether it was cancelled."""


class Awaited:
    """The completion of one packet, from another thread."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._answer: bytes | None = None

    def completed(self, payload: bytes | None) -> None:
        """The completion callback; ``None`` if the channel was closed."""
        self._answer = payload
        self._done.set()

    def wait(self, timeout: float | None, cancel: threading.Event | None) -> bytes:
        """The completion's payload.

        Raises :exc:`TimeoutError` after ``timeout`` seconds, :exc:`RequestCancelled` once
        ``cancel`` is set, :exc:`ChannelClosed` if the channel closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if cancel is not None:
                left = CANCEL_POLL_SECONDS if left is None else min(left, CANCEL_POLL_SECONDS)
            if self._done.wait(left):
                if self._answer is None:
                    raise ChannelClosed("the channel was closed")
                return self._answer
            if cancel is not None and cancel.is_set():
                raise RequestCancelled("the request was cancelled")
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"no completion in {timeout} s")
