# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message of the vhost-user extension with its bytes, as the specification has them."""

from __future__ import annotations

import struct
from uuid import UUID

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import Decoder, Direction, Frame
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import EVERY_PAGE

CLASS_ID = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
REGION = m.MemoryRegion(0x1_0000_0000, 0x20_0000, 0x7F00_0000_0000, 0x3000)
REGION_BYTES = (
    bytes.fromhex("0000000001000000")
    + bytes.fromhex("0000200000000000")
    + bytes.fromhex("00000000007f0000")
    + bytes.fromhex("0030000000000000")
)
USER_DATA = bytes(range(120))

REQUESTS: list[tuple[m.Message, int, bytes, int]] = [
    (m.GetFeatures(), 1, b"", 0),
    (m.SetFeatures(1 << 30), 2, b"\0\0\0\x40\0\0\0\0", 0),
    (m.SetOwner(), 3, b"", 0),
    (m.SetMemTable(()), 5, bytes(8), 0),
    (m.SetMemTable((REGION, REGION)), 5, b"\2" + bytes(7) + REGION_BYTES * 2, 2),
    (m.GetProtocolFeatures(), 15, b"", 0),
    (m.SetProtocolFeatures(1 << 48), 16, bytes(6) + b"\1\0", 0),
    (m.SetBackendReqFd(), 21, b"", 1),
    (m.GetMaxMemSlots(), 36, b"", 0),
    (m.AddMemReg(REGION), 37, bytes(8) + REGION_BYTES, 1),
    (m.RemMemReg(REGION), 38, bytes(8) + REGION_BYTES, 0),
    (m.RemMemReg(REGION), 38, bytes(8) + REGION_BYTES, 1),
    (m.GetOffer(), 1024, b"", 0),
    (m.GpadlCreate(1, 0xE1E10, 2, 64), 1025, struct.pack("<IIII", 1, 0xE1E10, 2, 64), 1),
    (m.GpadlTeardown(1, 0xE1E10), 1026, struct.pack("<II", 1, 0xE1E10), 0),
    (
        m.Open(Opening(3, 0xE1E10, 4, 1, 0x50003, USER_DATA, True)),
        1027,
        struct.pack("<IIIIII", 3, 0xE1E10, 4, 1, 0x50003, 1) + USER_DATA,
        2,
    ),
    (m.Close(2), 1028, b"\2" + bytes(7), 0),
    (m.Modify(2, 3), 1029, b"\2\0\0\0\3\0\0\0", 0),
    (m.Reset(), 1030, b"", 0),
    (
        m.SetCodeMap(16, (m.CodeMapRegion(0x10_0000, 0x8_0000, 0),)),
        1031,
        struct.pack("<QIIQQQ", 16, 1, 0, 0x10_0000, 0x8_0000, 0),
        1,
    ),
    (
        m.SetCodeMap(0, (m.CodeMapRegion(0, 1 << 32, EVERY_PAGE),)),
        1031,
        struct.pack("<QIIQQ", 0, 1, 0, 0, 1 << 32) + b"\xff" * 8,
        1,
    ),
    (m.Unplug(), 1032, b"", 0),
    (m.Suspend(), 1033, b"", 0),
    (m.Continue(), 1034, b"", 0),
    (m.GetInflightFd(0, 0, 4, 0), 31, bytes(16) + b"\4" + bytes(7), 0),
    (m.SetInflightFd(0x9000, 0x1000, 4, 8), 32, struct.pack("<QQHHI", 0x9000, 0x1000, 4, 8, 0), 1),
]
"""Each message with its number, its payload as the specification has it, and its descriptors."""
OFFER = m.OfferReply(Offer(CLASS_ID, None, 0x10, 2, 1, 4, USER_DATA))
OFFER_BYTES = (
    bytes.fromhex("d96361baa104294db60572e2ffb1dc7f")
    + bytes(16)
    + bytes.fromhex("1000 0200 0100 0400")
    + USER_DATA
)
BACKEND_REQUESTS: list[tuple[m.Message, int, bytes]] = [
    (m.InvalidateCode(()), 1024, bytes(8)),
    (
        m.InvalidateCode(((0x1000, 0x2000), (0x8000, 0x1000))),
        1024,
        struct.pack("<IIQQQQ", 2, 0, 0x1000, 0x2000, 0x8000, 0x1000),
    ),
    (m.OfferChannel(3), 1025, b"\3" + bytes(7)),
    (m.RescindChannel(0), 1026, bytes(8)),
]


def header(request: int, flags: int, size: int) -> bytes:
    return struct.pack("<III", request, flags, size)


def decode(
    data: bytes, direction: Direction = Direction.REQUESTS, fds: tuple[int, ...] = ()
) -> Frame | None:
    decoder = Decoder(direction)
    decoder.feed(data, fds)
    return decoder.next_frame()
