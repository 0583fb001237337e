# SPDX-License-Identifier: GPL-2.0-or-later
"""What is behind the link of the benchmark ``net``, in a process of its own.

Takes whatever the card sends, over a sequenced-packet socket with a virtio-net header in front of
each frame; and, once a frame has asked for it, sends frames of one size as fast as they are taken.
"""

from __future__ import annotations

import select
import socket
import struct
import sys

from vhostvmbus.devices.net.link import vnet

MAC = bytes.fromhex("020000000001")
ORDER = b"\x88\xb5"
"""Ethertype of a frame that says, in its first 4 bytes (big-endian), how long frames to the card
shall be; 0: no more of them."""
LONGEST = 1 << 17
_LARGE = struct.Struct("<BBHHHH").pack(1, 1, 54, 1448, 34, 16)
"""Checksum to be done, TCP over IPv4, to be cut into segments of 1448 bytes."""


def frame(size: int, to: bytes = MAC) -> bytes:
    """An Ethernet frame with TCP in IPv4, as far as anybody looks."""
    ip = struct.pack(">BBHHHBBH8s", 0x45, 0, 0, 0, 0, 64, 6, 0, bytes(8))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0, 0, 0, 0)
    return (to + bytes(6) + b"\x08\0" + ip + tcp).ljust(size, b"\0")


def ordered(head: bytes) -> int | None:
    """What a frame's first 18 bytes ask for."""
    return int.from_bytes(head[14:18], "big") if head[12:14] == ORDER else None


def main() -> None:
    """Serves the socket whose descriptor is the first argument, until it is closed."""
    world = socket.socket(fileno=int(sys.argv[1]))
    world.setblocking(False)
    poll = select.poll()
    message = b""
    poll.register(world, select.POLLIN)
    while True:
        poll.poll()
        try:
            while data := world.recv(LONGEST):
                size = ordered(data[vnet.SIZE : vnet.SIZE + 18])
                if size is not None:
                    header = _LARGE if size > 1514 else bytes(vnet.SIZE)
                    message = header + frame(size) if size else b""
                    poll.modify(world, select.POLLIN | (select.POLLOUT if size else 0))
            return  # the card's end is closed
        except BlockingIOError:
            pass
        try:
            while message:
                world.send(message)
        except BlockingIOError:
            continue


if __name__ == "__main__":
    main()
