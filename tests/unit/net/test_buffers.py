# SPDX-License-Identifier: GPL-2.0-or-later
"""The buffers that a guest lends: sections, who has them, and what lies in which page."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.ram import Ram, scattered
from vhostvmbus.devices.net.buffers import (
    CONTROL_RESERVE,
    FRAME_OFFSET,
    MIN_SECTIONS,
    ReceiveBuffer,
    Section,
    SendBuffer,
    section_size,
)
from vhostvmbus.devices.net.errors import SectionError
from vhostvmbus.wire.errors import ExternalDataClosed
from vhostvmbus.wire.gpa import GpaRange

PAGES = 64


class Lent:
    def __init__(self) -> None:
        self.ram = Ram()
        self.memory = self.ram.memory()
        self.pfns = scattered(PAGES)
        self.mapping = self.memory.external_data([GpaRange.of_pages(self.pfns)])

    def content(self) -> bytes:
        return b"".join(self.ram.peek(pfn * 4096, 4096) for pfn in self.pfns)


@pytest.fixture
def lent() -> Iterator[Lent]:
    lent = Lent()
    yield lent
    lent.mapping.close()
    lent.memory.close()
    lent.ram.close()


@pytest.mark.parametrize("size", [1728, 4096, 9152])
def test_every_section_is_where_it_should_be(lent: Lent, size: int) -> None:
    buffer = ReceiveBuffer(lent.mapping, 0xCAFE, size)
    count = PAGES * 4096 // size
    sections = all_of(buffer)
    assert sorted(section.number for section in sections) == list(range(count))
    expected = bytearray(PAGES * 4096)
    chance = random.Random(size)
    for section in sections:
        assert section.offset == section.number * size
        data = chance.randbytes(chance.choice((1, 60, 112, 600, size)))
        section.write(data)
        expected[section.offset : section.offset + len(data)] = data
        assert sum(length for _, length in section.spans) == size
        joined = b"".join(lent.ram.peek(gpa, length) for gpa, length in section.spans)
        assert joined == expected[section.offset : section.offset + size]
        ends = [gpa + length for gpa, length in section.spans]
        assert all(end != gpa for end, (gpa, _) in zip(ends, section.spans[1:], strict=False))
    assert lent.content() == bytes(expected)
    with pytest.raises(ValueError, match="1 bytes do not fit"):
        sections[-1].write(bytes(size + 1))


def all_of(buffer: ReceiveBuffer) -> list[Section]:
    """Every section that is free."""
    return list(iter(buffer.take, None))


def test_who_has_a_section(lent: Lent) -> None:
    buffer = ReceiveBuffer(lent.mapping, 1, 8192)
    assert (buffer.count, buffer.free) == (32, 32)
    taken = all_of(buffer)
    assert len(taken) == 32
    assert buffer.free == 0
    buffer.give(taken[:20])
    assert buffer.free == 20
    again = all_of(buffer)
    assert {section.number for section in again} == {section.number for section in taken[:20]}


class Frames:
    """A data path with some sections."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.leases: list[int] = []

    @property
    def free_sections(self) -> int:
        return len(self.numbers)

    def section(self, lease: int) -> int | None:
        self.leases.append(lease)
        return self.numbers.pop() if self.numbers else None

    def give(self, lease: int, section: int) -> None:
        self.leases.append(lease)
        self.numbers.append(section)


def test_answers_have_sections_of_their_own_and_then_the_frames(lent: Lent) -> None:
    path = Frames(20, 30)
    buffer = ReceiveBuffer(lent.mapping, 1, 8192, path)
    buffer.lease = 77
    assert buffer.reserve == CONTROL_RESERVE
    assert buffer.free == CONTROL_RESERVE + 2
    taken = all_of(buffer)
    assert [section.number for section in taken] == [*range(CONTROL_RESERVE), 30, 20]
    buffer.give(taken)
    assert path.numbers == [30, 20]
    assert set(path.leases) == {77}
    assert buffer.free == CONTROL_RESERVE + 2
    small = ReceiveBuffer(lent.mapping, 1, PAGES * 4096 // MIN_SECTIONS, path)
    assert (small.count, small.reserve) == (MIN_SECTIONS, 2)  # six are left: the longest frame


def test_buffers_that_make_no_sections(lent: Lent) -> None:
    for size in (PAGES * 4096 // MIN_SECTIONS + 1, PAGES * 4096 + 1):
        with pytest.raises(SectionError, match="gpadl_length"):
            ReceiveBuffer(lent.mapping, 1, size)
    with pytest.raises(SectionError, match="gpadl_length"):
        SendBuffer(lent.mapping, PAGES * 4096 + 1)


def test_the_send_buffer(lent: Lent) -> None:
    data = random.Random(3).randbytes(PAGES * 4096)
    lent.mapping.write(data)
    buffer = SendBuffer(lent.mapping)
    assert buffer.count == PAGES * 4096 // 6144
    for number in (0, 1, buffer.count - 1):
        start = number * 6144
        assert buffer.read(number, 6144) == data[start : start + 6144]
        assert buffer.read(number, 1) == data[start : start + 1]
        assert buffer.read(number, 10240) == data[start : start + 10240]  # on into the next ones
    assert buffer.read(1, 1 << 17) == data[6144 : 6144 + (1 << 17)]
    for number, size, field in (
        (buffer.count, 1, "send_buf_section_index"),
        (0xFFFFFFFE, 1, "send_buf_section_index"),
        (0, (1 << 17) + 1, "send_buf_section_size"),
        (buffer.count - 1, 10241, "send_buf_section_size"),
        (0, 0xFFFFFFFF, "send_buf_section_size"),
    ):
        with pytest.raises(SectionError) as caught:
            buffer.read(number, size)
        assert caught.value.field == field
    lent.mapping.close()
    with pytest.raises(ExternalDataClosed):
        buffer.read(0, 1)


def test_a_section_holds_the_frame() -> None:
    assert section_size(1518, False) == 1728
    assert section_size(1518, True) == 13312
    assert 5 * (13312 - FRAME_OFFSET - 36) >= 65535 + 14 + 4
    assert (31 << 20) // 13312 >= 2427  # ethtool -G eth0 rx 2427
    for frame_size in range(100, 70000, 777):
        for coalescing in (False, True):
            size = section_size(frame_size, coalescing)
            assert size - FRAME_OFFSET - 36 >= frame_size
            assert size % 64 == 0
