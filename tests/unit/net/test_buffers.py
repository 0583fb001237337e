# SPDX-License-Identifier: GPL-2.0-or-later
"""The buffers that a guest lends: sections, who has them, and what lies in which page."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.core import Ram, scattered
from vhostvmbus.devices.net.buffers import (
    CONTROL_RESERVE,
    FRAME_OFFSET,
    MIN_SECTIONS,
    ReceiveBuffer,
    SendBuffer,
    gather,
    scatter,
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
    sections = buffer.take(count, reserve=0)
    assert sorted(section.number for section in sections) == list(range(count))
    expected = bytearray(PAGES * 4096)
    chance = random.Random(size)
    for section in sections:
        assert section.offset == section.number * size
        assert section.room == size - FRAME_OFFSET
        header = chance.randbytes(chance.choice((1, 60, FRAME_OFFSET, FRAME_OFFSET + 40)))
        section.write(header)
        expected[section.offset : section.offset + len(header)] = header
        at = chance.randrange(100, section.room - 200)
        data = chance.randbytes(chance.randrange(200))
        section.write_frame(at, data)
        start = section.offset + FRAME_OFFSET + at
        expected[start : start + len(data)] = data
        assert section.read_frame(at, len(data)) == data
        spans = [(gpa, length) for gpa, length in section.spans]
        assert sum(length for _, length in spans) == size
        joined = b"".join(lent.ram.peek(gpa, length) for gpa, length in spans)
        assert joined == expected[section.offset : section.offset + size]
    assert lent.content() == bytes(expected)
    last = sections[-1]
    with pytest.raises(ValueError, match="do not fit"):
        last.write_frame(last.room - 4, b"12345")


def test_who_has_a_section(lent: Lent) -> None:
    buffer = ReceiveBuffer(lent.mapping, 1, 8192)
    assert (buffer.count, buffer.free) == (32, 32)
    taken = buffer.take(20)
    assert len(taken) == 20
    assert buffer.take(5) == []
    assert buffer.free == 12
    assert len(buffer.take(32 - 20 - CONTROL_RESERVE)) == 4
    assert buffer.take(1) == []
    assert len(buffer.take(1, reserve=0)) == 1
    buffer.give(taken)
    assert buffer.free == 27
    again = buffer.take(19)
    assert len({section.number for section in again}) == 19


def test_the_smallest_buffer_holds_the_longest_frame(lent: Lent) -> None:
    buffer = ReceiveBuffer(lent.mapping, 1, PAGES * 4096 // MIN_SECTIONS)
    assert buffer.count == MIN_SECTIONS
    assert len(buffer.take(5)) == 5
    assert len(buffer.take(1)) == 1
    assert buffer.take(1) == []
    assert len(buffer.take(2, reserve=0)) == 2


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
    for number, size, field in (
        (buffer.count, 1, "send_buf_section_index"),
        (0xFFFFFFFE, 1, "send_buf_section_index"),
        (0, 6145, "send_buf_section_size"),
        (0, 0xFFFFFFFF, "send_buf_section_size"),
    ):
        with pytest.raises(SectionError) as caught:
            buffer.read(number, size)
        assert caught.value.field == field
    lent.mapping.close()
    with pytest.raises(ExternalDataClosed):
        buffer.read(0, 1)


@given(
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(0, 130),
    st.binary(max_size=130),
)
def test_scatter_and_gather(parts: list[bytes], position: int, data: bytes) -> None:
    whole = bytearray(b"".join(parts))
    views = [memoryview(bytearray(part)) for part in parts]
    assert gather(views, position, len(data)) == whole[position : position + len(data)]
    if position + len(data) > len(whole):
        if data:
            with pytest.raises(ValueError, match="do not fit"):
                scatter(views, position, data)
        return
    scatter(views, position, data)
    whole[position : position + len(data)] = data
    assert b"".join(views) == whole


def test_a_section_holds_the_frame() -> None:
    assert section_size(1518, False) == 1728
    assert section_size(1518, True) == 16384
    for frame_size in range(100, 70000, 777):
        for coalescing in (False, True):
            size = section_size(frame_size, coalescing)
            assert size - FRAME_OFFSET >= frame_size
            assert size % 64 == 0
