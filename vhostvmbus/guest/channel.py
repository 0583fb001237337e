# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's half of an open channel, with the semantics of KMCL's client endpoint.

Nobody reads the in ring but callers that wait for something: one of them at a time
looks after the ring for all (:meth:`GuestChannel._wait_until`), so there is no thread to hand
over to and a round trip costs two eventfd wake-ups.  Methods may be called from any thread.

Invariants: packets reach the ring in the order in which senders got the send lock; a
transaction id of ours is in flight once; a completion goes to the transaction of its id or, if
there is none, to :attr:`GuestChannel.stray_completions`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from vhostvmbus.guest.errors import (
    Cancelled,
    ChannelNotOpen,
    CompletionTimeout,
    GuestSideError,
    HostBrokeRing,
    ReceiveTimeout,
    RequestFailed,
    RingFullTimeout,
)
from vhostvmbus.guest.external import (
    check_ranges,
    range_of_pfns,
    ranges_of_chain,
    require_completion,
)
from vhostvmbus.guest.transactions import HostPacket, Transaction
from vhostvmbus.ring import RawPacket, Ring, signal, wait
from vhostvmbus.wire.errors import ChannelClosed
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, PacketType

T = TypeVar("T")
Payload = bytes | bytearray | memoryview
"""The types that can be sent; the bytes are copied before the call returns."""

TIMEOUT = 10.0
"""Seconds that a caller waits unless it says otherwise."""
_FULL_POLL = 0.05
"""Seconds between two looks of a sender at a ring that stays full."""
_CANCEL_POLL = 0.02
"""Seconds between two looks of a request at whether it was cancelled."""


class GuestChannel:
    """An open channel, seen from the guest.

    Made by :meth:`SoftwareGuest.open_channel`.  ``ring`` is the engine in the guest's role.
    """

    def __init__(self, index: int, ring: Ring, kick_fd: int, call_fd: int) -> None:
        self.index = index
        self.ring = ring
        self.kick_fd = kick_fd
        self.call_fd = call_fd
        self.stray_completions: list[RawPacket] = []
        """Completions that belong to no transaction of ours."""
        self.kicks = 0
        """How often the host was signalled, and how often it signalled us."""
        self.calls = 0
        self._ids = itertools.count(1)
        self._places = itertools.count()
        self._in_flight: dict[int, Transaction] = {}
        self._host_packets: deque[HostPacket] = deque()
        self._failure: Exception | None = None
        self._pumping = False
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # ---- sending ----

    def send(self, payload: Payload, *, wait: bool = True, timeout: float = TIMEOUT) -> bytes:
        """Sends an in-band packet, ``VmbPacketSend``.

        With ``wait``, a completion is asked for and its payload returned; without, nothing is
        returned and the packet is in the ring.  A full ring is waited for.
        """
        if not wait:
            self._put(PacketType.DATA_INBAND, payload, 0, 0, None, timeout)
            return b""
        return self.submit(payload, timeout=timeout).wait(timeout)

    def submit(self, payload: Payload, *, timeout: float = TIMEOUT) -> Transaction:
        """Sends an in-band packet and does not wait for its completion yet."""
        return self._submit(PacketType.DATA_INBAND, payload, None, timeout)

    def send_with_external_pfns(
        self,
        payload: Payload,
        pfns: Sequence[int],
        *,
        pfn_offset: int = 0,
        pfn_length: int | None = None,
        byte_offset: int = 0,
        byte_count: int | None = None,
        wait_for_completion: bool = True,
        timeout: float = TIMEOUT,
    ) -> bytes:
        """Does ``VmbPacketSendWithExternalPfns`` and waits for the completion's payload.

        The pages are ``pfns[pfn_offset : pfn_offset + pfn_length]`` (default: to the end), one
        range that starts ``byte_offset`` bytes into the first and has ``byte_count`` bytes
        (default: to the end of the last).  KMCL demands WAIT_FOR_COMPLETION here: without
        it :class:`SendRefused` (INVALID_PARAMETER), as for no PFNs at all or a byte count that
        does not go with them.
        """
        transaction = self.submit_with_external_pfns(
            payload,
            pfns,
            pfn_offset=pfn_offset,
            pfn_length=pfn_length,
            byte_offset=byte_offset,
            byte_count=byte_count,
            wait_for_completion=wait_for_completion,
            timeout=timeout,
        )
        return transaction.wait(timeout)

    def submit_with_external_pfns(
        self,
        payload: Payload,
        pfns: Sequence[int],
        *,
        pfn_offset: int = 0,
        pfn_length: int | None = None,
        byte_offset: int = 0,
        byte_count: int | None = None,
        wait_for_completion: bool = True,
        timeout: float = TIMEOUT,
    ) -> Transaction:
        """Sends as :meth:`send_with_external_pfns` does, without waiting yet."""
        require_completion(wait_for_completion)
        chosen = range_of_pfns(pfns, pfn_offset, pfn_length, byte_offset, byte_count)
        return self.submit_with_external_ranges(payload, [chosen], timeout=timeout)

    def send_with_external_data(
        self,
        payload: Payload,
        chain: Sequence[GpaRange],
        *,
        offset: int = 0,
        length: int = 0,
        force_length: bool = False,
        wait_for_completion: bool = True,
        timeout: float = TIMEOUT,
    ) -> bytes:
        """Does ``VmbPacketSendWithExternalMdl`` and waits for the completion's payload.

        The data is ``length`` bytes (0: all) from ``offset`` bytes into the buffers of ``chain``;
        see :func:`~vhostvmbus.guest.external.ranges_of_chain`, also for what is refused.
        """
        require_completion(wait_for_completion)
        ranges = ranges_of_chain(chain, offset, length, force_length)
        return self.submit_with_external_ranges(payload, ranges, timeout=timeout).wait(timeout)

    def submit_with_external_ranges(
        self, payload: Payload, ranges: Sequence[GpaRange], *, timeout: float = TIMEOUT
    ) -> Transaction:
        """Sends a GPA-direct packet with several ranges.

        Raises :class:`SendRefused` for a range whose PFN count does not go with its bytes.
        """
        check_ranges(ranges)
        return self._submit(PacketType.DATA_USING_GPA_DIRECT, payload, ranges, timeout)

    def request(
        self,
        payload: Payload,
        *,
        completion_size: int | None = None,
        wait_for_completion: bool = True,
        timeout: float = TIMEOUT,
        cancel: threading.Event | None = None,
    ) -> bytes:
        """Does ``VmbChannelSendSynchronousRequest``: sends in-band, waits for the completion.

        ``completion_size`` is how many bytes the caller takes, a multiple of 8 (None: any).
        ``timeout`` 0 waits for nothing: neither for space in the ring, nor, since there would be no
        time for one, for a completion, so ``wait_for_completion`` has to be False then.  Once
        ``cancel`` is set the wait ends.

        Raises :class:`RequestFailed`, whose ``status`` is INVALID_PARAMETER for such arguments,
        BUFFER_OVERFLOW when there is no space, IO_TIMEOUT, CANCELLED, DEVICE_REMOVED when the
        channel closes, BUFFER_TOO_SMALL for a longer completion.
        """
        if completion_size is not None and (completion_size < 0 or completion_size % 8):
            raise RequestFailed(f"a completion of {completion_size} bytes is not a multiple of 8")
        if timeout <= 0 and wait_for_completion:
            raise RequestFailed("a completion cannot be awaited in no time")
        deadline = time.monotonic() + timeout
        try:
            if not wait_for_completion:
                self._put(PacketType.DATA_INBAND, payload, 0, 0, None, timeout)
                return b""
            transaction = self.submit(payload, timeout=timeout)
            answer = self._await_or_cancel(transaction, deadline, cancel)
        except GuestSideError as error:
            raise RequestFailed(str(error), error.status) from error
        if completion_size is not None and len(answer) > completion_size:
            raise RequestFailed(
                f"a completion of {len(answer)} bytes, {completion_size} are wanted",
                NtStatus.BUFFER_TOO_SMALL,
            )
        return answer

    def _await_or_cancel(
        self, transaction: Transaction, deadline: float, cancel: threading.Event | None
    ) -> bytes:
        if cancel is None:
            return transaction.wait(max(0.0, deadline - time.monotonic()))
        while True:
            if cancel.is_set():
                raise Cancelled("the request was cancelled")
            left = deadline - time.monotonic()
            try:
                return transaction.wait(min(_CANCEL_POLL, max(0.0, left)))
            except CompletionTimeout:
                if left <= 0:
                    raise

    def _submit(
        self,
        kind: PacketType,
        payload: Payload,
        ranges: Sequence[GpaRange] | None,
        timeout: float,
    ) -> Transaction:
        transaction = Transaction(next(self._ids), _wait=self._wait_for)
        with self._changed:
            self._check_usable()
            self._in_flight[transaction.transaction_id] = transaction
        try:
            self._put(
                kind, payload, transaction.transaction_id, COMPLETION_REQUESTED, ranges, timeout
            )
        except BaseException:
            with self._changed:
                self._in_flight.pop(transaction.transaction_id, None)
            raise
        return transaction

    def _put(
        self,
        kind: PacketType,
        payload: Payload,
        transaction_id: int,
        flags: int,
        ranges: Sequence[GpaRange] | None,
        timeout: float,
    ) -> None:
        """Puts a packet into the ring, waiting while it is full; signals the host if need be."""
        payload = bytes(payload)  # PAGED_BUFFER: what changes while we wait does not count
        deadline = time.monotonic() + timeout
        with self._send_lock:
            while True:
                with self._changed:
                    self._check_usable()
                if ranges is None:
                    sent = self.ring.send(kind, payload, transaction_id=transaction_id, flags=flags)
                else:
                    sent = self.ring.send_gpa_direct(
                        payload, ranges, transaction_id=transaction_id, flags=flags
                    )
                if sent.signal:
                    self.kick()
                if sent.error is not None:
                    raise sent.error
                if not sent.full:
                    return
                if time.monotonic() >= deadline:
                    raise RingFullTimeout(f"the host made no room for {len(payload)} bytes")
                # Our in ring may be what the host waits for: keep reading it.
                self._pump_once(min(deadline, time.monotonic() + _FULL_POLL))

    def kick(self) -> None:
        """Signals the host, whether it wants it or not."""
        self.kicks += 1
        signal(self.kick_fd)

    # ---- receiving ----

    def receive(self, timeout: float = TIMEOUT) -> HostPacket:
        """Returns the next packet that the host sent. Raises :class:`ReceiveTimeout`."""
        packets = self._host_packets
        packet = self._wait_until(lambda: packets.popleft() if packets else None, timeout)
        if packet is None:
            raise ReceiveTimeout(f"the host sent nothing in {timeout:g} s")
        return packet

    @property
    def in_flight(self) -> int:
        """The number of transactions that wait for their completion."""
        return len(self._in_flight)

    def _wait_for(self, transaction: Transaction, timeout: float) -> bytes:
        if not self._wait_until(lambda: transaction.done or None, timeout):
            raise CompletionTimeout(
                f"transaction {transaction.transaction_id:#x} was not completed in {timeout:g} s"
            )
        if transaction.failure is not None:
            raise transaction.failure
        assert transaction.completion is not None
        return transaction.completion

    def _wait_until(self, take: Callable[[], T | None], timeout: float) -> T | None:
        """Looks after the in ring until ``take`` has something; ``None`` after ``timeout`` seconds.

        ``take`` is called with the lock held.  Whoever finds nobody at the ring takes it over;
        the others sleep until something has changed.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while (taken := take()) is None:
                self._check_usable()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                if self._pumping:
                    self._changed.wait(remaining)
                else:
                    self._pump_locked(deadline)
            return taken

    def _pump_once(self, deadline: float) -> None:
        with self._changed:
            if self._pumping:
                self._changed.wait(max(0.0, deadline - time.monotonic()))
            else:
                self._pump_locked(deadline)

    def _pump_locked(self, deadline: float) -> None:
        """Takes the ring's packets, or waits for a signal once; the lock is dropped meanwhile."""
        self._pumping = True
        self._changed.release()
        packets: list[RawPacket] = []
        failure: Exception | None = None
        try:
            packets, failure = self._read_ring(deadline)
        finally:
            self._changed.acquire()
            self._pumping = False
            for packet in packets:
                self._dispatch(packet)
            if failure is not None:
                self._fail(failure)
            self._changed.notify_all()

    def _read_ring(self, deadline: float) -> tuple[list[RawPacket], Exception | None]:
        try:
            batch = self.ring.receive()
            if not batch.packets and batch.error is None:
                # The mask is never set: signals that come while we read cost less than two
                # stores for each wait, and one that came is simply still there.
                fired = wait([self.call_fd, self._wake_fd], max(0.0, deadline - time.monotonic()))
                self.calls += fired & 1
                batch = self.ring.receive()
        except ChannelClosed:
            return [], ChannelNotOpen(f"channel {self.index} was closed")
        if batch.signal:
            self.kick()
        failure = None
        if batch.error is not None:
            failure = HostBrokeRing(f"the host's ring cannot be followed: {batch.error}")
            failure.__cause__ = batch.error
        return batch.packets, failure

    def _dispatch(self, packet: RawPacket) -> None:
        if packet.type != PacketType.COMP:
            self._host_packets.append(HostPacket(packet, self._complete))
            return
        transaction = self._in_flight.pop(packet.transaction_id, None)
        if transaction is None:
            self.stray_completions.append(packet)
        else:
            transaction.place = next(self._places)
            transaction.completed_at = time.perf_counter()
            transaction.completion = packet.payload

    def _complete(self, transaction_id: int, payload: bytes) -> None:
        self._put(PacketType.COMP, payload, transaction_id, 0, None, TIMEOUT)

    # ---- end ----

    def fail(self, error: Exception) -> None:
        """Ends the channel for its callers: those that wait get ``error``."""
        with self._changed:
            self._fail(error)
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            signal(self._wake_fd)

    def detach(self) -> None:
        """Detaches the ring and closes the eventfds; the host has closed its end."""
        self.fail(ChannelNotOpen(f"channel {self.index} was closed"))
        with self._changed:
            while self._pumping:
                self._changed.wait()
        with self._send_lock:
            self.ring.close()
            for fd in (self.kick_fd, self.call_fd, self._wake_fd):
                os.close(fd)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._drop_in_flight(error)

    def _drop_in_flight(self, error: Exception) -> None:
        for transaction in self._in_flight.values():
            transaction.failure = error
        self._in_flight.clear()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
