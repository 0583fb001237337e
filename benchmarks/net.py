# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames through the network card: the software guest here, the card in another process.

Two links, each a socket to a third process: one on which a frame comes with a virtio-net header, as
through a TAP, and a stream on which its length is in front of it, as with passt. The reference is a
plain copy of as many bytes.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from benchmarks.net_world import MAC, ORDER, frame
from benchmarks.reference import copies
from benchmarks.ring import in_another_process, processor_time
from benchmarks.table import Table
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.passt import SOCKET_BUFFER, connected_pair
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.guest import GuestChannel, HostPacket, ReceiveTimeout, SoftwareGuest
from vhostvmbus.guest.netvsc import (
    LARGE_SEND,
    RSC_CAPABLE,
    VLAN_CAPABLE,
    Netvsc,
    element,
    packet_message,
)

SIZES = (60, 1514, 65000)
DEPTH = 32
_RETURN = struct.pack("<II", 108, 1)
ORDER_SECONDS = 1.0
"""The seconds after which an order counts as lost: the world drops what it has no room for."""
ORDER_TRIES = 30


class Cable:
    """A link whose descriptor is a socket, with a process behind it."""

    name = "cable"
    queues = 1
    mtu = 1500
    mac = MAC
    capabilities = Capabilities(True, True, True)
    framing: ClassVar = Framing.DATAGRAM

    def __init__(self) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._port = Port(self.framing, self._wake)
        self._socket, theirs = self.sockets()
        self._socket.setblocking(False)
        self._port.put(self._socket.fileno())
        words = [sys.executable, "-m", "benchmarks.net_world", str(theirs.fileno())]
        self._world = subprocess.Popen(words, pass_fds=[theirs.fileno()])
        theirs.close()

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """Returns both ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self, changed: Callable[[], None]) -> None:
        """Does nothing: nothing ever changes."""

    def carrier(self) -> bool:
        """Returns true."""
        return True

    def port(self, queue: int) -> Port:
        """Returns the port to the socket."""
        return self._port

    def use_queues(self, count: int) -> None:
        """Does nothing: there is one."""

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Takes any offloads."""

    def set_mtu(self, mtu: int) -> None:
        """Takes any MTU."""
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        """Returns nothing: there is nothing to count."""
        return {}

    def close(self) -> None:
        """Closes the cable; the process behind it ends with it."""
        self._port.close()
        self._socket.close()
        self._world.wait()
        os.close(self._wake)


class StreamCable(Cable):
    """The same with a stream, on which nothing is left undone."""

    mtu = 65000
    capabilities = Capabilities()
    framing = Framing.STREAM

    def __init__(self) -> None:
        super().__init__()
        self._closing = False
        self._thread = threading.Thread(target=self._tend)
        self._thread.start()

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """Returns both ends, as roomy as passt's."""
        return connected_pair(SOCKET_BUFFER)

    def _tend(self) -> None:
        """Sends the rests of frames, as the link to passt does."""
        while not self._closing:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if not self._port.flush():
                poll.register(self._socket, select.POLLOUT)
            if self._wake in dict(poll.poll()):
                os.eventfd_read(self._wake)

    def close(self) -> None:
        """Ends the thread, too."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        super().close()


class CableCard(NetworkCard):
    """A card on a link like a TAP."""

    def __init__(self) -> None:
        super().__init__(Cable())


class StreamCard(NetworkCard):
    """A card on a link like passt."""

    def __init__(self) -> None:
        super().__init__(StreamCable())


def _sending(
    driver: Netvsc, size: int, batch: int, seconds: float, large: bool
) -> tuple[int, float]:
    sent = frame(size, bytes.fromhex("020000000002"))
    info = element(LARGE_SEND, 1448 | 34 << 20 | 1 << 30) if large and size > 1514 else b""
    message = packet_message(sent, info)
    messages = [message] * batch

    def submit() -> object:
        if size > 1514:
            return driver.send(sent, info, pages=True)
        return driver.send_many(messages)

    flight: deque[object] = deque(submit() for _ in range(DEPTH))
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(8):
            flight.popleft().wait()  # type: ignore[attr-defined]
            flight.append(submit())
        done += 8 * batch
    for item in flight:
        item.wait()  # type: ignore[attr-defined]
    return done + DEPTH * batch, done / elapsed


def _receiving(
    driver: Netvsc, channel: GuestChannel, size: int, seconds: float
) -> tuple[int, float]:
    parts = -(-size // (driver.receive_section - 112))
    order = bytes(6) + MAC + ORDER

    def ask_for(frame_size: int) -> None:
        driver.send(order + frame_size.to_bytes(4, "big") + bytes(42)).wait()

    def take(timeout: float) -> int:
        packet: HostPacket = channel.receive(timeout)
        count = struct.unpack_from("<I", packet.raw.raw, 20)[0]
        packet.complete(_RETURN)
        return int(count) // parts

    done = _first(take, lambda: ask_for(size))
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        done += take(5.0)
    figure = done / elapsed
    again = 0.0
    try:
        while True:
            if time.monotonic() >= again:
                ask_for(0)
                again = time.monotonic() + ORDER_SECONDS
            done += take(0.2)
    except ReceiveTimeout:
        return done, figure


def _first(take: Callable[[float], int], ask: Callable[[], None]) -> int:
    """Takes the first frames; asks again, since an order may be lost like any other frame."""
    for _ in range(ORDER_TRIES):
        ask()
        with contextlib.suppress(ReceiveTimeout):
            return take(ORDER_SECONDS)
    raise RuntimeError(f"the world sent nothing, though it was asked {ORDER_TRIES} times")


PATTERNS = (
    ("sent", 60, 1),
    ("sent", 60, 32),
    ("sent", 1514, 3),
    ("sent", 65000, 1),
    ("received", 60, 0),
    ("received", 1514, 0),
    ("received", 65000, 0),
)
"""The patterns: which way, bytes, frames in a packet (0: as many as the card likes)."""


def measure(
    table: Table, by: str, device: type[NetworkCard], link: type[Cable], seconds: float
) -> None:
    """Measures all patterns with one kind of link."""
    large = link.capabilities.tso4
    with (
        in_another_process(device) as (path, pid),
        SoftwareGuest.connect(path) as guest,
        guest.open_channel(ring_pages=(33, 33)) as channel,
    ):
        driver = Netvsc(guest, channel)
        driver.initialize(
            mtu=link.mtu,
            capabilities=VLAN_CAPABLE | RSC_CAPABLE,
            receive_bytes=16 << 20,
            send_bytes=1 << 20,
        )
        settings = bytes([1, 4, 4, 4, 4, 0, 0, 2, 2, 0, 0]).ljust(18, b"\0") + bytes([2, 2])
        if large and driver.set(0xFC01020C, struct.pack("<BBH", 0x80, 3, 28) + settings + bytes(4)):
            raise RuntimeError("the card's offloads could not be switched on")
        for name, size, batch in PATTERNS:
            card, own = processor_time(pid), time.process_time()
            if batch:
                count, figure = _sending(driver, size, batch, seconds, large)
            else:
                count, figure = _receiving(driver, channel, size, seconds)
            card, own = processor_time(pid) - card, time.process_time() - own
            table.add(
                f"{size} B, {name}",
                by,
                str(batch) if batch else "up to 32",
                figure,
                figure * size * 8 / 1e9,
                figure / copies(size, seconds / 10),
                card / count * 1e6,
                own / count * 1e6,
            )


def tables(seconds: float) -> list[Table]:
    """Returns the table of this benchmark."""
    table = Table(
        "Network card: software guest <-> card in another process",
        ("frames", "by", "a packet", "frames/s", "Gbit/s", "x memcpy", "card CPU us",
         "guest CPU us"),
    )  # fmt: skip
    measure(table, "C", CableCard, Cable, seconds)
    measure(table, "C, stream", StreamCard, StreamCable, seconds)
    table.notes = [
        "x memcpy: frames per plain copy of as many bytes",
        "CPU: processor time for each frame, user space and kernel, the link's socket included",
    ]
    return [table]
