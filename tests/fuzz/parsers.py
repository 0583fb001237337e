# SPDX-License-Identifier: GPL-2.0-or-later
"""What reads bytes that a guest or a front end chose, in Python: one fuzz target for each.

A target takes any bytes and returns; it raises when an invariant is broken or when an exception
escapes that is not the parser's named one. ``parsers_fuzz.py`` drives them with atheris, the test
suite replays ``corpus/parsers/<target>`` (docs/fuzzing.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from scsi_support import BytesBuffer, make_unit

from vhostvmbus.devices.scsi import storvsp
from vhostvmbus.devices.scsi.commands.execute import execute
from vhostvmbus.devices.scsi.session import Answer, CreateSubChannels, Execute, Reset, Session
from vhostvmbus.devices.scsi.storvsp import Operation, Srb
from vhostvmbus.devices.scsi.unit import NoData, Request
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, REPLY, Decoder, Direction, Frame, encode
from vhostvmbus.vhost_user.errors import ProtocolError
from vhostvmbus.vhost_user.gpadl import SEALS, read_list
from vhostvmbus.vhost_user.session import BackEndSession, Call, FrontEndSession
from vhostvmbus.wire.errors import GpadlInvalid, GpaRangeError
from vhostvmbus.wire.gpa import GpaRange, build_ranges, parse_ranges, pfn_count

FEATURES = m.REQUIRED_FEATURES | m.ProtocolFeature.VMBUS_CODE_MAP
OFFER = m.OfferReply(UUID(int=1), UUID(int=2), 0, 0, 2, 4, b"")
NEGOTIATION: list[tuple[m.Message, int]] = [
    (m.GetFeatures(), 0),
    (m.GetProtocolFeatures(), 0),
    (m.SetProtocolFeatures(int(FEATURES)), 0),
    (m.SetFeatures(m.F_PROTOCOL_FEATURES), 0),
    (m.SetOwner(), 0),
    (m.SetBackendReqFd(), 1),
    (m.GetMaxMemSlots(), 0),
    (m.GetOffer(), 0),
]
DIRECTIONS = tuple(Direction)
BLOCKS = 64


def gpa_ranges(data: bytes) -> None:
    """``count u32, offset u8``, then the bytes that hold the ranges."""
    if len(data) < 5:
        return
    count, offset = struct.unpack_from("<IB", data)
    body = data[5:]
    try:
        ranges = parse_ranges(body, count, offset=offset, max_bytes=1 << 34)
    except GpaRangeError:
        return
    assert len(ranges) == count
    assert sum(item.byte_count for item in ranges) <= 1 << 34
    for item in ranges:
        assert len(item.pfns) == pfn_count(item.byte_offset, item.byte_count)
    raw = build_ranges(ranges)
    assert body[offset : offset + len(raw)] == raw


def gpadl_list(data: bytes) -> None:
    """``count u32, bytes u32``, then the content of the sealed memfd."""
    if len(data) < 8:
        return
    count, size = struct.unpack_from("<II", data)
    fd = os.memfd_create("gpadl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, data[8:])
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        ranges = read_list(fd, count, size)
    except GpadlInvalid:
        return
    finally:
        os.close(fd)
    assert build_ranges(ranges) == data[8 : 8 + size]


def frames(data: bytes) -> None:
    """``direction u8, chunk u8, descriptors u8``, then the stream of that direction.

    However the stream is cut, the same frames come out, and the same error.
    """
    if len(data) < 3:
        return
    direction = DIRECTIONS[data[0] % len(DIRECTIONS)]
    chunk, fds, stream = data[1] or 1, list(range(data[2] % 4)), data[3:]
    whole = _decoded(direction, [stream], fds)
    assert _decoded(direction, _pieces(stream, chunk), fds) == whole
    for frame in whole[0]:
        again = encode(frame.message, request=frame.request, flags=_flags(direction, frame))
        decoder = Decoder(direction)
        decoder.feed(again, frame.fds)
        assert decoder.next_frame() == frame


def _flags(direction: Direction, frame: Frame) -> int:
    return (REPLY if direction.is_reply else 0) | (NEED_REPLY if frame.need_reply else 0)


def _pieces(stream: bytes, size: int) -> Iterator[bytes]:
    return (stream[at : at + size] for at in range(0, len(stream), size))


def _decoded(
    direction: Direction, pieces: Iterator[bytes] | list[bytes], fds: list[int]
) -> tuple[list[Frame], str | None]:
    decoder, found = Decoder(direction), []
    try:
        for piece in pieces:
            if not piece:
                continue
            decoder.feed(piece, fds)
            fds = []
            while (frame := decoder.next_frame()) is not None:
                found.append(frame)
    except ProtocolError as error:
        return found, type(error).__name__
    return found, None


def back_end_session(data: bytes) -> None:
    """``negotiated u8``, then pieces: ``length u8, descriptors u8, status u8`` and the bytes.

    No descriptor is lost, and nothing is taken or answered after an error.
    """
    session = BackEndSession(OFFER)
    numbers = iter(range(1000, 1 << 30))
    given, back = set(), set()
    pieces = [(encode(message, flags=NEED_REPLY), fds, 0) for message, fds in NEGOTIATION]
    pieces = pieces[: data[0] % 9] if data else []
    at = 1
    while at + 3 <= len(data):
        length, fds, status = data[at : at + 3]
        pieces.append((data[at + 3 : at + 3 + length], fds % 4, status))
        at += 3 + length
    try:
        for stream, count, status in pieces:
            if not stream:
                continue
            fds_now = [next(numbers) for _ in range(count)]
            given.update(fds_now)
            session.receive_data(stream, fds_now)
            while (event := session.next_event()) is not None:
                back.update(event.fds)
                if isinstance(event, Call):
                    session.answer(event, status)
        session.receive_end()
    except ProtocolError:
        session.data_to_send()
        with contextlib.suppress(ProtocolError):
            session.receive_data(b"more")
            assert session.next_event() is None
        assert session.data_to_send() == b""
    back.update(session.release_fds())
    assert back == given


def front_end_session(data: bytes) -> None:
    """What a back end answers to the negotiation; after that, to a GPADL's creation."""
    session = FrontEndSession(FEATURES)
    requests = [message for message, _ in NEGOTIATION] + [m.GpadlCreate(0, 1, 1, 16)] * 4
    session_fds = [fds for _, fds in NEGOTIATION] + [1] * 4
    rest = data
    try:
        for request, fds in zip(requests, session_fds, strict=True):
            session.send(request, fds)
            while session.next_event() is None:
                if not rest:
                    session.receive_end()
                    return
                piece, rest = rest[: session.wanted or 1], rest[session.wanted or 1 :]
                session.receive_data(piece)
    except ProtocolError:
        return


def storage_session(data: bytes) -> None:
    """``options u8``, then packets: ``length u8`` and the bytes, as a guest's driver sends them.

    Every packet gets exactly one thing to do; requests are carried out on a small disk.
    """
    options = data[0] if data else 0
    session = Session(max_transfer_bytes=1 << 20, max_sub_channels=options & 3)
    if options & 4:
        session = Session.resumed(max_transfer_bytes=1 << 20)
    unit, disk = make_unit(BLOCKS, read_only=bool(options & 8))
    at = 1
    while at < len(data):
        payload = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        action = session.receive(payload)
        match action:
            case Execute(srb):
                answer = _carried_out(srb, unit if srb.lun == 0 else None)
            case Reset(payload=answer) | CreateSubChannels(payload=answer) | Answer(answer):
                pass
        assert len(answer) in (storvsp.SHORT_PACKET_SIZE, storvsp.PACKET_SIZE)
        operation, _, _ = storvsp.decode_header(answer)
        assert operation == Operation.COMPLETE_IO
    assert len(disk.content) == BLOCKS * 512


def _carried_out(srb: Srb, unit: object) -> bytes:
    size = min(srb.transfer_length, 1 << 16)
    data = BytesBuffer(size) if size else NoData()
    outcome = execute(unit, Request(srb.cdb, data, size), srb.cdb_length, [0])  # type: ignore[arg-type]
    assert 0 <= outcome.transferred <= size
    sense = b"" if outcome.sense is None else outcome.sense.fixed()
    return srb.answer(scsi_status=outcome.status, transferred=outcome.transferred, sense=sense)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        gpa_ranges,
        gpadl_list,
        frames,
        back_end_session,
        front_end_session,
        storage_session,
    )
}


# -- seeds ---------------------------------------------------------------------------------------


def seeds() -> dict[str, dict[str, bytes]]:
    """Inputs that get far into each target, by target and name."""
    three = [GpaRange(5000, 200, [1, 2]), GpaRange(8, 4088, [7]), GpaRange(4096, 0, [9])]
    lists = {"one": [GpaRange(4096, 0, [5])], "three": three, "far": [GpaRange(1, 8192, [1, 2, 3])]}
    ready: list[tuple[m.Message, int]] = [
        (m.AddMemReg(m.MemoryRegion(0, 1 << 20, 0, 0)), 1),
        (m.RemMemReg(m.MemoryRegion(0, 1 << 20, 0, 0)), 0),
        (m.SetMemTable((m.MemoryRegion(1 << 20, 4096, 0, 0),)), 1),
        (m.SetCodeMap(8, (m.CodeMapRegion(0, 4096, 0),)), 1),
        (m.GpadlCreate(0, 1, 1, 16), 1),
        (m.Open(0, 1, 2, 0, 0, 0, bytes(120)), 2),
        (m.Modify(0, 1), 0),
        (m.Close(0), 0),
        (m.GpadlTeardown(0, 1), 0),
        (m.Reset(), 0),
    ]
    return {
        "gpa_ranges": {
            name: struct.pack("<IB", len(ranges), 0) + build_ranges(ranges)
            for name, ranges in lists.items()
        }
        | {"behind": struct.pack("<IB", 1, 8) + bytes(8) + build_ranges(lists["one"])},
        "gpadl_list": {
            name: struct.pack("<II", len(ranges), len(build_ranges(ranges))) + build_ranges(ranges)
            for name, ranges in lists.items()
        },
        "frames": {
            f"request-{message.REQUEST}": bytes([0, 5, fds]) + encode(message, flags=NEED_REPLY)
            for message, fds in NEGOTIATION + ready
        }
        | {
            "offer": bytes([1, 3, 0]) + encode(OFFER, request=1024, flags=REPLY),
            "invalidate": bytes([2, 7, 0])
            + encode(m.InvalidateCode(((4096, 8192),)), flags=NEED_REPLY),
        },
        "back_end_session": {
            "whole": bytes([8]) + b"".join(_piece(message, fds) for message, fds in ready),
            "from-the-start": bytes([0])
            + b"".join(_piece(message, fds) for message, fds in NEGOTIATION + ready),
            "refused": bytes([8]) + b"".join(_piece(message, fds, 1) for message, fds in ready),
        },
        "front_end_session": {"whole": _answers()},
        "storage_session": _storage(),
    }


def _piece(message: m.Message, fds: int, status: int = 0) -> bytes:
    data = encode(message, flags=NEED_REPLY)
    return bytes([len(data), fds, status]) + data


def _answers() -> bytes:
    values = {1: m.F_PROTOCOL_FEATURES, 15: int(FEATURES), 36: 32}
    parts = []
    for message, _ in [*NEGOTIATION, (m.GpadlCreate(0, 1, 1, 16), 1)]:
        number = message.REQUEST
        if isinstance(message, m.SetProtocolFeatures | m.SetFeatures | m.SetOwner):
            continue
        reply = OFFER if isinstance(message, m.GetOffer) else m.Value(values.get(number, 0))
        parts.append(encode(reply, request=number, flags=REPLY))
    return b"".join(parts)


def _storage() -> dict[str, bytes]:
    def packet(operation: int, union: bytes = b"") -> bytes:
        return bytes([64]) + struct.pack("<III", operation, 1, 0) + union.ljust(52, b"\0")

    def srb(cdb: str, size: int = 0, way: int = 1, lun: int = 0) -> bytes:
        raw = bytes.fromhex(cdb)
        union = struct.pack(
            "<HBBBBBBBBBBI16s", 52, 0, 0, 0, 0, 0, lun, len(raw), 20, way, 0, size, raw
        )
        return packet(Operation.EXECUTE_SRB, union)

    start = b"".join(
        [
            packet(Operation.BEGIN_INITIALIZATION),
            packet(Operation.QUERY_PROTOCOL_VERSION, struct.pack("<HH", 0x0602, 0)),
            packet(Operation.QUERY_PROPERTIES),
            packet(Operation.END_INITIALIZATION),
        ]
    )
    commands = {
        "inquiry": srb("120000002400", 36),
        "pages": srb("12018000ff00", 255) + srb("1201b0004000", 64) + srb("1201b2004000", 64),
        "capacity": srb("25000000000000000000", 8)
        + srb("9e10000000000000000000000020" + "0000", 32),
        "read": srb("28000000000000000800", 4096)
        + srb("88" + "00" * 9 + "00000008" + "0000", 4096),
        "write": srb("2a000000000000000800", 4096, 0) + srb("35000000000000000000"),
        "mode": srb("1a003f00ff00", 255)
        + srb("5a003f0000000000ff00", 255)
        + srb("151000001800", 24, 0),
        "unmap": srb("42000000000000001800", 24, 0)
        + srb("93080000000000000000000000080000", 512, 0),
        "luns": srb("a00000000000000000ff0000", 255) + srb("a0" + "00" * 8 + "ff0000", 255, 1, 1),
        "opcodes": srb("a30c000000000000ffff0000", 4096) + srb("9e12" + "00" * 10 + "00200000", 32),
        "resets": packet(Operation.RESET_BUS) + packet(Operation.RESET_LUN),
        "subchannels": packet(Operation.CREATE_SUB_CHANNELS, struct.pack("<H", 2)),
    }
    return {name: bytes([3]) + start + data for name, data in commands.items()} | {
        "resumed": bytes([4]) + commands["read"],
        "short": bytes([0, 11]) + bytes(11),
    }
