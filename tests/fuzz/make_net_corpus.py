# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the seed inputs of ``net_fuzz.c``: valid messages, and one for each kind of mistake.

Usage: ``python tests/fuzz/make_net_corpus.py FOLDER``. What a fuzzing run found beyond them is kept
in ``corpus/net`` beside them. The steps' bytes are described in ``net_fuzz.c``.
"""

import struct
import sys
from pathlib import Path

from vhostvmbus.guest.netvsc import CHECKSUM, LARGE_SEND, VLAN, element, packet_message

SEND, DATA = 0, 5 * 4096
"""Where the send buffer and the data pages begin, for :func:`write`."""
MAC, PEER = bytes.fromhex("020000000001"), bytes.fromhex("020000000099")
TELL, TAG, COALESCE, BIG, WILD = 2, 4, 8, 16, 32
HOLD, GO_ON, CLOSE = 0xC0, 0x80, 0x40

FRAME = PEER + MAC + b"\x88\xb5" + bytes(range(60))
IP4 = b"\x45" + bytes(8) + b"\x06" + bytes(2) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
TCP = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 5, 0, 0)
TCP4 = PEER + MAC + b"\x08\0" + IP4 + TCP + b"data"
IP6 = b"\x60" + bytes(5) + b"\x06\x40" + bytes(range(32))
TCP6 = PEER + MAC + b"\x86\xdd" + IP6 + TCP + b"data"
TAGGED = MAC + PEER + b"\x81\0\x20\x05\x08\0" + IP4 + TCP


def settings(flags: int = 1, able: int = 0x7F, wanted: int = 0x0D, table: int = 0) -> bytes:
    """New settings."""
    return struct.pack("<BBBBBHB", 0, flags, able, wanted, 1, 0x1700, table)


def write(offset: int, data: bytes) -> bytes:
    """The guest writes its memory."""
    return b"".join(
        bytes([5]) + (offset + at).to_bytes(3, "little") + bytes([len(part)]) + part
        for at in range(0, len(data), 255)
        for part in [data[at : at + 255]]
    )


def inband(section: int, size: int, channel: int = 0, how: int = 4) -> bytes:
    """A packet with RNDIS data in a section."""
    return bytes([1, channel, how, section]) + struct.pack("<H", size)


def paged(ranges: list[tuple[int, int, int]], size: int = 0, channel: int = 0) -> bytes:
    """... in pages, ``(page, offset, length)``, behind ``size`` bytes of section 0."""
    head = bytes([2, channel, 4, 0]) if size else bytes([2, channel, 0])
    head += struct.pack("<HB", size, len(ranges) - 1)
    return head + b"".join(
        struct.pack("<BH", page, offset) + length.to_bytes(3, "little")
        for page, offset, length in ranges
    )


def frame(
    data: bytes, length: int = 0, vnet: tuple[int, ...] = (0, 0, 0, 0, 0, 0), queue: int = 0
) -> bytes:
    """The link has a frame."""
    header = struct.pack("<BBHHHH", *vnet)
    size = max(length, len(data)).to_bytes(3, "little")
    return bytes([4, queue, 7]) + header + size + bytes([len(data)]) + data


def complete(which: int = 0, how: int = 1, channel: int = 0, more: bytes = b"") -> bytes:
    """The guest gives sections back."""
    return bytes([3, how, channel, which]) + more


def serve(queue: int = 0) -> bytes:
    """The card takes frames, and the guest looks at its rings."""
    return bytes([6, queue | 4 if queue < 2 else queue])


def receive(how: int = 2) -> bytes:
    """The card takes packets."""
    return bytes([7, how])


def message(data: bytes) -> bytes:
    """Two of the same packet: in a section, and in pages."""
    return (
        settings()
        + write(SEND, data)
        + inband(0, len(data))
        + receive()
        + write(DATA + 100, data)
        + paged([(0, 100, len(data))])
        + receive(0)
    )


def patched(data: bytes, at: int, value: int) -> bytes:
    """The same with another number at a place."""
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def seeds() -> dict[str, bytes]:
    """All seed inputs by name."""
    plain, to_me = packet_message(FRAME), MAC + PEER + TCP4[12:]
    tcp4 = packet_message(TCP4, element(CHECKSUM, 5 | 34 << 16))
    tcp6 = packet_message(TCP6, element(CHECKSUM, 6 | 54 << 16) + element(VLAN, 0x53))
    large = element(LARGE_SEND, 1000 | 34 << 20 | 1 << 30)
    large_frame = TCP4 + bytes(1900)
    large_head = packet_message(large_frame, large)[:200]
    far = packet_message(TCP4 + bytes(60000), large)[:200]
    returned = frame(to_me) * 3 + serve() + complete() + receive()
    return {
        "empty": b"",
        "plain": message(plain),
        "many": message((plain + bytes(-len(plain) % 8)) * 2),
        "checksum4": message(tcp4),
        "checksum6": message(tcp6),
        "ip-checksum": message(packet_message(TCP4, element(CHECKSUM, 0x11))),
        "udp": message(packet_message(TCP4, element(CHECKSUM, 9 | 34 << 16))),
        "large-small": message(packet_message(TCP4 + bytes(100), large)),
        "large": settings()
        + write(DATA, large_head)
        + paged([(0, 0, 56 + 4 + len(large_frame))])
        + receive(),
        "large-far": settings() + write(DATA, far) + paged([(0, 0, 60128 + 4)]) + receive(),
        "split": settings()
        + write(SEND, tcp4[:60])
        + write(DATA, tcp4[60:])
        + paged([(0, 0, len(tcp4) - 60)], 60)
        + receive(),
        "ranges": settings() + write(DATA, plain) + paged([(0, 0, 50), (0, 50, 100)]) + receive(),
        "bad-type": message(patched(plain, 0, 2)),
        "bad-length": message(patched(plain, 4, 0xFFFFFFFF)),
        "bad-offset": message(patched(plain, 8, 0xFFFFFFF0)),
        "bad-size": message(patched(plain, 12, 0xFFFFFFF0)),
        "bad-oob": message(patched(plain, 20, 4)),
        "bad-info-offset": message(patched(tcp4, 28, 0xFFFFFFF0)),
        "bad-info-size": message(patched(tcp4, 32, 0xFFFFFFF0)),
        "bad-element": message(patched(tcp4, 44, 0)),
        "bad-element-offset": message(patched(tcp4, 52, 0xFFFFFFF8)),
        "twice": message(packet_message(FRAME, element(VLAN, 1) * 2)),
        "short-frame": message(packet_message(FRAME[:13])),
        "long-frame": message(packet_message(FRAME + bytes(1500))[:255]),
        "cut": message(plain[:-1]),
        "nothing": settings() + inband(0, 0) + inband(200, 60) + inband(0, 0xFFFF) + receive(),
        "no-buffer": settings() + bytes([10, 8]) + inband(0, 100) + receive(),
        "inactive": settings(0) + write(SEND, plain) + inband(0, len(plain)) + receive(),
        "no-answer": settings() + write(SEND, plain) + inband(0, len(plain), 0, 0x24) + receive(),
        "burst": settings() + write(SEND, plain) + inband(0, len(plain)) * 40 + receive(),
        "other-kind": settings() + bytes([1, 0, 1]) + bytes(9) + inband(0, 9) + receive(),
        "frames": settings() + returned * 2,
        "frames-served": settings(1 | TELL | TAG, table=128)
        + frame(to_me, vnet=(2, 0, 0, 0, 0, 0))
        + frame(TAGGED, vnet=(1, 0, 0, 0, 38, 16))
        + frame(MAC + PEER + TCP6[12:], vnet=(1, 0, 0, 0, 54, 16))
        + serve()
        + complete()
        + complete(0, 1, 1)
        + receive()
        + receive(3),
        "frame-checksum-nonsense": settings()
        + frame(to_me, vnet=(1, 0, 0, 0, 60, 0xFFFF))
        + frame(to_me, vnet=(1, 0, 0, 0, 0, 16))
        + frame(to_me, vnet=(0, 9, 0, 0, 0, 0))
        + frame(to_me[:13])
        + frame(FRAME)
        + frame(b"\1" + bytes(5) + FRAME[6:])
        + frame(b"\xff" * 6 + FRAME[6:])
        + serve(),
        "frame-far-checksum": settings(1 | COALESCE)
        + frame(to_me, 4001, (1, 0, 0, 0, 2001, 6))
        + frame(to_me, 4000, (1, 0, 0, 0, 34, 3900))
        + serve()
        + complete()
        + receive(),
        "coalesced": settings(1 | COALESCE | TAG | TELL, table=3)
        + frame(to_me, 20000, (1, 1, 0, 1448, 34, 16))
        + frame(TAGGED, 9000, (2, 0, 0, 0, 0, 0))
        + serve()
        + complete()
        + receive(),
        "too-long": settings() + frame(to_me, 1616) + frame(to_me, 1617) + frame(to_me, 65999)
        + serve() + settings(1 | COALESCE) + frame(to_me, 65999) + serve(),
        "pieces": settings(1 | COALESCE) + bytes([9, 0x11]) + frame(to_me, 8000) * 2 + serve(),
        "small-sections": settings(1 | COALESCE) + bytes([9, 3]) + frame(to_me, 3000) + serve(),
        "starved": settings() + (frame(to_me) * 9 + serve()) * 7 + complete() * 3 + receive(),
        "ring-full": settings() + bytes([11, HOLD]) + frame(to_me) * 3 + serve()
        + bytes([12, 0, 0, 11, GO_ON]) + frame(to_me) + serve(),
        "code": settings() + bytes([13, 6]) + frame(to_me) * 9 + serve() + bytes([13, 2]),
        "wrong-channel": settings() + frame(to_me) + serve() + complete(0, 3, 1) + receive(3),
        "guessed": settings() + frame(to_me) * 2 + serve()
        + b"".join(complete(0, 5, 0, bytes([bit])) for bit in (0, 1, 23, 24, 55, 56, 62, 63))
        + complete(0, 0, 0, struct.pack("<II", 1 << 31, 3)) + receive(),
        "twice-returned": settings() + frame(to_me) + serve() + complete() * 3 + receive(),
        "strange-return": settings() + frame(to_me) * 2 + serve() + complete(0, 9)
        + complete(0, 0x21) + receive() + complete(0, 0x11) + receive(),
        "lent-again": settings() + frame(to_me) * 4 + serve() + bytes([9, 1, 9, 0x0C, 9, 0])
        + frame(to_me) + serve() + complete() + receive(),
        "stale-section": settings() + bytes([12, 1, 0, 12, 1, 0, 9, 0, 12, 2, 0, 12, 2, 1])
        + frame(to_me) + serve() + bytes([12, 1, 12, 2, 0, 12, 3, 12, 0, 0]),
        "closed": settings() + frame(to_me) + serve() + bytes([11, CLOSE]) + frame(to_me)
        + serve() + bytes([11, 0]) + frame(to_me) + serve() + complete() + receive(),
        "no-ports": settings() + bytes([13, 0]) + serve() + write(SEND, plain)
        + inband(0, len(plain)) + receive() + bytes([13, 1, 6, 1]),
        "wild-table": settings(1 | WILD, table=200) + frame(to_me) + serve(),
        "big": settings(1 | BIG, wanted=0x20) + bytes([9, 1]) + frame(FRAME, 9014) + serve(),
    }  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
