# SPDX-License-Identifier: GPL-2.0-or-later
"""The world behind the links of the benchmark ``net``, in a process of its own.

It takes whatever the card sends, and, once a frame has asked for it, sends frames of one size as
fast as they are taken. Over a sequenced-packet socket with a virtio-net header in front of each
frame, as a TAP has it; or over a stream socket with a frame's length in front of it, as passt has
it.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
from collections.abc import Iterator

MAC = bytes.fromhex("020000000001")
ORDER = b"\x88\xb5"
"""The Ethertype of an order, a frame for the world.

Its first 4 bytes (big-endian) say how long frames to the card shall be; 0: no more of them.
"""
LONGEST = 1 << 17
HEADER = struct.Struct("<BBHHHH")
"""The layout of ``struct virtio_net_hdr``."""
_PLAIN = bytes(HEADER.size)
_LARGE = HEADER.pack(1, 1, 54, 1448, 34, 16)
"""The header of a large frame: checksum to be done, TCP over IPv4, to be cut into segments of 1448
bytes.
"""
_BURST = 1 << 16
"""How many bytes are sent at once on a stream, where frames fit into it."""


def frame(size: int, to: bytes = MAC) -> bytes:
    """Returns an Ethernet frame with TCP in IPv4, as far as anybody looks."""
    ip = struct.pack(">BBHHHBBH8s", 0x45, 0, 0, 0, 0, 64, 6, 0, bytes(8))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0, 0, 0, 0)
    return (to + bytes(6) + b"\x08\0" + ip + tcp).ljust(size, b"\0")


def ordered(head: bytes) -> int | None:
    """Returns what a frame's first 18 bytes ask for."""
    return int.from_bytes(head[14:18], "big") if head[12:14] == ORDER else None


class Datagrams:
    """Frames with a virtio-net header."""

    def heads(self, data: bytes) -> Iterator[bytes]:
        """Yields the first bytes of the frames in what was read."""
        yield data[HEADER.size : HEADER.size + 18]

    def message(self, size: int) -> bytes:
        """Returns what is sent at once."""
        return (_LARGE if size > 1514 else _PLAIN) + frame(size)


class Stream:
    """Frames with their length in front."""

    def __init__(self) -> None:
        self._begun = b""
        self._skip = 0

    def heads(self, data: bytes) -> Iterator[bytes]:
        """Yields the first bytes of the frames in what was read."""
        at = self._skip
        if at < len(data) and self._begun:
            data, at, self._begun = self._begun + data[at:], 0, b""
        while at + 22 <= len(data):
            yield data[at + 4 : at + 22]
            at += 4 + int.from_bytes(data[at : at + 4], "big")
        self._begun = data[at:]
        self._skip = max(0, at - len(data))

    def message(self, size: int) -> bytes:
        """Returns what is sent at once."""
        one = struct.pack(">I", size) + frame(size)
        return one * max(1, _BURST // len(one))


def main() -> None:
    """Serves the socket whose descriptor is the first argument, until it is closed."""
    world = socket.socket(fileno=int(sys.argv[1]))
    stream = world.type == socket.SOCK_STREAM
    peer: Datagrams | Stream = Stream() if stream else Datagrams()
    world.setblocking(False)
    poll = select.poll()
    message = rest = b""
    poll.register(world, select.POLLIN)
    while True:
        poll.poll()
        try:
            while data := world.recv(LONGEST):
                for size in map(ordered, peer.heads(data)):
                    if size is not None:
                        message = peer.message(size) if size else b""
                        poll.modify(world, select.POLLIN | (select.POLLOUT if size else 0))
            return  # the card's end is closed
        except BlockingIOError:
            pass
        try:
            while rest or message:
                rest = rest or message
                sent = world.send(rest)
                rest = rest[sent:] if stream else b""
        except BlockingIOError:
            rest = rest if stream else b""


if __name__ == "__main__":
    main()
