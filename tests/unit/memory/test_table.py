# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole memory map in the place of another: all of it, or nothing has changed."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ram import BASE, BASE_PFN, PAGES, Ram
from vhostvmbus.memory import GuestMemory, Region
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import SharedRegion

PAGE = 4096
OTHER = BASE + (1 << 30)
OTHER_PFN = OTHER // PAGE


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


@pytest.fixture
def memory(ram: Ram) -> Iterator[GuestMemory]:
    memory = ram.memory()
    yield memory
    memory.close()


def mappings() -> int:
    """How many mappings this process has: what is mapped and not let go is seen there."""
    with open("/proc/self/maps") as lines:
        return sum("memfd:guest-ram" in line for line in lines)


def test_what_is_in_both_stays_mapped(memory: GuestMemory, ram: Ram) -> None:
    (kept,) = memory.regions
    twin = Ram()
    table = [SharedRegion(BASE, ram.size, ram.fd), SharedRegion(OTHER, twin.size, twin.fd)]
    assert memory.set_table(table) == []
    assert memory.regions[0] is kept
    assert [region.guest_phys_addr for region in memory.regions] == [BASE, OTHER]
    with memory.external_data([GpaRange.of_pages([BASE_PFN, OTHER_PFN])]) as data:
        data.write(bytes([1]) * PAGE + bytes([2]) * PAGE)
    assert (ram.peek(BASE, 1), os.pread(twin.fd, 1, 0)) == (b"\1", b"\2")
    twin.close()


@pytest.mark.parametrize("change", ["file", "offset", "size"])
def test_what_differs_is_mapped_anew(memory: GuestMemory, ram: Ram, change: str) -> None:
    (old,) = memory.regions
    twin = Ram()
    regions = {
        "file": SharedRegion(BASE, ram.size, twin.fd),
        "offset": SharedRegion(BASE, ram.size - PAGE, ram.fd, PAGE),
        "size": SharedRegion(BASE, ram.size - PAGE, ram.fd),
    }
    kept_view = old.view[:1]
    ram.poke(BASE, b"o")
    os.pwrite(twin.fd, b"t", 0)
    ram.poke(BASE + PAGE, b"p")
    assert memory.set_table([regions[change]]) == [old]
    (new,) = memory.regions
    assert bytes(new.view[:1]) == {"file": b"t", "offset": b"p", "size": b"o"}[change]
    assert bytes(kept_view) == b"\0", "a view of what has gone shows zeros"
    twin.close()


def test_the_descriptors_of_the_table_stay_the_callers(memory: GuestMemory, ram: Ram) -> None:
    copy = os.dup(ram.fd)
    memory.set_table([SharedRegion(BASE, ram.size, copy), SharedRegion(OTHER, PAGE, copy)])
    os.close(copy)
    with memory.external_data([GpaRange.of_pages([OTHER_PFN])]) as data:
        data.write(b"x")
    assert ram.peek(BASE, 1) == b"x"


def read_only(ram: Ram) -> int:
    return os.open(f"/proc/self/fd/{ram.fd}", os.O_RDONLY)


def sealed(_: Ram) -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGES * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def short(_: Ram) -> int:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGES * PAGE - 1)
    return fd


def no_descriptor(_: Ram) -> int:
    return -1


def directory(_: Ram) -> int:
    return os.open(tempfile.gettempdir(), os.O_RDONLY)


def eventfd(_: Ram) -> int:
    return os.eventfd(0)


def good(ram: Ram) -> int:
    return os.dup(ram.fd)


def huge(_: Ram) -> int:
    """A file that is longer than the addresses of a process."""
    fd = os.memfd_create("huge")
    os.ftruncate(fd, 1 << 50)
    return fd


INVALID, RESOURCES = NtStatus.INVALID_PARAMETER, NtStatus.INSUFFICIENT_RESOURCES
REFUSED: dict[str, tuple[Callable[[Ram], int], int, int, int, NtStatus]] = {
    "no descriptor": (no_descriptor, OTHER, PAGE, 0, INVALID),
    "a directory": (directory, OTHER, PAGE, 0, INVALID),
    "an eventfd": (eventfd, OTHER, PAGE, 0, INVALID),
    "a file that is too short": (short, OTHER, PAGES * PAGE, 0, INVALID),
    "an offset behind the file's end": (good, OTHER, PAGE, PAGES * PAGE, INVALID),
    "no bytes": (good, OTHER, 0, 0, INVALID),
    "an address within a page": (good, OTHER + 8, PAGE, 0, INVALID),
    "a part of a page": (good, OTHER, PAGE - 8, 0, INVALID),
    "an offset within a page": (good, OTHER, PAGE, 8, INVALID),
    "an address beyond the last": (good, (1 << 64) - PAGE, 2 * PAGE, 0, INVALID),
    "an overlap": (good, BASE + PAGE, PAGE, 0, NtStatus.CONFLICTING_ADDRESSES),
    "a file that cannot be written": (read_only, OTHER, PAGE, 0, RESOURCES),
    "a sealed file": (sealed, OTHER, PAGE, 0, RESOURCES),
    "more than can be mapped": (huge, OTHER, 1 << 49, 0, RESOURCES),
}


@pytest.mark.parametrize("kept", [True, False], ids=["old region kept", "old region replaced"])
@pytest.mark.parametrize("reason", REFUSED)
def test_a_table_that_is_refused_changes_nothing(
    memory: GuestMemory, ram: Ram, reason: str, kept: bool
) -> None:
    make, guest_phys_addr, size, offset, status = REFUSED[reason]
    before = memory.regions
    held = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    fd, twin = make(ram), Ram()
    first = SharedRegion(BASE, ram.size, ram.fd if kept else twin.fd)
    mapped = mappings()
    # The region in the middle is good: it would be mapped before the bad one is.
    table = [
        first,
        SharedRegion(OTHER + (1 << 60), twin.size, twin.fd),
        SharedRegion(guest_phys_addr, size, fd, offset),
    ]

    def release(regions: Sequence[Region]) -> None:
        pytest.fail(f"{regions} would have been given up")

    with pytest.raises((errors.RegionInvalid, errors.RegionOverlap)) as caught:
        memory.set_table(table, release)
    assert caught.value.status is status
    del caught
    assert memory.regions == before
    assert mappings() == mapped
    held.write(b"goes on")
    with memory.external_data([GpaRange.of_pages([BASE_PFN])]) as data:
        assert data.read(0, 7) == b"goes on"
    held.close()
    assert memory.set_table(table[:2]) == ([] if kept else list(before))
    twin.close()
    if fd >= 0:
        os.close(fd)


def test_a_table_whose_old_regions_stay_busy_changes_nothing(memory: GuestMemory, ram: Ram) -> None:
    before = memory.regions
    twin = Ram()
    table = [SharedRegion(BASE, ram.size, twin.fd)]
    used: list[object] = []

    def refuse(regions: Sequence[Region]) -> None:
        assert regions == list(before)
        # A packet comes meanwhile and finds the new memory.
        used.append(memory.external_data([GpaRange.of_pages([BASE_PFN])]))
        raise errors.RegionBusy("somebody does not let go")

    with pytest.raises(errors.RegionBusy):
        memory.set_table(table, refuse)
    assert memory.regions == before
    with memory.external_data([GpaRange.of_pages([BASE_PFN])]) as data:
        data.write(b"old")
    assert (ram.peek(BASE, 3), os.pread(twin.fd, 3, 0)) == (b"old", bytes(3))
    (packet,) = used
    packet.write(b"new")  # type: ignore[attr-defined]
    assert os.pread(twin.fd, 3, 0) == b"new", "what the packet found stays mapped for it"
    packet.close()  # type: ignore[attr-defined]
    assert memory.set_table(table) == list(before)
    twin.close()


def test_more_regions_than_there_may_be(memory: GuestMemory, ram: Ram) -> None:
    before = memory.regions
    table = [SharedRegion(number * PAGE, PAGE, ram.fd) for number in range(101)]
    with pytest.raises(errors.RegionInvalid, match="more than 100") as caught:
        memory.set_table(table)
    assert caught.value.status is RESOURCES
    assert memory.regions == before
    memory.set_table(table[:100])
    assert len(memory.regions) == 100
    memory.set_table([])
    assert memory.regions == ()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_after_a_change_the_map_is_the_table_or_the_one_of_before(
    stretches: list[tuple[int, int]], data: st.DataObject
) -> None:
    ram = Ram(64)
    memory = GuestMemory()
    memory.set_table([SharedRegion(16 * PAGE, 4 * PAGE, ram.fd), SharedRegion(0, PAGE, ram.fd)])
    before = memory.regions
    table = [SharedRegion(start * PAGE, pages * PAGE, ram.fd) for start, pages in stretches]
    taken = [page for start, pages in stretches for page in range(start, start + pages)]
    try:
        memory.set_table(table)
    except errors.RegionOverlap:
        assert len(taken) > len(set(taken))
        assert memory.regions == before
    else:
        assert len(taken) == len(set(taken))
        assert sorted((r.guest_phys_addr, r.size) for r in memory.regions) == sorted(
            (item.guest_phys_addr, item.size) for item in table
        )
        for page in taken:
            memory.external_data([GpaRange.of_pages([page])]).close()
    memory.close()
    ram.close()
