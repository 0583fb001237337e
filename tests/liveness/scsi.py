# SPDX-License-Identifier: GPL-2.0-or-later
"""The packets of a storage driver, for the sequences whose device is a disk."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

from vhostvmbus.guest.storvsc import BEGIN, END, LONG, QUERY_PROPERTIES, QUERY_VERSION, Storvsc

BLOCK = 512
BLOCKS = (1 << 20) // BLOCK
"""Blocks of the image."""
KINDS = ("write", "read", "same", "same-unmap", "unmap", "verify", "flush")
"""The commands, by the names that a step has for them."""


def _packet(cdb: bytes, size: int = 0, direction: int = 2) -> bytes:
    """Returns an EXECUTE_SRB packet."""
    driver: Any = SimpleNamespace(packet_size=LONG)
    return Storvsc.packet(driver, cdb, size=size, direction=direction)


def harmless() -> bytes:
    """Returns TEST UNIT READY."""
    return _packet(bytes(6))


def good(answer: bytes) -> bool:
    """Tells whether a command succeeded, by the packet that completed it."""
    return len(answer) >= 16 and answer[8:12] == bytes(4) and answer[15] == 0


def greetings() -> list[bytes]:
    """Returns the packets of the handshake."""
    return [
        (struct.pack("<III", operation, 1, 0) + body).ljust(LONG, b"\0")
        for operation, body in (
            (BEGIN, b""),
            (QUERY_VERSION, struct.pack("<HH", 0x0602, 0)),
            (QUERY_PROPERTIES, b""),
            (END, b""),
        )
    ]


def command(kind: str, lba: int, blocks: int) -> tuple[bytes, bytes]:
    """Returns the packet of a command, and the content of the buffer that goes with it."""

    def with_16(opcode: int, flags: int = 0) -> bytes:
        return struct.pack(">BBQIxx", opcode, flags, lba, blocks)

    data = bytes([kind.encode()[0]]) * (blocks * BLOCK)
    match kind:
        case "write":
            cdb, direction = with_16(0x8A), 0
        case "verify":
            cdb, direction = with_16(0x8E), 0
        case "read":
            cdb, direction = with_16(0x88), 1
        case "same":
            cdb, data, direction = with_16(0x93), data[:BLOCK], 0
        case "same-unmap":
            cdb, data, direction = with_16(0x93, 8), bytes(BLOCK), 0
        case "unmap":
            # In pieces, each of which may be held up.
            pieces = [struct.pack(">QI4x", at, 8) for at in range(lba, lba + blocks, 8)]
            body = b"".join(pieces)
            data = struct.pack(">HH4x", len(body) + 6, len(body)) + body
            cdb, direction = struct.pack(">B6xHx", 0x42, len(data)), 0
        case _:
            return _packet(b"\x35".ljust(10, b"\0")), b""
    return _packet(cdb, len(data), direction), data
