# SPDX-License-Identifier: GPL-2.0-or-later
"""Tries a device out: sends it packets with pages, answers what it sends, and notes everything.

All packets are sent before the first completion is waited for, so a device may complete them in
any order. Each packet has pages of its own, scattered, with known content, and a page on either
side that must stay as it is.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.errors import ChannelNotOpen, GuestSideError, HostBrokeRing, ReceiveTimeout
from vhostvmbus.guest.ram import GuestRam
from vhostvmbus.guest.transactions import HostPacket
from vhostvmbus.wire.vmbus import PAGE_SIZE

_GREETING = 0.05
"""Seconds in which the host's first packets are looked for before anything is sent."""
_MARGIN = b"\xa5" * PAGE_SIZE


@dataclass(slots=True)
class Exchange:
    """One packet and what became of it.

    ``number`` counts the packets as they were sent, ``place`` as they were completed; both from 0
    to ``count - 1``. ``before`` and ``after`` are the content of its pages.
    """

    number: int
    count: int
    payload: bytes
    before: bytes = b""
    after: bytes = b""
    completion: bytes = b""
    place: int = -1
    seconds: float = 0.0
    failure: GuestSideError | None = None
    """The reason that there is no completion."""
    strayed: bool = False
    """Set if a page beside the packet's own was touched."""


@dataclass(slots=True)
class Trial:
    """A whole trial: the packets sent, and what the host sent by itself, in order."""

    exchanges: list[Exchange]
    from_host: list[bytes] = field(default_factory=list)


def try_channel(
    channel: GuestChannel,
    ram: GuestRam,
    *,
    payload: Callable[[int], bytes],
    count: int = 1,
    pages: int = 0,
    timeout: float = 10.0,
) -> Trial:
    """Sends ``count`` packets with ``pages`` pages each (0: in-band) and waits for the completions.

    What the host sends is completed with its own payload.  ``timeout`` is for each wait, in
    seconds; a packet that is not completed in time has its ``failure``.
    """
    trial = Trial([])
    with contextlib.suppress(ReceiveTimeout):
        # What the host sends at the start is in the ring already: answer it first.
        while True:
            _answer(channel.receive(_GREETING), trial)
    stop = threading.Event()
    answering = threading.Thread(target=_answer_all, args=(channel, trial, stop), daemon=True)
    answering.start()
    try:
        _exchange(trial, channel, ram, payload, count, pages, timeout)
    finally:
        stop.set()
        answering.join()
    return trial


def _exchange(
    trial: Trial,
    channel: GuestChannel,
    ram: GuestRam,
    payload: Callable[[int], bytes],
    count: int,
    pages: int,
    timeout: float,
) -> None:
    under_way = []
    for number in range(count):
        exchange = Exchange(number, count, payload(number))
        pfns: list[int] = []
        started = time.perf_counter()
        if pages:
            first, *pfns, last = ram.alloc_pages(pages + 2)
            exchange.before = random.Random(number).randbytes(pages * PAGE_SIZE)
            ram.write([first, *pfns, last], _MARGIN + exchange.before + _MARGIN)
            pfns = [first, *pfns, last]
            started = time.perf_counter()
            transaction = channel.submit_with_external_pfns(
                exchange.payload, pfns, pfn_offset=1, pfn_length=pages, timeout=timeout
            )
        else:
            transaction = channel.submit(exchange.payload, timeout=timeout)
        trial.exchanges.append(exchange)
        under_way.append((exchange, transaction, pfns, started))
    for exchange, transaction, pfns, started in under_way:
        try:
            exchange.completion = transaction.wait(timeout)
            exchange.place = transaction.place
            exchange.seconds = transaction.completed_at - started
        except GuestSideError as error:
            exchange.failure = error
        if pfns:
            exchange.after = ram.read(pfns[1:-1])
            exchange.strayed = ram.read([pfns[0], pfns[-1]]) != 2 * _MARGIN


def _answer(packet: HostPacket, trial: Trial) -> None:
    trial.from_host.append(packet.payload)
    if packet.completion_requested:
        packet.complete(packet.payload)


def _answer_all(channel: GuestChannel, trial: Trial, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            _answer(channel.receive(_GREETING), trial)
        except ReceiveTimeout:
            continue
        except (ChannelNotOpen, HostBrokeRing):
            return
