# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the seed inputs of ``engine_fuzz.c``: valid packets, and one for each kind of mistake.

Usage: ``python tests/fuzz/make_corpus.py FOLDER``. What a fuzzing run found beyond them is kept in
``corpus/engine`` beside them.
"""

import struct
import sys
from pathlib import Path

from vhostvmbus.wire.gpa import GpaRange, build_ranges
from vhostvmbus.wire.vmbus import Descriptor, PacketType, align8, pack_descriptor

DATA = 3 * 4096
GUEST_ROLE, FEATURES, PLAN, RECORD = 1, 2, 4, 8
SLOTS, SLOT_BYTES = 4, 1024


def packet(kind: int, payload: bytes = b"", header: bytes = b"", tid: int = 1) -> bytes:
    """A well-formed packet with its trailer."""
    offset = 16 + align8(len(header))
    length = offset + align8(len(payload))
    body = pack_descriptor(Descriptor(kind, offset // 8, length // 8, 1, tid))
    return (body + header).ljust(offset, b"\0") + payload.ljust(length - offset, b"\0") + bytes(8)


def gpa(ranges: list[GpaRange], count: int | None = None) -> bytes:
    """The header of a GPA-direct packet."""
    return struct.pack("<II", 0, len(ranges) if count is None else count) + build_ranges(ranges)


def case(data: bytes, *, write: int | None = None, read: int = 0, control: int = FEATURES) -> bytes:
    """An input of the fuzz target."""
    write = len(data) % DATA if write is None else write
    return struct.pack("<III", write, read, control) + data


def transfer(kind: int, block: int, blocks: int, room: int = 8192, size: int = 8192) -> bytes:
    """A packet that the fuzz target's plan is for, or nearly: 1 reads, 2 writes."""
    payload = struct.pack("<I", kind) + struct.pack(">QH", block, blocks) + struct.pack("<I", room)
    pages = [GpaRange(size, 100, [0x28, 0x20, 0x51][: (size + 4195) // 4096])]
    return packet(PacketType.DATA_USING_GPA_DIRECT, payload.ljust(32, b"p"), gpa(pages))


def record(
    *slots: tuple[int, int, bytes],
    magic: bytes = b"VVBINFLT",
    current: int = 1,
    taken: int = 3,
    sent: int = 2,
    index: int = 0,
) -> bytes:
    """A part of an in-flight region; slots as ``(number, done, packet)``."""

    def cursors(number: int) -> bytes:
        before = struct.pack("<QII", number - 1, 64, 0)
        return before + struct.pack("<QII", number, index, 0) + struct.pack("<I28x", current)

    head = magic + struct.pack("<III44x", 1, SLOTS, SLOT_BYTES) + cursors(taken) + cursors(sent)
    table, contents = b"", b""
    for number, done, content in slots:
        table += struct.pack("<QQ16sI28x", number, done, content[:16], 0)
        contents += content[16:].ljust(SLOT_BYTES, b"\0")
    return head.ljust(4096, b"\0") + table.ljust(4096, b"\0") + contents


def recorded(part: bytes, control: int = FEATURES | RECORD) -> bytes:
    """An input with a record and an empty ring."""
    return case(part, write=0, control=control)


def record_seeds() -> dict[str, bytes]:
    """Records that another back end left: good ones, and one for each kind of mistake."""
    inband = packet(PacketType.DATA_INBAND, b"one more", tid=7)
    direct = packet(
        PacketType.DATA_USING_GPA_DIRECT, bytes(64), gpa([GpaRange.of_pages([0x20, 0x28])])
    )
    bad = packet(PacketType.DATA_USING_GPA_DIRECT, b"", gpa([GpaRange.of_pages([1])]))
    long = packet(PacketType.DATA_INBAND, bytes(2000))
    whole = record((2, 0, inband), (1, 0, direct), (3, 0, bad), (0, 0, b""))
    return {
        "record-none": recorded(b""),
        "record-whole": recorded(whole),
        "record-done": recorded(record((1, 2, inband), (2, 3, inband), (3, 1, direct))),
        "record-not-taken": recorded(record((4, 0, inband), (3, 0, inband))),
        "record-too-long": recorded(record((1, 0, long), (2, 0, inband))),
        "record-planned": recorded(
            record((1, 0, transfer(1, 1, 8)), (2, 0, transfer(2, 2, 4)), (3, 0, inband)),
            FEATURES | PLAN | RECORD,
        ),
        "record-twice": recorded(record((1, 0, inband), (1, 0, inband))),
        "record-length": recorded(record((1, 0, struct.pack("<HHHHQ", 6, 2, 1, 1, 1)))),
        "record-offset": recorded(record((1, 0, struct.pack("<HHHHQ", 6, 9, 3, 1, 1)))),
        "record-magic": recorded(record(magic=b"nonsense")),
        "record-current": recorded(record(current=2)),
        "record-number": recorded(record(taken=1 << 63)),
        "record-index": recorded(record(index=4)),
        "record-stale": recorded(record(index=128)),
    }


def seeds() -> dict[str, bytes]:
    """All seed inputs by name."""
    inband, direct = PacketType.DATA_INBAND, PacketType.DATA_USING_GPA_DIRECT
    whole = gpa([GpaRange.of_pages([0x20, 0x21, 0x28, 0x50])])
    wrapped = bytearray(DATA)
    long = packet(inband, bytes(range(256)))
    wrapped[DATA - 64 :] = long[:64]
    wrapped[: len(long) - 64] = long[64:]
    return {
        "empty": case(b""),
        "inband": case(packet(inband, b"hello") + packet(inband, bytes(100))),
        "gpa-direct": case(packet(direct, bytes(64), whole)),
        "gpa-slack": case(packet(direct, bytes(64), whole + bytes(200))),
        "gpa-offset": case(packet(direct, b"", gpa([GpaRange(5000, 4000, [0x20, 0x22, 0x24])]))),
        "gpa-two-ranges": case(
            packet(direct, b"", gpa([GpaRange(1, 0, [0x20]), GpaRange(4096, 1, [0x5F, 0x10])]))
        ),
        "gpa-far-offset": case(packet(direct, b"", gpa([GpaRange(8, 8200, [0x20, 0x21, 0x22])]))),
        "gpa-none": case(packet(direct, b"", gpa([]))),
        "gpa-empty": case(packet(direct, b"", gpa([GpaRange(0, 0, [])]))),
        "gpa-count": case(packet(direct, b"", gpa([GpaRange(1, 0, [0x20])], 0xFFFFFFFF))),
        "gpa-short": case(packet(direct, b"", gpa([GpaRange(0xFFFFFFFF, 0xFFFFFFFF, [0x20])]))),
        "gpa-outside": case(packet(direct, b"", gpa([GpaRange.of_pages([0x40])]))),
        "gpa-wraps": case(packet(direct, b"", gpa([GpaRange.of_pages([1 << 52 | 0x20])]))),
        "completion": case(packet(PacketType.COMP, b"done")),
        "guest-role": case(
            packet(PacketType.DATA_USING_XFER_PAGES, bytes(8), bytes(16)), control=GUEST_ROLE
        ),
        "wrapped": case(bytes(wrapped), write=len(long) - 64, read=DATA - 64),
        "write-index": case(b"", write=DATA),
        "odd-index": case(b"", write=12),
        "read-index": case(b"", read=0xFFFFFFF8),
        "short": case(bytes(16), write=16),
        "length": case(pack_descriptor(Descriptor(6, 2, 0xFFFF, 0, 0)) + bytes(64)),
        "offset": case(pack_descriptor(Descriptor(6, 9, 3, 0, 0)) + bytes(64)),
        "type": case(packet(0x77)),
        "waits-for-space": case(packet(inband, bytes(2000)), control=FEATURES | 0x800 << 4),
        "plan-read": case(transfer(1, 3, 16), control=FEATURES | PLAN),
        "plan-write": case(transfer(2, 0, 1) + transfer(2, 30, 1), control=PLAN),
        "plan-end": case(transfer(1, 31, 1) + transfer(1, 30, 2), control=PLAN),
        "plan-overflow": case(
            transfer(1, 1 << 55, 1) + transfer(2, (1 << 64) - 1, 1), control=PLAN
        ),
        "plan-room": case(
            transfer(1, 0, 2, room=1023) + transfer(1, 0, 9, size=4096), control=PLAN
        ),
        "plan-mixed": case(
            transfer(1, 0, 1) + packet(inband, b"other") + transfer(2, 1, 1) + transfer(3, 0, 1),
            control=FEATURES | PLAN,
        ),
        "plan-many": case(transfer(1, 1, 1) * 60, control=FEATURES | PLAN | 64 << 16),
        "full-peer": case(packet(inband, bytes(48)) * 100, control=FEATURES | 4088 << 16),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (seeds() | record_seeds()).items():
        (folder / name).write_bytes(data)
