# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from the link to the guest: one thread for each queue of the link.

A thread sleeps until the link's queue has a frame, then takes frames, some at a time, straight
into free receive sections, puts an RNDIS header in front of each, and hands them to the channel
that receive-side scaling names: one transfer page packet for all that go the same way. Taking a
frame and telling the guest of it happen on the same thread, so a queue's frames stay in order.

When the guest has returned no section for a tenth of a second, frames are dropped and counted;
until then they wait in the link. Invariants: no section is touched after it was handed over, nor
after :meth:`Receiver.detach` returned.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vhostvmbus.devices.net import frame, ppi, rndis
from vhostvmbus.devices.net.buffers import FRAME_OFFSET, ReceiveBuffer, Section, gather, scatter
from vhostvmbus.devices.net.link import Link, LinkDown, Offload
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.rss import Scaling
from vhostvmbus.devices.net.statistics import Counters

log = logging.getLogger(__name__)

BATCH = 32
"""Frames in one packet to the guest, at most."""
HEAD = 96
"""Bytes of a frame that are looked at: Ethernet, a tag, IP, and TCP's ports."""
PATIENCE = 0.1
"""Seconds without a free section after which frames are dropped."""
PAUSE = 0.01
"""Seconds between two looks at a link that is down, or at sections that do not come back."""
LONGEST = 65535 + frame.ETHERNET_SIZE + frame.VLAN_SIZE


@dataclass(slots=True)
class Delivery:
    """Frames for one channel."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    """``(byte_count, byte_offset)`` in the receive buffer."""
    sections: list[Section] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)
    """Guest memory, ``(gpa, length)``."""


class Owner(Protocol):
    """What a receiver needs from the card."""

    adapter: Adapter
    tagging: bool


Deliver = Callable[[int, ReceiveBuffer, Delivery], int]
"""Tells the guest of frames on a channel; how many could not be told (their sections are free)."""


class Receiver:
    """Serves one queue of a link."""

    def __init__(self, owner: Owner, deliver: Deliver, link: Link, queue: int, name: str) -> None:
        self.counters = Counters()
        self._owner = owner
        self._deliver = deliver
        self._link = link
        self._queue = queue
        self._name = name
        self._buffer: ReceiveBuffer | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._fd = -1
        self._poll = select.poll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._scratch = [memoryview(bytearray(LONGEST))]
        self._starved_since = 0.0
        self._packet_id = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def wake_fd(self) -> int:
        """An eventfd that has the thread look at everything anew."""
        return self._wake_fd

    def start(self) -> None:
        """Begins; until there is a buffer, frames are dropped."""
        self._thread.start()

    def attach(self, buffer: ReceiveBuffer) -> None:
        """Frames go into this buffer from now on."""
        with self._lock:
            self._buffer = buffer

    def detach(self) -> None:
        """No buffer is touched any more when this returns."""
        with self._lock:
            self._buffer = None

    def wake(self) -> None:
        """Looks at the link's descriptor again."""
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Ends the thread; once."""
        self._stopping = True
        self.wake()
        self._thread.join()
        os.close(self._wake_fd)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        pause: float | None = None
        while not self._stopping:
            try:
                pause = self._turn(pause)
            except LinkDown:
                self._forget()
                pause = PAUSE
            except Exception:
                log.exception("%s: a frame could not be received", self._name)
                self.counters.receive_errors += 1
                pause = PAUSE

    def _turn(self, pause: float | None) -> float | None:
        """Waits, and takes what there is; how long to pause before the next one."""
        self._wait(pause)
        more: bool | None = True
        while more and not self._stopping:
            more = self._take()
        return PAUSE if more is None else None

    def _wait(self, pause: float | None) -> None:
        """Until the link has something, or somebody wakes us; or ``pause`` seconds at most,
        in which the link is not looked at."""
        if pause is not None:
            self._forget()
        else:
            fd = self._link.fileno(self._queue)
            if fd != self._fd:
                self._forget()
                if fd >= 0:
                    self._poll.register(fd, select.POLLIN)
                    self._fd = fd
        for fd, events in self._poll.poll(None if pause is None else pause * 1000):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif events & ~select.POLLIN:
                # Gone, or closed and another one by now: the link will say so.
                self._forget()
                if not events & select.POLLIN:
                    time.sleep(PAUSE)

    def _forget(self) -> None:
        if self._fd >= 0:
            try:
                self._poll.unregister(self._fd)
            except KeyError:
                log.debug("%s: descriptor %d was not registered", self._name, self._fd)
            self._fd = -1

    def _take(self) -> bool | None:
        """Takes some frames. True: there may be more; False: there are none; None: no room."""
        with self._lock:
            buffer = self._buffer
            adapter = self._owner.adapter
            if buffer is None or buffer.mapping.closed or not adapter.packet_filter:
                return self._drop("receive_filtered")
            groups: dict[int, Delivery] = {}
            stock: list[Section] = []
            parts = 1
            if adapter.offloads.rsc4 or adapter.offloads.rsc6:
                parts = -(-LONGEST // (buffer.section_size - FRAME_OFFSET))
            more: bool | None = True
            try:
                for _ in range(BATCH):
                    if len(stock) < parts:
                        stock += buffer.take(parts - len(stock))
                        if len(stock) < parts:
                            more = None
                            break
                    views = stock[0].frame
                    if parts > 1:
                        views = [view for section in stock for view in section.frame]
                    got = self._link.receive_into(self._queue, views)
                    if got is None:
                        more = False
                        break
                    used = self._receive(stock, views, *got, groups)
                    if used:
                        del stock[:used]
            finally:
                buffer.give(stock)
                for channel, delivery in groups.items():
                    lost = self._deliver(channel, buffer, delivery)
                    self.counters.receive_no_buffer += lost
            if more is None:
                return self._starved()
            self._starved_since = 0.0
            return more

    def _starved(self) -> bool | None:
        now = time.monotonic()
        if not self._starved_since:
            self._starved_since = now
        if now - self._starved_since >= PATIENCE:
            self._drop("receive_no_buffer")
        return None

    def _drop(self, counter: str) -> bool:
        """Takes frames off the link for nothing; true if there may be more."""
        for _ in range(4 * BATCH):
            if self._link.receive_into(self._queue, self._scratch) is None:
                return False
            setattr(self.counters, counter, getattr(self.counters, counter) + 1)
        return True

    # -- one frame -----------------------------------------------------------------------------

    def _receive(
        self,
        stock: list[Section],
        views: list[memoryview],
        length: int,
        offload: Offload,
        groups: dict[int, Delivery],
    ) -> int:
        """A frame is in the first sections of ``stock``; how many of them were handed over."""
        counters, adapter = self.counters, self._owner.adapter
        if length < frame.ETHERNET_SIZE:
            counters.receive_errors += 1
            return 0
        head = stock[0].read_frame(0, min(length, HEAD))
        destination = head[:6]
        if not adapter.wants(destination):
            counters.receive_filtered += 1
            return 0
        room = stock[0].room
        used = -(-length // room)
        if used > len(stock):
            counters.receive_errors += 1
            return 0
        whole = used == 1
        info = self._checksum(views, length, head, offload)
        if info is None:
            counters.receive_errors += 1
            return 0
        shift = 0
        if head[12:14] == frame.VLAN_TAG and self._owner.tagging and length >= 18:
            info += ppi.element(ppi.VLAN, ppi.vlan_value(head[14] << 8 | head[15]))
            stock[0].write_frame(frame.VLAN_SIZE, head[:12])
            shift = frame.VLAN_SIZE
        channel = 0
        scaling: Scaling = adapter.scaling.current
        if scaling.enabled:
            channel, value = scaling.channel(head)
            if value is not None:
                info += ppi.element(ppi.HASH_VALUE, value)
        delivery = groups.get(channel)
        if delivery is None:
            delivery = groups[channel] = Delivery()
        counters.received.count(destination, length)
        if whole:
            section = stock[0]
            size = length - shift
            offset = FRAME_OFFSET + shift
            section.write(rndis.packet_header(offset, size, info))
            delivery.ranges.append((offset + size, section.offset))
            delivery.sections.append(section)
            delivery.written += section.spans
            return 1
        counters.coalesced += 1
        self._packet_id += 1
        left = length
        for number in range(used):
            section = stock[number]
            size = min(left, room)
            left -= size
            offset = FRAME_OFFSET
            if number == 0:
                offset += shift
                size -= shift
            parts = info + ppi.fragment(number, used, self._packet_id)
            section.write(rndis.packet_header(offset, size, parts))
            delivery.ranges.append((offset + size, section.offset))
            delivery.sections.append(section)
            delivery.written += section.spans
        return used

    def _checksum(
        self, views: list[memoryview], length: int, head: bytes, offload: Offload
    ) -> bytes | None:
        """What the guest is told of the frame's checksums; None if the link tells nonsense.

        A checksum that the host left undone is done here, unless the frame is to be taken for a
        coalesced one: a guest may forward this frame, and has no way to say so.
        """
        if not (offload.needs_checksum or offload.checksum_valid):
            return b""
        if offload.needs_checksum and not offload.gso:
            done = frame.completed_checksum(gather(views, 0, length), offload)
            if done is None:
                return None
            scatter(views, *done)
        if not self._owner.adapter.offloads.receive.checksum:
            return b""
        kind = frame.transport(head)
        if kind == frame.TCP:
            return ppi.element(ppi.CHECKSUM, ppi.TCP_VALID)
        if kind == frame.UDP:
            return ppi.element(ppi.CHECKSUM, ppi.UDP_VALID)
        return b""
