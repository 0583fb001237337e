# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that the host sends of its own accord, and which completion belongs to which of them.

Invariants: a transaction id is in flight once; a completion callback is called once, with what the
guest answered or with ``None`` at the end, unless the packet was refused or nobody waits any more;
whoever takes the callback out of the table, in one step, is who calls it.

KMCL lets the server endpoint make a synchronous request only without waiting, because it could wait
in a callback that the guest's answer has to pass. Here :meth:`Channel.request` may wait on every
thread but those that deliver packets.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import count

from vhostvmbus.channel.life import ChannelLife
from vhostvmbus.channel.sender import Sender
from vhostvmbus.ring import Outgoing, RawPacket
from vhostvmbus.wire.errors import (
    ChannelClosed,
    CompletionUnexpected,
    GuestError,
    RequestCancelled,
    UsageError,
)
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, PacketType

CANCEL_POLL_SECONDS = 0.02
"""Seconds between two looks of a request at whether it was cancelled."""


class HostPackets:
    """The packets that the host sends on one channel of its own accord."""

    def __init__(self, life: ChannelLife, sender: Sender) -> None:
        self._life = life
        self._sender = sender
        self._awaited: dict[int, Callable[[bytes | None], None]] = {}
        self._transaction_ids = count(1 << 32)
        self._closed = False

    def send(
        self,
        payload: bytes | bytearray | memoryview,
        transaction_id: int | None = None,
        on_completion: Callable[[bytes | None], None] | None = None,
        packet_type: int = PacketType.DATA_INBAND,
        header: bytes = b"",
        written: Sequence[tuple[int, int]] = (),
    ) -> int:
        """See :meth:`Channel.send`."""
        flags = 0
        if on_completion is not None:
            flags = COMPLETION_REQUESTED
            if transaction_id is None:
                transaction_id = next(self._transaction_ids)
            if self._awaited.setdefault(transaction_id, on_completion) is not on_completion:
                raise UsageError(f"transaction {transaction_id:#x} is in flight already")
        elif transaction_id is None:
            transaction_id = 0
        if not isinstance(payload, bytes):
            payload = bytes(memoryview(payload))  # changes after the return do not count
        outgoing = Outgoing(packet_type, payload, transaction_id, flags, header)
        try:
            self._sender.send(outgoing, written)
        except BaseException as error:
            if on_completion is not None:  # else the id may be that of somebody else's packet
                self._awaited.pop(transaction_id, None)
            if not isinstance(error, GuestError):
                raise
            self._life.fail(error)
            raise ChannelClosed(f"channel {self._life.name} has failed: {error}") from error
        if on_completion is not None and self._closed:
            self.close()  # it was entered when those that wait had been told already
        return transaction_id

    def send_now(self, payload: bytes) -> None:
        """Sends a packet at once or not at all: :exc:`RingFull`."""
        try:
            self._sender.send_now(Outgoing(PacketType.DATA_INBAND, payload, 0))
        except GuestError as error:
            self._life.fail(error)
            raise ChannelClosed(f"channel {self._life.name} has failed: {error}") from error

    def request(
        self, payload: bytes, timeout: float | None, cancel: threading.Event | None
    ) -> bytes:
        """See :meth:`Channel.request`; the caller may wait."""
        awaited = _Awaited()
        transaction_id = self.send(payload, on_completion=awaited.completed)
        try:
            return awaited.wait(timeout, cancel)
        finally:
            self._awaited.pop(transaction_id, None)

    def completion_arrived(self, raw: RawPacket, payload: bytes) -> None:
        """Calls whoever waits for the completion that came; on the worker."""
        callback = self._awaited.pop(raw.transaction_id, None)
        if callback is None:
            self._life.count_error(
                CompletionUnexpected("transaction_id", raw.transaction_id, raw.ring_offset)
            )
            return
        self._life.stats.completions_received += 1
        self._call(callback, payload)

    def _call(self, callback: Callable[[bytes | None], None], payload: bytes | None) -> None:
        try:
            callback(payload)
        except BaseException as error:
            self._life.count_exception("a completion callback failed", error)

    @property
    def awaited(self) -> bool:
        """Tells whether anybody waits for a completion."""
        return bool(self._awaited)

    def close(self) -> None:
        """Tells everybody who waits, and who will, that no completion will come."""
        self._closed = True
        for transaction_id in list(self._awaited):
            callback = self._awaited.pop(transaction_id, None)
            if callback is not None:
                self._call(callback, None)


class _Awaited:
    """A completion that a thread waits for, and another one brings."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._answer: bytes | None = None

    def completed(self, payload: bytes | None) -> None:
        """Takes the completion's payload, ``None`` if the channel was closed: the callback."""
        self._answer = payload
        self._done.set()

    def wait(self, timeout: float | None, cancel: threading.Event | None) -> bytes:
        """Waits for the completion and returns its payload.

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
