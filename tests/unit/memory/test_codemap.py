# SPDX-License-Identifier: GPL-2.0-or-later
"""The map of translated code, against a model of docs/vhost-user-vmbus.md."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostvmbus.memory import CodeMap, GuestMemory
from vhostvmbus.wire.errors import FrontEndError
from vhostvmbus.wire.regions import EVERY_PAGE

REGIONS = [(0, 64 * 4096, 5), (128 * 4096, 32 * 4096, 100), (256 * 4096, 8 * 4096, EVERY_PAGE)]
BYTES = 20


@pytest.fixture
def map_fd() -> Iterator[int]:
    fd = os.memfd_create("codemap", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


def hits_of(code_map: CodeMap, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns what has to be discarded when ``spans`` were written."""
    memory, hits = GuestMemory(), list[tuple[int, int]]()
    memory.written.use_code_map(code_map)
    memory.written.discard = hits.extend
    assert memory.written.report(spans) == len(hits)
    memory.written.use_code_map(None)
    return hits


def model(bits: bytes, page: int) -> bool:
    """Whether the page may be code, straight from the specification."""
    for gpa, size, first in REGIONS:
        if gpa <= page * 4096 < gpa + size:
            if first == EVERY_PAGE:
                return True
            bit = first + page - gpa // 4096
            return bool(bits[bit // 8] >> bit % 8 & 1)
    return True


@given(
    st.binary(min_size=BYTES, max_size=BYTES),
    st.lists(
        st.tuples(st.integers(0, 270 * 4096), st.integers(1, 5 * 4096)), min_size=1, max_size=6
    ),
)
@settings(deadline=None)
def test_hits_are_what_the_specification_says(bits: bytes, spans: list[tuple[int, int]]) -> None:
    fd = os.memfd_create("codemap", os.MFD_CLOEXEC)
    os.write(fd, bits)
    hits = hits_of(CodeMap(fd, BYTES, REGIONS), spans)
    os.close(fd)
    pages = {p for gpa, size in spans for p in range(gpa // 4096, (gpa + size - 1) // 4096 + 1)}
    expected = {page for page in pages if model(bits, page)}
    assert all(gpa % 4096 == 0 and size % 4096 == 0 for gpa, size in hits)
    found = {p for gpa, size in hits for p in range(gpa // 4096, (gpa + size) // 4096)}
    assert found == expected


def test_bits_are_read_anew_each_time(map_fd: int) -> None:
    code_map = CodeMap(map_fd, 8, [(0, 64 * 4096, 0)])
    span = [(3 * 4096 + 7, 2 * 4096)]
    assert hits_of(code_map, span) == []
    os.pwrite(map_fd, b"\x18", 0)
    assert hits_of(code_map, span) == [(3 * 4096, 2 * 4096)]
    os.pwrite(map_fd, b"\x00", 0)
    assert hits_of(code_map, span) == []


def test_alternate_pages_do_not_overflow_the_answer(map_fd: int) -> None:
    os.pwrite(map_fd, b"\x55" * 64, 0)
    hits = hits_of(CodeMap(map_fd, 64, [(0, 512 * 4096, 0)]), [(0, 512 * 4096)])
    assert hits == [(page * 4096, 4096) for page in range(0, 512, 2)]


def test_a_truncated_map_means_every_page(map_fd: int) -> None:
    code_map = CodeMap(map_fd, 4096, [(0, 1 << 27, 0)])
    assert hits_of(code_map, [(4096, 8192)]) == []
    os.ftruncate(map_fd, 0)
    assert hits_of(code_map, [(4096 + 8, 4096)]) == [(4096, 8192)]


@pytest.mark.parametrize(
    ("map_bytes", "regions"),
    [
        (4097, []),
        (8, [(0, 65 * 4096, 0)]),
        (8, [(0, 64 * 4096, 1)]),
        (8, [(1, 4096, 0)]),
        (8, [(0, 100, 0)]),
        (4096, [(0, 4096, 0)] * 101),
        (8, [((1 << 64) - 4096, 8192, 0)]),
    ],
)
def test_bad_maps_are_refused(
    map_fd: int, map_bytes: int, regions: list[tuple[int, int, int]]
) -> None:
    with pytest.raises(FrontEndError):
        CodeMap(map_fd, map_bytes, regions)
