# SPDX-License-Identifier: GPL-2.0-or-later
"""INQUIRY, VPD pages, mode pages, capacity, LUNs, operation codes: what the disk says of itself."""

from __future__ import annotations

import struct

import pytest

from tests.support.scsi_unit import (
    INVALID_FIELD,
    INVALID_OPCODE,
    INVALID_PARAMETER,
    LIST_LENGTH,
    code,
    make_unit,
    run,
)
from vhostvmbus.devices.scsi import sense
from vhostvmbus.devices.scsi.commands.table import COMMANDS


def test_standard_inquiry() -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, "12 00 00 00 ff 00", 255)
    assert outcome.transferred == 74
    assert data[:8] == bytes.fromhex("00 00 06 12 45 00 00 02")
    assert data[8:36] == b"VHVMBUS " + b"Virtual Disk    " + b"1.0 "
    assert data[58:64] == bytes.fromhex("00a0 0460 04c0")
    assert run(unit, "12 00 00 00 24 00", 255)[0].transferred == 36
    assert run(unit, "12 00 00 00 ff 00", 10)[0].transferred == 10, "cut to the data buffer"
    assert code(run(unit, "12 00 80 00 ff 00", 255)[0]) == INVALID_FIELD


def test_vpd_list_and_serial() -> None:
    unit, _ = make_unit()
    assert run(unit, "12 01 00 00 ff 00", 255)[1][:10] == bytes.fromhex(
        "00 00 0006 00 80 83 b0 b1 b2"
    )
    assert run(unit, "12 01 80 00 ff 00", 255)[1][:12] == b"\x00\x80\x00\x08TEST0001"
    outcome, _ = run(unit, "12 01 89 00 ff 00", 255)
    assert code(outcome) == INVALID_FIELD
    assert outcome.sense is not None
    assert outcome.sense.fixed()[15:18] == b"\xc0\x00\x02", "the field pointer names byte 2"


def test_vpd_device_identification() -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, "12 01 83 00 ff 00", 255)
    size = struct.unpack_from(">H", data, 2)[0]
    assert outcome.transferred == size + 4
    assert data[4:16] == bytes.fromhex("01 03 00 08 3123456789abcdef")
    assert data[16:20] == bytes.fromhex("02 01 00 10")
    assert data[20:36] == b"VHVMBUS TEST0001"


def test_vpd_block_limits_and_provisioning() -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, "12 01 b0 00 ff 00", 255)
    assert outcome.transferred == 64
    assert struct.unpack_from(">H", data, 2)[0] == 60
    assert data[4] == 1, "WSNZ"
    assert struct.unpack_from(">HI", data, 6) == (8, 4096)
    assert struct.unpack_from(">IIII", data, 20) == (1 << 21, 256, 8, 0x80000000)
    assert struct.unpack_from(">Q", data, 36)[0] == 1 << 21
    outcome, data = run(unit, "12 01 b1 00 ff 00", 255)
    assert outcome.transferred == 64
    assert data[4:6] == b"\x00\x01"
    outcome, data = run(unit, "12 01 b2 00 ff 00", 255)
    assert data[:8] == bytes.fromhex("00 b2 0004 00 e4 02 00")
    frozen, _ = make_unit(can_discard=False)
    assert run(frozen, "12 01 b2 00 ff 00", 255)[1][4:8] == bytes(4)
    assert run(frozen, "12 01 b0 00 ff 00", 255)[1][20:36] == bytes(16)


def test_read_capacity() -> None:
    unit, _ = make_unit(blocks=300)
    assert run(unit, "25" + "00" * 9, 8)[1] == struct.pack(">II", 299, 512)
    assert code(run(unit, "25 00 00000001" + "00" * 4, 8)[0]) == INVALID_FIELD
    outcome, data = run(unit, "9e10" + "00" * 8 + "00000020" + "0000", 64)
    assert outcome.transferred == 32
    assert data[:15] == struct.pack(">QIBBB", 299, 512, 0, 3, 0xC0)
    frozen, _ = make_unit(can_discard=False)
    assert run(frozen, "9e10" + "00" * 8 + "00000020" + "0000", 64)[1][14] == 0


def test_read_capacity_10_of_a_disk_too_large_for_it() -> None:
    unit, disk = make_unit()

    class Huge(type(disk)):  # type: ignore[misc]
        size = (1 << 33) * 512

    unit.backing = Huge(bytearray(512))
    assert run(unit, "25" + "00" * 9, 8)[1][:4] == b"\xff\xff\xff\xff"
    data = run(unit, "9e10" + "00" * 8 + "00000020" + "0000", 64)[1]
    assert struct.unpack_from(">Q", data)[0] == (1 << 33) - 1
    assert run(unit, "1a 00 08 00 ff 00", 255)[1][4:8] == b"\xff\xff\xff\xff"


def test_report_luns() -> None:
    unit, _ = make_unit()
    cdb = "a0 00 00 000000 00001000 0000"
    outcome, data = run(unit, cdb, 4096, luns=(0, 1, 200))
    assert outcome.transferred == 32
    assert data[:32] == bytes.fromhex("00000018 00000000" + "00" * 8) + bytes.fromhex(
        "0001000000000000 00c8000000000000"
    )
    assert run(None, cdb, 4096, luns=(7,))[1][:4] == b"\0\0\0\x08", "any LUN may be asked"
    assert run(unit, "a0 00 01 000000 00001000 0000", 4096)[1][:4] == bytes(4)
    assert code(run(unit, "a0 00 03 000000 00001000 0000", 4096)[0]) == INVALID_FIELD


def test_nothing_there() -> None:
    outcome, data = run(None, "12 00 00 00 24 00", 36)
    assert outcome.transferred == 36
    assert data[0] == 0x7F
    assert not outcome.no_unit
    for cdb in ("00" * 6, "28" + "00" * 9, "ff" * 10, "9e10" + "00" * 14, "1a0008000400"):
        assert run(None, cdb, 64)[0].no_unit
    assert run(None, "03 00 00 00 12 00", 18)[1][12] == 0x25
    assert code(run(None, "12 01 83 00 ff 00", 255)[0]) == INVALID_FIELD


def test_mode_sense_6() -> None:
    unit, disk = make_unit(blocks=300)
    outcome, data = run(unit, "1a 00 3f 00 ff 00", 255)
    assert outcome.transferred == 4 + 8 + 20 + 12 + 12
    assert data[:12] == bytes((55, 0, 0x10, 8)) + struct.pack(">II", 300, 512)
    assert data[12:32] == bytes((0x08, 0x12, 0x04)) + bytes(17)
    assert data[32:36] == bytes((0x0A, 0x0A, 0, 0x10))
    assert data[44:47] == bytes((0x1C, 0x0A, 0x08))
    disk.read_only = True
    assert run(unit, "1a 08 08 00 ff 00", 255)[1][:6] == bytes((23, 0, 0x90, 0, 0x08, 0x12))


@pytest.mark.parametrize(("control", "byte2"), [(0, 4), (1, 4), (2, 4)])
def test_mode_sense_page_control(control: int, byte2: int) -> None:
    unit, _ = make_unit()
    data = run(unit, bytes((0x1A, 8, control << 6 | 8, 0, 255, 0)), 255)[1]
    assert data[6] == byte2
    changeable = run(unit, bytes((0x1A, 8, 1 << 6 | 0x3F, 0, 255, 0)), 255)[1]
    assert sum(changeable[4:24]) == 0x08 + 0x12 + 0x04
    assert sum(changeable[24:36]) == 0x0A + 0x0A


def test_mode_sense_refusals() -> None:
    unit, _ = make_unit()
    assert code(run(unit, "1a 00 c8 00 ff 00", 255)[0]) == (5, 0x39, 0)
    assert code(run(unit, "1a 00 02 00 ff 00", 255)[0]) == INVALID_FIELD
    assert code(run(unit, "1a 00 08 01 ff 00", 255)[0]) == INVALID_FIELD
    assert run(unit, "1a 00 3f ff ff 00", 255)[0].transferred == 56


def test_mode_sense_10_with_long_descriptor() -> None:
    unit, _ = make_unit(blocks=300)
    outcome, data = run(unit, "5a 10 08 00000000 00ff 00", 255)
    assert outcome.transferred == 8 + 16 + 20
    assert data[:8] == struct.pack(">HBBBxH", 42, 0, 0x10, 1, 16)
    assert data[8:24] == struct.pack(">Q4xI", 300, 512)
    data = run(unit, "5a 18 08 00000000 00ff 00", 255)[1]
    assert data[:8] == struct.pack(">HBBBxH", 26, 0, 0x10, 0, 0)


CACHE_OFF = bytes((0, 0, 0, 0)) + bytes((0x08, 0x12)) + bytes(18)


def test_mode_select_write_cache() -> None:
    unit, disk = make_unit()
    outcome, _ = run(unit, bytes((0x15, 0x10, 0, 0, 24, 0)), CACHE_OFF)
    assert outcome.transferred == 24
    assert not unit.write_cache
    assert disk.calls == [("flush", 0, 0)]
    assert run(unit, "1a 08 08 00 ff 00", 255)[1][6] == 0
    on = bytes(8) + bytes((0x08, 0x12, 4)) + bytes(17)
    assert run(unit, bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, 28, 0)), on)[0].status == 0
    assert unit.write_cache
    unit.write_cache = False
    unit.reset(None)
    assert unit.write_cache


@pytest.mark.parametrize(
    ("cdb", "data", "expected"),
    [
        ("15 00 0000 18 00", CACHE_OFF, INVALID_FIELD),
        ("15 11 0000 18 00", CACHE_OFF, INVALID_FIELD),
        ("15 10 0000 02 00", CACHE_OFF, LIST_LENGTH),
        ("15 10 0000 17 00", CACHE_OFF, LIST_LENGTH),
        ("15 10 0000 30 00", CACHE_OFF, LIST_LENGTH),
        ("15 10 0000 18 00", CACHE_OFF[:6] + b"\x01" + bytes(17), INVALID_PARAMETER),
        ("15 10 0000 18 00", CACHE_OFF[:5] + b"\x11" + bytes(18), INVALID_PARAMETER),
        ("15 10 0000 18 00", bytes(4) + b"\x02\x12" + bytes(18), INVALID_PARAMETER),
        ("15 10 0000 18 00", bytes(4) + b"\x48\x12" + bytes(18), INVALID_PARAMETER),
        ("15 10 0000 0c 00", bytes((0, 0, 0, 8)) + struct.pack(">II", 0, 4096), INVALID_PARAMETER),
        ("15 10 0000 0c 00", bytes((0, 0, 0, 7)) + bytes(8), INVALID_PARAMETER),
        ("15 10 0000 08 00", bytes((0, 0, 0, 8)) + bytes(4), LIST_LENGTH),
    ],
)
def test_mode_select_refusals(cdb: str, data: bytes, expected: tuple[int, int, int]) -> None:
    unit, _ = make_unit()
    assert code(run(unit, cdb, data)[0]) == expected
    assert unit.write_cache


def test_mode_select_accepts_the_format_it_has() -> None:
    unit, _ = make_unit(blocks=300)
    for blocks, size in ((300, 512), (0, 0), (0xFFFFFFFF, 512)):
        data = bytes((0, 0, 0, 8)) + struct.pack(">II", blocks, size)
        assert run(unit, "15 10 0000 0c 00", data)[0].status == 0
    assert run(unit, "15 10 0000 00 00")[0].status == 0


def test_request_sense_and_unit_attention() -> None:
    unit, _ = make_unit()
    assert run(unit, "03 00 0000 12 00", 18)[1][:14] == b"\x70" + bytes(6) + b"\x0a" + bytes(6)
    unit.raise_attention(sense.CAPACITY_CHANGED)
    unit.raise_attention(sense.CAPACITY_CHANGED)
    assert run(unit, "12 00 00 00 24 00", 36)[0].status == 0, "INQUIRY does not report it"
    assert code(run(unit, "00" * 6)[0]) == (6, 0x2A, 9)
    assert run(unit, "00" * 6)[0].status == 0, "reported once"
    unit.raise_attention(sense.BUS_RESET)
    data = run(unit, "03 01 0000 ff 00", 255)[1]
    assert data[:4] == bytes((0x72, 6, 0x29, 2))
    assert run(unit, "00" * 6)[0].status == 0


def test_start_stop() -> None:
    unit, disk = make_unit()
    assert run(unit, "1b 00 00 00 00 00")[0].status == 0
    assert disk.calls == [("flush", 0, 0)], "stopping flushes"
    assert run(unit, "28 00 00000000 00 0001 00", 512)[0].status == 0, "and no more than that"
    assert run(unit, "00" * 6)[0].status == 0
    disk.calls.clear()
    for cdb in ("1b 00 00 00 01 00", "1b 00 00 00 04 00"):
        assert run(unit, cdb)[0].status == 0
    assert disk.calls == []
    assert run(unit, "1b 00 00 00 10 00")[0].status == 0
    assert code(run(unit, "1b 00 00 00 70 00")[0]) == INVALID_FIELD
    assert code(run(unit, "1b 00 00 00 02 00")[0]) == INVALID_FIELD
    assert run(unit, "1e 00 00 00 01 00")[0].status == 0


@pytest.mark.parametrize(
    "opcode", [0x5E, 0x5F, 0x16, 0x17, 0x4D, 0x4C, 0x85, 0xA1, 0x04, 0x89, 0x34, 0x3B, 0x7F, 0xFF]
)
def test_what_is_not_supported(opcode: int) -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, bytes((opcode,)) + bytes(15), bytes(64))
    assert code(outcome) == INVALID_OPCODE
    assert data == bytes(64)


def test_unknown_service_action_short_cdb_and_naca() -> None:
    unit, _ = make_unit()
    assert code(run(unit, "9e 11" + "00" * 14, 64)[0]) == INVALID_FIELD
    assert code(run(unit, "a3 0b" + "00" * 10, 64)[0]) == INVALID_FIELD
    assert code(run(unit, "28 00 00000000 00 0001 00", 512, cdb_length=6)[0]) == INVALID_FIELD
    assert code(run(unit, "28 00 00000000 00 0001 04", 512)[0]) == INVALID_FIELD


def test_report_all_opcodes() -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, "a3 0c 00 00 0000 00002000 0000", 8192)
    size = struct.unpack_from(">I", data)[0]
    assert outcome.transferred == size + 4 == 4 + 8 * len(COMMANDS)
    found = {struct.unpack_from(">BxHxBH", data, 4 + 8 * i) for i in range(len(COMMANDS))}
    assert (0x28, 0, 0, 10) in found
    assert (0x9E, 0x10, 1, 16) in found
    assert (0x42, 0, 0, 10) in found
    outcome, data = run(unit, "a3 0c 80 00 0000 00002000 0000", 8192)
    assert outcome.transferred == 4 + 20 * len(COMMANDS)
    assert data[4 + 8 : 4 + 10] == b"\x00\x0a"


def test_report_one_opcode() -> None:
    unit, _ = make_unit()
    data = run(unit, "a3 0c 01 2a 0000 00002000 0000", 8192)[1]
    assert data[:14] == bytes.fromhex("00 03 000a 2a fa ffffffff 00 ffff 00")
    assert run(unit, "a3 0c 01 5e 0000 00002000 0000", 8192)[1][:2] == b"\x00\x01"
    assert code(run(unit, "a3 0c 01 9e 0000 00002000 0000", 8192)[0]) == INVALID_FIELD
    data = run(unit, "a3 0c 02 9e 0010 00002000 0000", 8192)[1]
    assert data[:6] == bytes.fromhex("00 03 0010 9e 10")
    assert run(unit, "a3 0c 02 9e 0011 00002000 0000", 8192)[1][1] == 1
    assert code(run(unit, "a3 0c 02 28 0000 00002000 0000", 8192)[0]) == INVALID_FIELD
    for opcode, action, supported in ((0x28, 0, 3), (0x9E, 0x10, 3), (0x9E, 0, 1), (0x28, 1, 1)):
        cdb = bytes((0xA3, 0x0C, 3, opcode)) + struct.pack(">HI2x", action, 8192)
        assert run(unit, cdb, 8192)[1][1] == supported
    assert code(run(unit, "a3 0c 04 28 0000 00002000 0000", 8192)[0]) == INVALID_FIELD


def test_table_is_consistent() -> None:
    for command in COMMANDS:
        group = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[command.opcode >> 5]
        assert command.length == group, command.name
        if command.service_action is not None:
            assert command.usage[1] & 0x1F & command.service_action == command.service_action
