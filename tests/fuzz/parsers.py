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
import socket
import struct
from collections.abc import Callable, Iterator
from uuid import UUID

from tests.support.scsi_unit import BytesBuffer, make_unit
from tests.support.vnet import HEADER, Offload
from vhostvmbus.devices.net import nvsp, protocol, rndis, rss
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.errors import NetError
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.statistics import Counters
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
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening

FEATURES = m.REQUIRED_FEATURES | m.ProtocolFeature.VMBUS_CODE_MAP
OFFER = m.OfferReply(Offer(UUID(int=1), UUID(int=2), channels=2, max_channels=4))
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


def network_session(data: bytes) -> None:
    """``options u8``, then ``how u8, length u16`` and bytes, as a guest's driver sends them.

    ``how``: 0 an NVSP message, 1 an RNDIS request, 2 RNDIS packets, 3 a frame from the world.
    Every message gets one action; what is asked of the link lies inside of the frame; whatever was
    negotiated and set, the data path in C takes.
    """
    options = data[0] if data else 0
    able = Capabilities(bool(options & 1), bool(options & 2), bool(options & 4))
    adapter = Adapter(b"\x02\0\0\0\0\1", 1500, able, rss.ReceiveScaling(options >> 4 & 3), Counters)
    card = protocol.Protocol(adapter, max_subchannels=options >> 4 & 3)
    with _Link() as link:
        at = 1
        while at + 3 <= len(data):
            how, length = struct.unpack_from("<BH", data, at)
            message = data[at + 3 : at + 3 + length]
            at += 3 + length
            match how & 3:
                case 0:
                    _negotiated(card, message)
                case 1:
                    outcome = card.control(message, 1 << 17)
                    for answer in outcome.messages:
                        assert struct.unpack_from("<I", answer, 4)[0] == len(answer) <= 1024
                        (kind,) = struct.unpack_from("<I", answer)
                        assert kind & rndis.COMPLETION or kind == rndis.MessageType.INDICATE_STATUS
                case 2:
                    with contextlib.suppress(NetError):
                        link.path.send(0, message)
                    link.check_sent()
                case 3:
                    link.receive(message)
            assert all(entry <= options >> 4 & 3 for entry in adapter.scaling.current.table)
            active = card.version is not None
            link.path.configure(adapter, tagging=card.tagging, active=active, receiving=True)


class _Link:
    """A data path between two sockets."""

    def __init__(self) -> None:
        ours, self.world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, self.world):
            end.setblocking(False)
        self.path = DataPath()
        self.port = Port(Framing.DATAGRAM)
        self.port.put(ours.fileno())
        ours.close()
        self.path.use_ports([self.port])
        self.woken = os.eventfd(1, os.EFD_SEMAPHORE)

    def __enter__(self) -> _Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.port.close()
        self.world.close()
        os.close(self.woken)

    def check_sent(self) -> None:
        """What came out at the other end makes sense."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.world.recv(1 << 17)
                _inside(Offload.unpack(data), len(data) - HEADER.size)

    def receive(self, frame: bytes) -> None:
        """There is no buffer: it is taken, and dropped."""
        before = self.path.received().receive_filtered
        self.world.send(bytes(HEADER.size) + frame)
        assert self.path.serve(0, self.woken).woken
        assert self.path.received().receive_filtered == before + 1


def _negotiated(card: protocol.Protocol, message: bytes) -> None:
    action = card.receive(message)
    match action:
        case protocol.Answer(payload):
            assert len(payload) in (0, nvsp.MESSAGE_SIZE)
        case protocol.Lend(receive):
            card.receive_lent |= receive
            card.send_lent |= not receive
        case protocol.OfferSubchannels(count):
            assert 0 < count <= card.max_subchannels


def _inside(offload: Offload, length: int) -> None:
    assert 14 <= length <= 65535 + 14 + 4
    assert not offload.needs_checksum or offload.start + offload.offset + 2 <= length
    assert not offload.gso or offload.start < offload.header_length <= length


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        gpa_ranges,
        gpadl_list,
        frames,
        back_end_session,
        front_end_session,
        storage_session,
        network_session,
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
        (m.Open(Opening(0, 1, 2)), 2),
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
        "network_session": _network(),
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


def _network() -> dict[str, bytes]:
    def item(how: int, data: bytes) -> bytes:
        return struct.pack("<BH", how, len(data)) + data

    def words(*values: int) -> bytes:
        return struct.pack(f"<{len(values)}I", *values)

    def nvsp_message(kind: int, body: bytes = b"") -> bytes:
        return item(0, (words(kind) + body).ljust(40, b"\0"))

    def request(kind: int, *fields: int, info: bytes = b"") -> bytes:
        return item(1, words(kind, 8 + 4 * len(fields) + len(info), *fields) + info)

    def set_oid(oid: int, info: bytes) -> bytes:
        return request(5, 7, oid, len(info), 20, 0, info=info)

    def packet(body: bytes, info: bytes = b"", pad: int = 0) -> bytes:
        head = 44 + len(info)
        fields = (1, head + len(body) + pad, head - 8, len(body), 0, 0, 0, 36, len(info), 0, 0)
        return words(*fields) + info + body + bytes(pad)

    def ppi(kind: int, value: int) -> bytes:
        return words(16, kind, 12, value)

    start = (
        nvsp_message(1, words(0x60001, 0x60001))
        + nvsp_message(125, words(1514, 0, 0x88, 0))
        + nvsp_message(100, words(6, 30))
        + nvsp_message(101, words(0xE1E10, 0xCAFE))
        + nvsp_message(104, words(0xE1E11, 0))
        + request(2, 1, 1, 0, 0x4000)
        + set_oid(0x1010E, words(0x0D))
    )
    settings = struct.pack("<BBH", 0x80, 3, 28) + bytes([1, 4, 4, 4, 4, 0, 0, 2, 2]).ljust(
        24, b"\0"
    )
    scaling = struct.pack(
        "<BBHHHIHxxIHxxIIII", 0x89, 2, 40, 0, 0, 0x1701, 16, 40, 40, 56, 0, 0, 0
    ) + words(1, 2, 1, 2) + bytes(range(40))  # fmt: skip
    name, value = "NetworkAddress".encode("utf-16-le"), "0a0b0c0d0e0f".encode("utf-16-le")
    address = words(20, len(name), 2, 20 + len(name), len(value)) + name + value
    ip4 = bytes(12) + b"\x08\0\x45" + bytes(8) + b"\x06" + bytes(10)
    tcp4 = ip4 + bytes(12) + b"\x50" + bytes(7)
    ip6 = bytes(12) + b"\x86\xdd\x60" + bytes(5) + b"\x06\x40" + bytes(32)
    tcp6 = ip6 + bytes(12) + b"\x50" + bytes(7)
    plain = packet(bytes(60))
    large4 = ppi(2, 1000 | 34 << 20 | 1 << 30)
    large6 = ppi(2, 1000 | 54 << 20 | 3 << 30)
    cases = {
        "plain": item(2, plain) + item(2, packet(bytes(61), pad=7) + plain),
        "checksum": item(2, packet(tcp4 + bytes(9), ppi(0, 5 | 34 << 16)))
        + item(2, packet(tcp6, ppi(0, 6 | 54 << 16) + ppi(6, 0x123 << 4 | 5)))
        + item(2, packet(ip4 + bytes(8), ppi(0, 0x19))),
        "large": item(2, packet(tcp4 + bytes(3000), large4))
        + item(2, packet(tcp6 + bytes(3000), large6 + ppi(8, 77) + ppi(6, 16))),
        "queries": b"".join(
            request(4, 3, oid, 0, 0, 0)
            for oid in (0x10101, 0x10106, 0x1010101, 0x10204, 0x20106, 0x20216)
        ),
        "capabilities": request(4, 3, 0xFC01020D, 4, 20, 0, info=struct.pack("<BBH", 0xA7, 3, 156))
        + request(4, 3, 0x10203, 18, 20, 0, info=struct.pack("<BBH", 0x88, 2, 18).ljust(18, b"\0")),
        "settings": set_oid(0xFC01020C, settings[:22])
        + set_oid(0x1021B, address)
        + set_oid(0x1010103, bytes.fromhex("01005e000001333300000001"))
        + set_oid(0x101010A, bytes(12)),
        "scaling": set_oid(0x10204, scaling)
        + item(3, tcp4)
        + item(3, tcp6)
        + item(3, tcp4[:12] + b"\x81\0\0\5" + tcp4[12:])
        + set_oid(0x10204, scaling[:4] + b"\x10" + scaling[5:])
        + item(3, tcp4),
        "life": request(8, 9) + request(6, 0) + request(3, 9) + request(4, 9, 0x10101, 0, 0, 0),
        "messages": b"".join(
            nvsp_message(kind, words(1, 3))
            for kind in (103, 106, 107, 108, 129, 131, 133, 135, 134)
        )
        + nvsp_message(1, words(2, 0x30002)),
    }
    return {name: bytes([0x37]) + start + set_oid(0xFC01020C, settings) + data
            for name, data in cases.items()} | {
        "unable": bytes([0]) + start + cases["large"],
        "early": bytes([0x37]) + cases["queries"] + cases["plain"] + cases["messages"],
    }  # fmt: skip
