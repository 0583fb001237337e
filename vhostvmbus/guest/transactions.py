# SPDX-License-Identifier: GPL-2.0-or-later
"""The packets under way on a guest's channel: its own, and those that the host sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vhostvmbus.ring import RawPacket


@dataclass(eq=False, slots=True)
class Transaction:
    """A packet of ours whose completion is awaited.

    ``completion`` is the payload of the completion packet, None until it has come.
    :meth:`wait` returns it.
    """

    transaction_id: int
    completion: bytes | None = None
    place: int = -1
    """How many transactions of the channel were completed before this one; -1: it is not yet."""
    completed_at: float = 0.0
    """When its completion was taken from the ring (``time.perf_counter``)."""
    failure: Exception | None = None
    """The reason that no completion will come any more."""
    _wait: Callable[[Transaction, float], bytes] | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        """Tells whether the completion has come, or will never come."""
        return self.completion is not None or self.failure is not None

    def wait(self, timeout: float = 10.0) -> bytes:
        """Returns the completion's payload.

        Raises :class:`~.errors.CompletionTimeout` after ``timeout`` seconds; the packet is then
        still in flight, and may be waited for again.
        """
        if self._wait is None:
            raise RuntimeError("this transaction belongs to no channel")
        return self._wait(self, timeout)


@dataclass(eq=False, slots=True)
class HostPacket:
    """A packet that the host sent."""

    raw: RawPacket
    _complete: Callable[[int, bytes], None] = field(repr=False)
    completed: bool = False

    @property
    def payload(self) -> bytes:
        """The in-band bytes, a multiple of 8."""
        return self.raw.payload

    @property
    def transaction_id(self) -> int:
        """The host's number for it."""
        return self.raw.transaction_id

    @property
    def completion_requested(self) -> bool:
        """Tells whether the host waits for :meth:`complete`."""
        return self.raw.completion_requested

    def complete(self, payload: bytes = b"") -> None:
        """Answers the host; once."""
        if self.completed:
            raise RuntimeError("this packet has been completed")
        self.completed = True
        self._complete(self.raw.transaction_id, payload)
