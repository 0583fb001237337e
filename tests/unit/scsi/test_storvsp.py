# SPDX-License-Identifier: GPL-2.0-or-later
"""The vstor protocol: bytes in, bytes out, each protocol version, and any bytes at all."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.devices.scsi import storvsp
from vhostvmbus.devices.scsi.session import (
    Answer,
    CreateSubChannels,
    Execute,
    Reset,
    Session,
    State,
)
from vhostvmbus.devices.scsi.storvsp import MalformedPacket, Operation, Version
from vhostvmbus.wire.ntstatus import NtStatus

VERSIONS = list(Version)


def control(operation: int, body: bytes = b"", size: int = 64) -> bytes:
    return (struct.pack("<III", operation, 1, 0) + body).ljust(size, b"\0")


def header(packet: bytes) -> tuple[int, int, int]:
    return struct.unpack_from("<III", packet)  # type: ignore[return-value]


def srb_packet(cdb: bytes, size: int = 64, **fields: int) -> bytes:
    values = {
        "length": size - 12, "path": 0, "target": 0, "lun": 0, "cdb_length": len(cdb),
        "sense": 20, "data_in": 1, "transfer": 0, "srb_flags": 0,
    } | fields  # fmt: skip
    packet = struct.pack(
        "<III HBB BBBB BBBB I",
        3, 1, 0, values["length"], 0, 0, 7, values["path"], values["target"], values["lun"],
        values["cdb_length"], values["sense"], values["data_in"], 0, values["transfer"],
    )  # fmt: skip
    packet = (packet + cdb.ljust(20, b"\0")).ljust(size, b"\0")
    if size >= 64:
        packet = packet[:52] + struct.pack("<I", values["srb_flags"]) + packet[56:]
    return packet


def negotiated(version: Version = Version.V6_2, **options: int) -> Session:
    session = Session(max_transfer_bytes=2 << 20, **options)
    size = version.packet_size
    for operation, body in (
        (7, b""), (9, struct.pack("<H", version)), (10, b""), (8, b""),
    ):  # fmt: skip
        action = session.receive(control(operation, body, size))
        assert isinstance(action, Answer)
        assert header(action.payload) == (1, 1, 0)
        assert len(action.payload) == size
    assert session.state is State.READY
    return session


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_handshake_of_each_version(version: Version) -> None:
    session = negotiated(version)
    assert session.version is version
    assert version.packet_size == (64 if version >= 0x0501 else 48)


def test_properties() -> None:
    session = Session(max_transfer_bytes=2 << 20, max_sub_channels=3)
    session.receive(control(7))
    session.receive(control(9, b"\x02\x06"))
    action = session.receive(control(10))
    assert isinstance(action, Answer)
    assert action.payload[12:36] == struct.pack("<IHHIIQ", 0, 3, 0, 1, 2 << 20, 0)
    for version in VERSIONS:
        flags = storvsp.properties(version, 0, 4096)[8:12]
        assert flags == struct.pack("<I", version >= 0x0501), "whether there are any or not"


def test_unknown_version_then_a_known_one() -> None:
    session = Session(max_transfer_bytes=4096)
    session.receive(control(7))
    for wanted in (0x0700, 0x0603, 0x0100, 0):
        action = session.receive(control(9, struct.pack("<H", wanted)))
        assert isinstance(action, Answer)
        assert header(action.payload)[2] == NtStatus.REVISION_MISMATCH
        assert session.state is State.VERSION
    action = session.receive(control(9, b"\x01\x05"))
    assert isinstance(action, Answer)
    assert header(action.payload)[2] == 0
    assert session.version is Version.V5_1


@pytest.mark.parametrize("operation", [8, 10, 9, 13, 12, 3, 4, 5, 6])
def test_out_of_sequence_is_refused_and_changes_nothing(operation: int) -> None:
    session = Session(max_transfer_bytes=4096)
    action = session.receive(control(operation))
    assert isinstance(action, Answer)
    assert action.error is not None
    assert header(action.payload)[0] == Operation.COMPLETE_IO
    assert header(action.payload)[2] == NtStatus.INVALID_DEVICE_STATE
    assert session.state is State.CLOSED


@pytest.mark.parametrize("operation", [0, 1, 2, 11, 14, 0xFFFFFFFF])
def test_unknown_and_host_only_operations(operation: int) -> None:
    session = negotiated()
    action = session.receive(control(operation))
    assert isinstance(action, Answer)
    assert header(action.payload)[2] == NtStatus.INVALID_DEVICE_REQUEST
    assert session.state is State.READY


@pytest.mark.parametrize("size", [0, 1, 11, 12, 13, 47, 48, 63])
def test_short_request_completes_and_the_session_goes_on(size: int) -> None:
    session = negotiated()
    action = session.receive(srb_packet(b"\0" * 6)[:size])
    assert isinstance(action, Answer)
    assert action.error is not None
    assert len(action.payload) in (48, 64)
    assert header(action.payload)[0] == 1
    assert header(action.payload)[2] == NtStatus.INVALID_PARAMETER
    assert isinstance(session.receive(srb_packet(b"\0" * 6)), Execute)


def test_begin_initialization_starts_over() -> None:
    session = negotiated()
    session.receive(control(7))
    assert session.state is State.VERSION
    assert session.version is None


@pytest.mark.parametrize(
    ("field", "value", "srb_status"),
    [("length", 35, 0x15), ("cdb_length", 0, 6), ("cdb_length", 17, 6), ("data_in", 3, 6)],
)
def test_wrong_envelope(field: str, value: int, srb_status: int) -> None:
    session = negotiated()
    action = session.receive(srb_packet(b"\x12" + bytes(5), **{field: value}))
    assert isinstance(action, Answer)
    assert action.error is not None
    assert action.error.field == field
    assert action.error.value == value
    assert action.payload[14] == srb_status
    assert header(action.payload)[2] == NtStatus.INVALID_PARAMETER


def test_malformed_packet_pickles() -> None:
    error = MalformedPacket("length", 3, 0, NtStatus.INVALID_PARAMETER)
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.value, again.status) == ("length", 3, NtStatus.INVALID_PARAMETER)


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_answer_layout(version: Version) -> None:
    session = negotiated(version)
    size = version.packet_size
    packet = srb_packet(bytes(range(10)), size, target=1, lun=5, transfer=4096)
    action = session.receive(packet)
    assert isinstance(action, Execute)
    srb = action.srb
    assert (srb.target, srb.lun, srb.port, srb.transfer_length) == (1, 5, 7, 4096)
    assert srb.cdb == bytes(range(10)) + bytes(6)
    good = srb.answer(transferred=512)
    assert len(good) == size
    assert header(good) == (1, 1, 0)
    assert good[14:16] == b"\x01\x00"
    assert good[16:20] == b"\x07\x00\x01\x05"
    assert good[20:24] == b"\x0a\x00\x01\x00"
    assert good[24:28] == struct.pack("<I", 512)
    sense = bytes(range(0x70, 0x70 + 24))
    bad = srb.answer(status=0xC0000185, srb_status=4, scsi_status=2, sense=sense)
    room = 20 if version >= 0x0501 else 18
    assert len(bad) == size
    assert header(bad) == (1, 1, 0xC0000185)
    assert bad[14:16] == b"\x84\x02"
    assert bad[21] == room
    assert bad[28 : 28 + room] == sense[:room]
    assert bad[28 + room :] == packet[28 + room :]


def test_autosense_off_or_no_room() -> None:
    session = negotiated()
    for fields in ({"srb_flags": 0x20}, {"sense": 0}):
        action = session.receive(srb_packet(b"\0" * 6, **fields))
        assert isinstance(action, Execute)
        bad = action.srb.answer(srb_status=4, scsi_status=2, sense=b"\x70" * 18)
        assert bad[14:16] == b"\x04\x02"
        assert bad[21] == 0
    action = session.receive(srb_packet(b"\0" * 6, sense=8))
    assert isinstance(action, Execute)
    bad = action.srb.answer(srb_status=4, scsi_status=2, sense=b"\x70" * 18)
    assert bad[21] == 8
    assert bad[28:40] == b"\x70" * 8 + bytes(4)


@pytest.mark.parametrize("operation", [4, 5, 6])
def test_resets(operation: int) -> None:
    session = negotiated()
    packet = srb_packet(bytes(6), lun=3, target=1)
    action = session.receive(struct.pack("<I", operation) + packet[4:])
    assert isinstance(action, Reset)
    assert (action.operation, action.target, action.lun) == (operation, 1, 3)
    assert header(action.payload) == (1, 1, 0)


def test_sub_channels() -> None:
    session = negotiated(max_sub_channels=2)
    for count, accepted in ((0, True), (1, True), (2, True), (3, False)):
        action = session.receive(control(13, struct.pack("<H", count)))
        assert isinstance(action, CreateSubChannels) is accepted
        assert header(action.payload)[2] == (0 if accepted else NtStatus.INVALID_PARAMETER)
    sub = Session(max_transfer_bytes=4096, version=Version.V6_2)
    assert isinstance(sub.receive(srb_packet(bytes(6))), Execute)
    action = sub.receive(control(7))
    assert isinstance(action, Answer)
    assert header(action.payload)[2] == NtStatus.INVALID_DEVICE_STATE
    assert sub.state is State.READY


def test_fibre_channel_data_is_refused() -> None:
    action = negotiated().receive(control(12))
    assert isinstance(action, Answer)
    assert header(action.payload)[2] == NtStatus.INVALID_DEVICE_REQUEST


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_notification_is_as_long_as_every_packet(version: Version) -> None:
    session = negotiated(version)
    assert session.packet_size == version.packet_size
    packet = storvsp.notification(Operation.ENUMERATE_BUS, session.packet_size)
    assert header(packet) == (11, 0, 0)
    assert len(packet) == version.packet_size


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("size", [0, 8, 40, 48, 56, 64, 72, 256])
def test_every_answer_is_as_long_as_the_version_says(version: Version, size: int) -> None:
    session = negotiated(version, max_sub_channels=1)
    for operation in range(16):
        if operation == 7:
            continue  # it would start over
        action = session.receive(control(operation, b"\1", size)[:size])
        payload = action.srb.answer() if isinstance(action, Execute) else action.payload
        assert len(payload) == version.packet_size
    action = session.receive(srb_packet(bytes(6), version.packet_size).ljust(size, b"\0"))
    assert isinstance(action, Execute)
    assert len(action.srb.answer(sense=bytes(18))) == version.packet_size


@pytest.mark.parametrize("newest", VERSIONS, ids=str)
def test_versions_above_the_newest_are_declined(newest: Version) -> None:
    session = Session(max_transfer_bytes=4096, max_version=newest)
    session.receive(control(7))
    for version in sorted(VERSIONS, reverse=True):
        action = session.receive(control(9, struct.pack("<H", version)))
        assert isinstance(action, Answer)
        assert header(action.payload)[2] == (NtStatus.REVISION_MISMATCH if version > newest else 0)
        if version <= newest:
            break
    assert session.version is newest


def test_sub_channels_before_the_end_of_the_initialization() -> None:
    session = Session(max_transfer_bytes=4096, max_sub_channels=2)
    create = control(13, struct.pack("<H", 2))
    for packet in (control(7), control(9, b"\x02\x06"), control(10)):
        assert header(session.receive(create).payload)[2] == NtStatus.INVALID_DEVICE_STATE  # type: ignore[union-attr]
        session.receive(packet)
    assert isinstance(session.receive(create), CreateSubChannels)
    assert session.state is State.END
    session.receive(control(8))
    assert isinstance(session.receive(create), CreateSubChannels)


@pytest.mark.parametrize("version", [Version.V2_0, Version.V4_2], ids=str)
def test_old_versions_know_no_sub_channels(version: Version) -> None:
    session = Session(max_transfer_bytes=4096, max_sub_channels=2)
    session.receive(control(7, size=48))
    session.receive(control(9, struct.pack("<H", version), 48))
    action = session.receive(control(10, size=48))
    assert isinstance(action, Answer)
    assert action.payload[12:36] == struct.pack("<IHHIIQ", 0, 0, 0, 0, 4096, 0)
    action = session.receive(control(13, struct.pack("<H", 1), 48))
    assert isinstance(action, Answer)
    assert header(action.payload)[2] == NtStatus.INVALID_PARAMETER


packets = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda op, rest: struct.pack("<I", op) + rest, st.integers(0, 15), st.binary(max_size=70)
    ),
    st.builds(
        lambda op, rest: struct.pack("<I", op) + rest,
        st.sampled_from([3, 7, 8, 9, 10]),
        st.one_of(st.binary(min_size=44, max_size=44), st.binary(min_size=60, max_size=60)),
    ),
    st.sampled_from([control(7), control(9, b"\x02\x06"), control(10), control(8)]),
    st.sampled_from([control(9, b"\x00\x02", 48), srb_packet(bytes(6)), srb_packet(bytes(6), 48)]),
)


@given(st.lists(packets, max_size=12))
def test_any_packets_in_any_order(sequence: list[bytes]) -> None:
    session = Session(max_transfer_bytes=4096, max_sub_channels=1)
    for packet in sequence:
        action = session.receive(packet)
        if isinstance(action, Execute):
            assert session.state is State.READY
            action = Answer(action.srb.answer(srb_status=4, scsi_status=2, sense=bytes(18)))
        assert len(action.payload) in (48, 64)
        assert header(action.payload)[0] == Operation.COMPLETE_IO
