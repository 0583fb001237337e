# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory: the map, its limits, external data."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ram import BASE, BASE_PFN, PAGES, Ram
from tests.support.soak import examples
from tests.support.waiting import open_fds
from vhostvmbus.engine import lib
from vhostvmbus.engine.faults import guest_error
from vhostvmbus.memory import CodeMap, ExternalData, GuestMemory
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange, pfn_count
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import MAX_REGIONS

MIB = 1 << 20


# -- the map -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "size", "offset", "what"),
    [
        (0, 0, 0, "empty"),
        (0, -4096, 0, "negative"),
        (1, 4096, 0, "address not on a page"),
        (0, 4097, 0, "size not whole pages"),
        (0, 4096, 8, "offset not on a page"),
        ((1 << 64) - 4096, 8192, 0, "wraps around"),
        (0, 4096, PAGES * 4096, "behind the file's end"),
        (0, (PAGES + 1) * 4096, 0, "longer than the file"),
        (0, 4096, 1 << 62, "offset beyond what a file has"),
        (-4096, 4096, 0, "negative address"),
    ],
)
def test_bad_regions_are_refused(ram: Ram, gpa: int, size: int, offset: int, what: str) -> None:
    memory = GuestMemory()
    with pytest.raises(errors.RegionInvalid):
        memory.add_region(gpa, size, ram.fd, offset)
    assert memory.regions == ()


def test_what_is_no_file_is_refused() -> None:
    read, write = os.pipe()
    memory = GuestMemory()
    with pytest.raises(errors.RegionInvalid, match="not a file"):
        memory.add_region(0, 4096, read)
    os.close(read)
    os.close(write)
    with pytest.raises(errors.RegionInvalid):
        memory.add_region(0, 4096, read)


def test_a_file_whose_pages_may_never_come_is_refused(tmp_path: Path) -> None:
    """Any file system may wait for somebody else, and its own is asked for nothing."""
    with (tmp_path / "ram").open("w+b") as file:
        file.truncate(4096)
        memory = GuestMemory()
        with pytest.raises(errors.RegionInvalid, match="shared memory"):
            memory.add_region(0, 4096, file.fileno())
        with pytest.raises(errors.FrontEndError, match="memfd"):
            CodeMap(file.fileno(), 4096, [])
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        memory.add_region(0, 4096, file.fileno())


def test_no_other_program_inherits_guest_memory() -> None:
    fd = os.memfd_create("guest's own")
    os.ftruncate(fd, 4096)
    memory = GuestMemory()
    memory.add_region(0, 4096, fd)
    mine = [int(n) for n, what in open_fds().items() if "guest's own" in what and int(n) != fd]
    assert [os.get_inheritable(n) for n in mine] == [False]
    os.close(fd)


def test_huge_pages_are_refused_with_the_reason() -> None:
    """At once: the first region, which could be mapped, like those whose rings could not be."""
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, 4 * MIB)
    memory = GuestMemory()
    for offset in (0, 768 << 10):
        with pytest.raises(errors.RegionInvalid, match=r"2048 KiB.*not hugetlb") as caught:
            memory.add_region(offset, 640 << 10, fd, offset)
        assert caught.value.status == NtStatus.NOT_SUPPORTED
    os.close(fd)


def test_the_number_of_regions_is_bounded(ram: Ram) -> None:
    memory = GuestMemory()
    for number in range(MAX_REGIONS):
        memory.add_region(number * 4096, 4096, ram.fd)
    with pytest.raises(errors.RegionInvalid, match="more than 100") as caught:
        memory.add_region(MAX_REGIONS * 4096, 4096, ram.fd)
    assert caught.value.status is NtStatus.INSUFFICIENT_RESOURCES
    memory.remove_region(0, 4096)
    memory.add_region(MAX_REGIONS * 4096, 4096, ram.fd)
    memory.close()


@given(st.integers(0, 40), st.integers(1, 20))
@settings(max_examples=examples(60))
def test_overlapping_regions_are_refused(start: int, pages: int) -> None:
    ram = Ram(64)
    memory = GuestMemory()
    memory.add_region(16 * 4096, 8 * 4096, ram.fd)
    overlaps = start < 24 and start + pages > 16
    try:
        memory.add_region(start * 4096, pages * 4096, ram.fd)
    except errors.RegionOverlap:
        assert overlaps
    else:
        assert not overlaps
    memory.close()
    ram.close()


def test_regions_are_known_by_address_and_size(ram: Ram) -> None:
    memory = GuestMemory()
    memory.add_region(MIB, 8192, ram.fd, 4096)
    memory.add_region(0, 8192, ram.fd)
    assert [region.guest_phys_addr for region in memory.regions] == [0, MIB]
    with pytest.raises(errors.RegionUnknown):
        memory.remove_region(MIB, 4096)
    memory.remove_region(MIB, 8192)
    assert [region.guest_phys_addr for region in memory.regions] == [0]
    memory.close()
    assert memory.regions == ()


def test_the_region_at_the_top_of_the_address_space(ram: Ram) -> None:
    memory = GuestMemory()
    memory.add_region((1 << 64) - 8192, 8192, ram.fd)
    with memory.external_data([GpaRange.of_pages([(1 << 52) - 1])]) as data:
        data.write(b"top")
    assert os.pread(ram.fd, 3, 4096) == b"top"
    memory.close()


def test_translate_spans_regions(ram: Ram) -> None:
    memory = GuestMemory()
    memory.add_region(0, 4096, ram.fd)
    memory.add_region(4096, 4096, ram.fd, 8192)
    spans = memory.translate(4000, 200)
    assert [(span.guest_phys_addr, span.length) for span in spans] == [(4000, 96), (4096, 104)]
    spans[1].view[0:2] = b"ok"
    assert os.pread(ram.fd, 2, 8192) == b"ok"
    with pytest.raises(errors.PfnOutsideMemory):
        memory.translate(8000, 200)
    memory.close()


# -- external data -------------------------------------------------------------------------------


@st.composite
def guest_ranges(draw: st.DrawFn) -> list[GpaRange]:
    result = []
    for _ in range(draw(st.integers(1, 4))):
        byte_count = draw(st.integers(1, 3 * 4096))
        byte_offset = draw(st.integers(0, 2 * 4096))
        count = pfn_count(byte_offset, byte_count)
        pfns = draw(
            st.lists(
                st.integers(BASE_PFN, BASE_PFN + 15), min_size=count, max_size=count, unique=True
            )
        )
        result.append(GpaRange(byte_count, byte_offset, pfns))
    return result


def model_positions(ranges: list[GpaRange]) -> list[int]:
    """The guest-physical address of every byte, from the definition of a GPA range."""
    return [
        item.pfns[(item.byte_offset + i) // 4096] * 4096 + (item.byte_offset + i) % 4096
        for item in ranges
        for i in range(item.byte_count)
    ]


@given(guest_ranges(), st.data())
@settings(max_examples=examples(80), deadline=None)
def test_external_data_is_what_the_ranges_define(
    ranges: list[GpaRange], data: st.DataObject
) -> None:
    ram = Ram(16)
    content = os.urandom(16 * 4096)
    ram.poke(BASE, content)
    memory = ram.memory()
    positions = model_positions(ranges)
    external = memory.external_data(ranges)
    assert len(external) == len(positions)
    expected = bytes(content[gpa - BASE] for gpa in positions)
    assert external.read() == expected
    offset = data.draw(st.integers(0, len(external)))
    length = data.draw(st.integers(0, len(external) - offset))
    assert external.read(offset, length) == expected[offset : offset + length]
    assert b"".join(external.views(offset, length)) == expected[offset : offset + length]
    assert external.written == []

    new = os.urandom(length)
    external.write(new, offset)
    model = bytearray(content)
    for gpa, byte in zip(positions[offset : offset + length], new, strict=True):
        model[gpa - BASE] = byte
    assert ram.peek(BASE, len(model)) == bytes(model)
    touched = set()
    for gpa, size in external.written:
        touched.update(range(gpa, gpa + size))
    assert touched == set(positions[offset : offset + length])
    external.close()
    memory.close()
    ram.close()


@given(st.integers(-5, 20000), st.integers(-5, 20000))
def test_out_of_bounds_is_refused(offset: int, length: int) -> None:
    with Shared() as external:
        inside = offset >= 0 and length >= 0 and offset + length <= len(external)
        for call in (
            lambda: external.read(offset, length),
            lambda: external.fill(1, offset, length),
            lambda: external.views(offset, length),
        ):
            if inside:
                call()
            else:
                with pytest.raises(ValueError, match="outside external data"):
                    call()


class Shared:
    """External data of three pages, for property tests that need no fresh one."""

    ram = Ram(16)
    memory = ram.memory()

    def __enter__(self) -> ExternalData:
        self.external = self.memory.external_data(
            [GpaRange.of_pages([BASE_PFN + 1, BASE_PFN + 3, BASE_PFN + 4])]
        )
        return self.external

    def __exit__(self, *_: object) -> None:
        self.external.close()


def test_file_to_guest_and_back(memory: GuestMemory, ram: Ram, tmp_path: Path) -> None:
    # more pieces than one iovec array of the engine has, none next to another
    pages = [BASE_PFN + i for i in range(0, PAGES, 2)] + [BASE_PFN + 1] * 60
    external = memory.external_data([GpaRange(len(pages) * 4096 - 100, 50, pages)])
    content = os.urandom(len(external))
    path = tmp_path / "file"
    path.write_bytes(bytes(10) + content)
    with path.open("r+b") as file:
        unique = 256 * 4096 - 50
        assert external.preadv(file.fileno(), 10, 0, unique) == unique
        assert external.read(0, unique) == content[:unique]
        assert external.pwritev(file.fileno(), 0, 0, unique) == unique
        assert path.read_bytes()[:unique] == content[:unique]
    external.close()


def test_reading_past_the_end_of_a_file_is_short(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 5000)
    with (
        memory.external_data([GpaRange.of_pages([BASE_PFN, BASE_PFN + 2])]) as external,
        (tmp_path / "short").open("rb") as file,
    ):
        assert external.preadv(file.fileno(), 0) == 5000
        assert external.preadv(file.fileno(), 5000) == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            external.pwritev(file.fileno(), 0)
        with pytest.raises(ValueError, match="file offset"):
            external.preadv(file.fileno(), -1)
        with pytest.raises(ValueError, match="file offset"):
            external.preadv(file.fileno(), (1 << 63) - 100)


def test_nothing_works_after_the_end(memory: GuestMemory) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    view = external.views(writable=True)[0]
    external.close()
    external.close()
    for call in (external.read, external.views, external.fill, lambda: external.write(b"x")):
        with pytest.raises(errors.ExternalDataClosed):
            call()
    with pytest.raises(ValueError, match="released"):
        _ = view[0]


def test_views_are_read_only_unless_asked_for(memory: GuestMemory, ram: Ram) -> None:
    with memory.external_data([GpaRange(5000, 0, [BASE_PFN, BASE_PFN + 9])]) as external:
        with pytest.raises(TypeError):
            external.views()[0][0] = 1
        views = external.views(4090, 20, writable=True)
        views[0][:] = b"abcdef"
        views[1][:2] = b"gh"
        assert external.written == [(BASE + 4090, 6), (BASE + 9 * 4096, 14)]
    assert ram.peek(BASE + 4090, 6) == b"abcdef"
    assert ram.peek(BASE + 9 * 4096, 2) == b"gh"


def test_many_small_writes_stay_a_short_list(memory: GuestMemory) -> None:
    with memory.external_data([GpaRange.of_pages([BASE_PFN, BASE_PFN + 1])]) as external:
        for offset in range(0, 8000, 16):
            external.write(b"x", offset)
        assert len(external.written) < 70
        covered = set()
        for gpa, size in external.written:
            covered.update(range(gpa, gpa + size))
        assert covered >= {BASE + offset for offset in range(0, 8000, 16)}
        assert external.take_written()
        assert external.written == []


@pytest.mark.parametrize(
    ("ranges", "error", "value"),
    [
        ([], errors.GpaRangeCountInvalid, 0),
        ([GpaRange(0, 0, [])], errors.GpaRangeEmpty, 0),
        ([GpaRange.of_pages([BASE_PFN - 1])], errors.PfnOutsideMemory, BASE_PFN - 1),
        ([GpaRange.of_pages([BASE_PFN, BASE_PFN + PAGES])], errors.PfnOutsideMemory, None),
        ([GpaRange.of_pages([(1 << 52) + BASE_PFN])], errors.PfnOutsideMemory, None),
        ([GpaRange.of_pages([(1 << 64) - 1])], errors.PfnOutsideMemory, (1 << 64) - 1),
        ([GpaRange(8192, 0, [BASE_PFN])], errors.GpaRangeTruncated, 2),
        ([GpaRange(4096, 1, [BASE_PFN])], errors.GpaRangeTruncated, 2),
        ([GpaRange(0xFFFFFFFF, 0xFFFFFFFF, [BASE_PFN])], errors.GpaRangeTruncated, 1 << 21),
        ([GpaRange(9, 4096, [BASE_PFN - 1, BASE_PFN])], errors.PfnOutsideMemory, BASE_PFN - 1),
    ],
)
def test_bad_ranges_are_named(
    memory: GuestMemory, ranges: list[GpaRange], error: type[errors.GuestError], value: int | None
) -> None:
    with pytest.raises(error) as caught:
        memory.external_data(ranges)
    if value is not None:
        assert caught.value.value == value
    assert memory.regions[0].users == 0


def test_limits_are_kept(memory: GuestMemory) -> None:
    two = [GpaRange.of_pages([BASE_PFN]), GpaRange.of_pages([BASE_PFN])]
    with pytest.raises(errors.GpaRangeTooLong):
        memory.external_data(two, max_bytes=8191)
    with pytest.raises(errors.GpaRangeCountInvalid):
        memory.external_data(two, max_ranges=1)
    memory.external_data(two, max_bytes=8192, max_ranges=2).close()


def test_every_fault_of_the_engine_has_a_name() -> None:
    codes = [getattr(lib, name) for name in dir(lib) if name.startswith("VVB_E_")]
    for code in codes:
        if code in (lib.VVB_E_FULL, lib.VVB_E_TOO_BIG):
            continue
        assert isinstance(guest_error(code, 1, 2, 3), (errors.GuestError, MemoryError))
