# SPDX-License-Identifier: GPL-2.0-or-later
"""READ, WRITE, VERIFY, flush, UNMAP, WRITE SAME; errors of the host; any CDB at all."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scsi_unit import (
    INVALID_FIELD,
    INVALID_OPCODE,
    INVALID_PARAMETER,
    LIST_LENGTH,
    OUT_OF_RANGE,
    WRITE_PROTECTED,
    code,
    make_unit,
    pattern,
    run,
)
from tests.support.soak import examples
from vhostvmbus.devices.scsi.commands import is_slow
from vhostvmbus.devices.scsi.commands.table import COMMANDS


def cdb6(opcode: int, lba: int, blocks: int) -> bytes:
    return bytes((opcode,)) + lba.to_bytes(3, "big") + bytes((blocks & 0xFF, 0))


def cdb10(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", opcode, flags, lba, blocks)


def cdb12(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIIxx", opcode, flags, lba, blocks)


def cdb16(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIxx", opcode, flags, lba, blocks)


READS = [(cdb6, 0x08), (cdb10, 0x28), (cdb12, 0xA8), (cdb16, 0x88)]
WRITES = [(cdb6, 0x0A), (cdb10, 0x2A), (cdb12, 0xAA), (cdb16, 0x8A)]
CHECKED = [(cdb10, 0x2E), (cdb12, 0xAE), (cdb16, 0x8E)]
VERIFIES = [(cdb10, 0x2F), (cdb12, 0xAF), (cdb16, 0x8F)]


@pytest.mark.parametrize(("cdb", "opcode"), READS)
def test_read(cdb, opcode) -> None:
    unit, disk = make_unit()
    outcome, data = run(unit, cdb(opcode, 10, 4), 4 * 512 + 100)
    assert (outcome.status, outcome.transferred) == (0, 2048)
    assert data == bytes(disk.content[5120:7168]) + bytes(100)
    assert code(run(unit, cdb(opcode, 255, 2), 1024)[0]) == OUT_OF_RANGE
    assert code(run(unit, cdb(opcode, 256, 1), 1024)[0]) == OUT_OF_RANGE
    outcome, data = run(unit, cdb(opcode, 0, 3), 1535)
    assert code(outcome) == INVALID_FIELD, "a short buffer is refused"
    assert data == bytes(1535), "nothing was moved"


@pytest.mark.parametrize(("cdb", "opcode"), WRITES + CHECKED)
def test_write(cdb, opcode) -> None:
    unit, disk = make_unit()
    before, new = bytes(disk.content), pattern(2048, 9)
    outcome, _ = run(unit, cdb(opcode, 10, 4), new + b"more")
    assert (outcome.status, outcome.transferred) == (0, 2048)
    assert bytes(disk.content) == before[:5120] + new + before[7168:]
    for lba, blocks in ((255, 2), (256, 1)):
        assert code(run(unit, cdb(opcode, lba, blocks), new)[0]) == OUT_OF_RANGE
    assert code(run(unit, cdb(opcode, 0, 5), new)[0]) == INVALID_FIELD
    assert bytes(disk.content) == before[:5120] + new + before[7168:]
    disk.read_only = True
    assert code(run(unit, cdb(opcode, 0, 1), new)[0]) == WRITE_PROTECTED


def test_six_byte_length_zero_is_256_blocks() -> None:
    unit, disk = make_unit()
    outcome, data = run(unit, cdb6(0x08, 0, 0), 256 * 512)
    assert outcome.transferred == 256 * 512
    assert data == bytes(disk.content)


def test_zero_blocks_move_nothing_but_are_checked() -> None:
    unit, disk = make_unit()
    for cdb, opcode in (READS + WRITES)[1:4] + WRITES[1:] + CHECKED + VERIFIES:
        outcome, _ = run(unit, cdb(opcode, 5, 0))
        assert (outcome.status, outcome.transferred) == (0, 0)
        assert run(unit, cdb(opcode, 256, 0))[0].status == 0, "there is nothing at the end either"
        assert code(run(unit, cdb(opcode, 257, 0))[0]) == OUT_OF_RANGE
    for lba in (0, 255, 256):
        parameters = struct.pack(">HH4xQI4x", 22, 16, lba, 0)
        assert run(unit, "42 00 00000000 00 0018 00", parameters)[0].status == 0
    parameters = struct.pack(">HH4xQI4x", 22, 16, 257, 0)
    assert code(run(unit, "42 00 00000000 00 0018 00", parameters)[0]) == OUT_OF_RANGE
    assert disk.calls == []
    for lba in (0, 256):  # "to the end"
        assert run(unit, cdb10(0x35, lba, 0))[0].status == 0
        assert run(unit, cdb16(0x91, lba, 0))[0].status == 0
    assert code(run(unit, cdb10(0x35, 257, 0))[0]) == OUT_OF_RANGE
    for lba in (0, 256):  # not "to the end": page B0h says so
        assert code(run(unit, cdb10(0x41, lba, 0), bytes(512))[0]) == INVALID_FIELD
        assert code(run(unit, cdb16(0x93, lba, 0), bytes(512))[0]) == INVALID_FIELD


def test_out_of_range_tells_where() -> None:
    unit, _ = make_unit()
    outcome, _ = run(unit, cdb10(0x28, 250, 100), 512 * 100)
    assert outcome.sense is not None
    assert outcome.sense.fixed()[:7] == b"\xf0\x00\x05\x00\x00\x01\x00"
    outcome, _ = run(unit, cdb16(0x88, 1 << 63, 1), 512)
    assert outcome.sense is not None
    assert outcome.sense.fixed()[0] == 0x70, "an LBA of 64 bits does not fit: not valid"
    assert outcome.sense.descriptor()[12:20] == struct.pack(">Q", 1 << 63)


def test_limits_and_protection() -> None:
    unit, _ = make_unit(blocks=8192)
    assert code(run(unit, cdb10(0x28, 0, 4097), 4097 * 512)[0]) == INVALID_FIELD
    assert run(unit, cdb10(0x28, 0, 4096), 4096 * 512)[0].transferred == 1 << 21
    for opcode in (0x28, 0x2A, 0x2E, 0x2F, 0x41):
        assert code(run(unit, cdb10(opcode, 0, 1, 0x20), 512)[0]) == INVALID_FIELD


def test_force_unit_access_and_write_through() -> None:
    unit, disk = make_unit()
    run(unit, cdb10(0x2A, 0, 1, 0x08), bytes(512))
    assert disk.calls == [("write", 0, 512), ("flush", 0, 0)]
    assert is_slow(unit, cdb10(0x2A, 0, 1, 0x08).ljust(16, b"\0"))
    assert not is_slow(unit, cdb10(0x2A, 0, 1).ljust(16, b"\0"))
    disk.calls.clear()
    unit.write_cache = False
    run(unit, cdb6(0x0A, 0, 1), bytes(512))
    assert disk.calls == [("write", 0, 512), ("flush", 0, 0)]
    assert is_slow(unit, cdb6(0x0A, 0x080000, 1).ljust(16, b"\0"))
    unit.write_cache = True
    assert not is_slow(unit, cdb6(0x0A, 0x080000, 1).ljust(16, b"\0")), "bit 3 is the LBA's"


@pytest.mark.parametrize(("cdb", "opcode"), VERIFIES)
def test_verify(cdb, opcode) -> None:
    unit, disk = make_unit()
    same = bytes(disk.content[512:2048])
    assert run(unit, cdb(opcode, 1, 3))[0].status == 0
    assert disk.calls == [("read", 512, 1536)], "the medium is read"
    outcome, _ = run(unit, cdb(opcode, 1, 3, 0x02), same)
    assert (outcome.status, outcome.transferred) == (0, 1536)
    wrong = same[:700] + bytes((same[700] ^ 1,)) + same[701:]
    outcome, _ = run(unit, cdb(opcode, 1, 3, 0x02), wrong)
    assert code(outcome) == (0xE, 0x1D, 0)
    assert outcome.sense is not None
    assert outcome.sense.information == 700
    assert code(run(unit, cdb(opcode, 1, 3, 0x02), same[:-1])[0]) == INVALID_FIELD
    assert code(run(unit, cdb(opcode, 1, 3, 0x04), same)[0]) == INVALID_FIELD
    disk.content[512:2048] = b"x" * 1536
    outcome, _ = run(unit, cdb(opcode, 1, 3, 0x06), b"x" * 512)
    assert (outcome.status, outcome.transferred) == (0, 512)
    disk.content[1600] = 0
    assert code(run(unit, cdb(opcode, 1, 3, 0x06), b"x" * 512)[0]) == (0xE, 0x1D, 0)
    assert code(run(unit, cdb(opcode, 255, 2))[0]) == OUT_OF_RANGE


@pytest.mark.parametrize(("cdb", "opcode"), CHECKED)
@pytest.mark.parametrize("flags", [0, 2])
def test_write_and_verify_writes_flushes_and_reads_back(cdb, opcode, flags) -> None:
    unit, disk = make_unit()
    new = pattern(1024, 3)
    assert run(unit, cdb(opcode, 7, 2, flags), new)[0].status == 0
    assert [call[0] for call in disk.calls] == ["write", "flush", "read"]
    assert disk.content[7 * 512 : 9 * 512] == new
    assert code(run(unit, cdb(opcode, 7, 2, 0x06), new)[0]) == INVALID_FIELD


def test_synchronize_cache() -> None:
    unit, disk = make_unit()
    for cdb in (cdb10(0x35, 0, 0), cdb16(0x91, 0, 0), cdb10(0x35, 255, 1)):
        disk.calls.clear()
        assert run(unit, cdb)[0].status == 0
        assert disk.calls == [("flush", 0, 0)]
    assert code(run(unit, cdb16(0x91, 255, 2))[0]) == OUT_OF_RANGE
    disk.read_only = True
    disk.calls.clear()
    assert run(unit, cdb10(0x35, 0, 0))[0].status == 0
    assert disk.calls == []


def unmap_list(*extents: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack(">QI4x", *each) for each in extents)
    return struct.pack(">HH4x", 6 + len(body), len(body)) + body


def unmap_cdb(length: int, flags: int = 0) -> bytes:
    return struct.pack(">BB5xHx", 0x42, flags, length)


def test_unmap() -> None:
    unit, disk = make_unit()
    parameters = unmap_list((8, 8), (100, 1), (7, 0))
    outcome, _ = run(unit, unmap_cdb(len(parameters)), parameters)
    assert (outcome.status, outcome.transferred) == (0, len(parameters))
    assert disk.calls == [("discard", 4096, 4096), ("discard", 51200, 512)]
    assert disk.content[4096:8192] == bytes(4096)


@pytest.mark.parametrize(
    ("length", "flags", "parameters", "expected"),
    [
        (24, 1, unmap_list((0, 1)), INVALID_FIELD),
        (7, 0, unmap_list((0, 1)), LIST_LENGTH),
        (25, 0, unmap_list((0, 1)), LIST_LENGTH),
        (24, 0, unmap_list((255, 2)), OUT_OF_RANGE),
        (40, 0, unmap_list((0, 1), (1 << 60, 1)), OUT_OF_RANGE),
        (40, 0, unmap_list((0, 1 << 21), (0, 1)), INVALID_PARAMETER),
        (8 + 16 * 257, 0, unmap_list(*[(0, 0)] * 257), INVALID_PARAMETER),
    ],
)
def test_unmap_refusals_change_nothing(length, flags, parameters, expected) -> None:
    unit, disk = make_unit()
    assert code(run(unit, unmap_cdb(length, flags), parameters)[0]) == expected
    assert disk.calls == []


def test_unmap_partial_lists_and_disks_that_cannot() -> None:
    unit, disk = make_unit()
    assert run(unit, unmap_cdb(0))[0].status == 0
    assert run(unit, unmap_cdb(8), unmap_list((0, 1)))[0].status == 0
    assert run(unit, unmap_cdb(23), unmap_list((0, 1)))[0].status == 0, "incomplete: ignored"
    assert disk.calls == []
    disk.read_only = True
    assert code(run(unit, unmap_cdb(24), unmap_list((0, 1)))[0]) == WRITE_PROTECTED
    frozen, _ = make_unit(can_discard=False)
    assert code(run(frozen, unmap_cdb(24), unmap_list((0, 1)))[0]) == INVALID_OPCODE


def test_write_same() -> None:
    unit, disk = make_unit()
    block = pattern(512, 5)
    outcome, _ = run(unit, cdb10(0x41, 10, 20), block)
    assert (outcome.status, outcome.transferred) == (0, 512)
    assert disk.content[5120:15360] == block * 20
    assert run(unit, cdb16(0x93, 10, 2, 0x08), block)[0].status == 0
    assert disk.calls[-1][0] == "write", "UNMAP with a block that is not zero writes"
    assert run(unit, cdb16(0x93, 10, 2, 0x08), bytes(512))[0].status == 0
    assert disk.calls[-1] == ("unmap zeroes", 5120, 1024)
    assert run(unit, cdb10(0x41, 10, 2), bytes(512))[0].status == 0
    assert disk.calls[-1] == ("zeroes", 5120, 1024)
    outcome, _ = run(unit, cdb16(0x93, 12, 2, 0x09))
    assert (outcome.status, outcome.transferred) == (0, 0)
    assert disk.calls[-1] == ("unmap zeroes", 6144, 1024)
    assert run(unit, cdb16(0x93, 12, 2, 0x01))[0].status == 0
    assert disk.calls[-1] == ("zeroes", 6144, 1024)
    unit.write_cache = False
    assert run(unit, cdb10(0x41, 10, 2), block)[0].status == 0
    assert disk.calls[-1][0] == "flush"


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [
        (cdb10(0x41, 0, 1, 0x10), INVALID_FIELD),
        (cdb10(0x41, 0, 1, 0x18), INVALID_FIELD),
        (cdb10(0x41, 0, 1, 0x02), INVALID_FIELD),
        (cdb10(0x41, 0, 1, 0x04), INVALID_FIELD),
        (cdb10(0x41, 0, 1, 0x01), INVALID_FIELD),
        (cdb10(0x41, 0, 0), INVALID_FIELD),
        (cdb16(0x93, 0, 0, 0x08), INVALID_FIELD),
        (cdb16(0x93, 255, 2), OUT_OF_RANGE),
    ],
)
def test_write_same_refusals(cdb, expected) -> None:
    unit, disk = make_unit()
    assert code(run(unit, cdb, bytes(512))[0]) == expected
    assert disk.calls == []


def test_write_same_limits() -> None:
    unit, disk = make_unit()
    assert code(run(unit, cdb10(0x41, 0, 1), bytes(511))[0]) == INVALID_FIELD
    disk.read_only = True
    assert code(run(unit, cdb10(0x41, 0, 1), bytes(512))[0]) == WRITE_PROTECTED
    frozen, _ = make_unit(can_discard=False)
    assert code(run(frozen, cdb10(0x41, 0, 1, 8), bytes(512))[0]) == INVALID_FIELD
    assert run(frozen, cdb10(0x41, 0, 1), bytes(512))[0].status == 0
    large, _ = make_unit()

    class Large(type(large.backing)):  # type: ignore[misc]
        size = (1 << 22) * 512

    large.backing = Large(bytearray(512))
    assert code(run(large, cdb16(0x93, 0, (1 << 21) + 1), bytes(512))[0]) == INVALID_FIELD


@pytest.mark.parametrize(
    ("number", "reading", "writing"),
    [
        (errno.EIO, (3, 0x11, 0), (3, 0x0C, 0)),
        (errno.ENOSPC, (7, 0x27, 7), (7, 0x27, 7)),
        (errno.EDQUOT, (7, 0x27, 7), (7, 0x27, 7)),
        (errno.EFBIG, (3, 0x11, 0), (3, 0x0C, 0)),
        (errno.EROFS, (4, 0x44, 0), (7, 0x27, 0)),
        (errno.EBADF, (4, 0x44, 0), (4, 0x44, 0)),
    ],
)
def test_errors_of_the_host_file(number, reading, writing) -> None:
    unit, disk = make_unit()
    disk.error = number
    assert code(run(unit, cdb10(0x28, 0, 1), 512)[0]) == reading
    for cdb in (cdb10(0x2A, 0, 1), cdb10(0x35, 0, 0), cdb10(0x41, 0, 1), cdb10(0x2E, 0, 1)):
        assert code(run(unit, cdb, bytes(512))[0]) == writing


def test_get_lba_status() -> None:
    unit, _ = make_unit()
    outcome, data = run(unit, "9e12" + f"{5:016x}" + "00000018" + "0000", 24)
    assert outcome.transferred == 24
    assert data == struct.pack(">I4xQIB3x", 20, 5, 251, 0)
    assert code(run(unit, "9e12" + f"{256:016x}" + "00000018" + "0000", 24)[0]) == OUT_OF_RANGE


cdbs = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.builds(
        lambda command, rest: bytes((command.opcode,)) + rest,
        st.sampled_from(COMMANDS),
        st.binary(min_size=15, max_size=15),
    ),
    st.builds(
        lambda command, first, lba, blocks: {
            6: cdb6(command.opcode, lba, blocks),
            10: cdb10(command.opcode, lba, blocks, first),
            12: cdb12(command.opcode, lba, blocks, first),
            16: cdb16(command.opcode, lba, blocks, first),
        }[command.length],
        st.sampled_from(COMMANDS),
        st.sampled_from([0, 1, 2, 4, 6, 8, 9, 0x0C, 0x10, 0x12, 0x20]),
        st.integers(0, 300),
        st.integers(0, 300),
    ),
)


@settings(max_examples=examples(200))
@given(
    st.lists(cdbs, min_size=1, max_size=4), st.binary(max_size=600), st.integers(1, 16),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_cdb(sequence, data, cdb_length, read_only, present) -> None:
    unit, disk = make_unit(read_only=read_only)
    before = bytes(disk.content)
    for cdb in sequence:
        outcome, after = run(unit if present else None, cdb, data, cdb_length=cdb_length)
        assert outcome.transferred <= len(data)
        if outcome.status:
            assert outcome.sense is not None
            assert len(outcome.sense.fixed()) == 18
            assert outcome.sense.key
            assert outcome.transferred == 0
        assert len(after) == len(data)
    if read_only or not present:
        assert bytes(disk.content) == before
