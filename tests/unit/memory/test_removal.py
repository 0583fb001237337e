# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory that goes: regions that are removed in use, files that are truncated."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.ram import BASE, BASE_PFN, Ram
from vhostvmbus.memory import GuestMemory, Region, wait_until_unused
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange


def impatient(regions: Sequence[Region]) -> None:
    wait_until_unused(regions, 0.05)


def test_removal_waits_for_the_last_user(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    looked: list[Sequence[Region]] = []

    def release(regions: Sequence[Region]) -> None:
        looked.append(regions)
        with pytest.raises(errors.PfnOutsideMemory):
            memory.external_data([GpaRange.of_pages([BASE_PFN])])
        with pytest.raises(errors.RegionBusy):
            impatient(regions)
        external.write(b"still there")
        assert ram.peek(BASE, 11) == b"still there"
        external.close()
        impatient(regions)

    before = memory.regions
    memory.remove_region(BASE, ram.size, release)
    assert looked == [list(before)]
    assert memory.regions == ()
    memory.add_region(BASE, ram.size, ram.fd)


def test_a_region_that_stays_busy_stays_in_the_map(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    (region,) = memory.regions
    with pytest.raises(errors.RegionBusy):
        memory.remove_region(BASE, ram.size, impatient)
    assert memory.regions == (region,)
    external.write(b"the first ")
    with memory.external_data([GpaRange.of_pages([BASE_PFN])]) as later:
        later.write(b"the second", 10)
    assert ram.peek(BASE, 20) == b"the first the second"
    external.close()
    memory.remove_region(BASE, ram.size, impatient)
    assert memory.regions == ()


def test_memory_that_was_taken_away_is_not_written_to_a_file(
    memory: GuestMemory, ram: Ram, tmp_path: Path
) -> None:
    """Who uses it may look at it still; a file would get what somebody else has in it by now."""
    path = tmp_path / "file"
    path.write_bytes(b"the file's own")
    ram.poke(BASE, b"asked for once")
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    memory.renew()
    with path.open("r+b") as file:
        with pytest.raises(OSError, match="canceled"):
            external.pwritev(file.fileno(), 0, 0, 14)
        with memory.external_data([GpaRange.of_pages([BASE_PFN])]) as later:
            assert later.pwritev(file.fileno(), 14, 0, 14) == 14
        assert external.preadv(file.fileno(), 0, 0, 14) == 14
    assert path.read_bytes() == b"the file's ownasked for once"
    assert ram.peek(BASE, 14) == b"asked for once"
    external.close()


def test_regions_that_are_used_beyond_the_end_go_with_the_next_change(
    memory: GuestMemory, ram: Ram
) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    ram.poke(BASE, b"before")
    memory.close(timeout=0.05)
    assert memory.regions == ()
    # Who uses one has a copy: he sees what was there, and writes where nobody else sees it.
    assert external.read(0, 6) == b"before"
    external.write(b"unseen")
    assert external.read(0, 6) == b"unseen"
    assert ram.peek(BASE, 6) == b"before"
    files = len(os.listdir("/proc/self/fd"))
    external.close()
    memory.add_region(BASE, ram.size, ram.fd)
    # One descriptor came with the new region and that of the old one went.
    assert len(os.listdir("/proc/self/fd")) == files
    assert memory.regions[0].users == 0


def test_removal_ends_when_a_packet_ends(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    timer = threading.Timer(0.1, external.close)
    timer.start()
    begin = time.monotonic()
    memory.remove_region(BASE, ram.size)
    assert 0.05 < time.monotonic() - begin < 5
    timer.join()


def test_a_view_that_was_kept_is_harmless_after_removal(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    kept = external.views()[0][10:20]
    ram.poke(BASE + 10, b"0123456789")
    assert bytes(kept) == b"0123456789"
    external.close()
    memory.remove_region(BASE, ram.size)
    gc.collect()
    assert bytes(kept) == bytes(10)


def test_an_abandoned_packet_does_not_hold_memory(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    assert memory.regions[0].users == 1
    del external
    gc.collect()
    assert memory.regions[0].users == 0


def test_look_ups_and_removals_at_the_same_time(ram: Ram) -> None:
    memory = GuestMemory()
    memory.add_region(0, 4096 * 8, ram.fd)
    stop = threading.Event()
    seen = {"hit": 0, "miss": 0}

    def look_up() -> None:
        while not stop.is_set():
            try:
                external = memory.external_data([GpaRange.of_pages([BASE_PFN, BASE_PFN + 1])])
            except errors.PfnOutsideMemory:
                seen["miss"] += 1
            else:
                external.write(b"abc", 4095)
                external.close()
                seen["hit"] += 1

    thread = threading.Thread(target=look_up)
    thread.start()
    deadline = time.monotonic() + 10
    rounds = 0
    while (rounds < 100 or not seen["hit"] or not seen["miss"]) and time.monotonic() < deadline:
        memory.add_region(BASE, ram.size, ram.fd)
        time.sleep(0.001)
        memory.remove_region(BASE, ram.size)
        rounds += 1
    stop.set()
    thread.join()
    assert seen["hit"]
    assert seen["miss"]
    memory.close()


def test_close_waits_for_who_is_inside(memory: GuestMemory) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN])])
    external._enter()
    done = threading.Event()
    thread = threading.Thread(target=lambda: (external.close(wait=True), done.set()))
    thread.start()
    assert not done.wait(0.1)
    assert memory.regions[0].users == 1
    external._leave()
    assert done.wait(5)
    assert memory.regions[0].users == 0
    thread.join()


# -- truncation ----------------------------------------------------------------------------------


def test_truncated_memory_is_an_error_not_a_crash(memory: GuestMemory, ram: Ram) -> None:
    external = memory.external_data([GpaRange.of_pages([BASE_PFN, BASE_PFN + 5])])
    view = external.views()[0]
    os.ftruncate(ram.fd, 0)
    with pytest.raises(errors.GuestMemoryLost):
        external.read()
    assert bytes(view[:4]) == bytes(4)
    assert external.lost
    assert memory.regions[0].lost
    with pytest.raises(errors.GuestMemoryLost):
        external.write(b"x")
    with pytest.raises(errors.GuestMemoryLost):
        external.views()
    external.close()
    memory.remove_region(BASE, ram.size)


def test_file_io_into_truncated_memory_is_named(
    memory: GuestMemory, ram: Ram, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    with (
        memory.external_data([GpaRange.of_pages([BASE_PFN])]) as external,
        (tmp_path / "file").open("r+b") as file,
    ):
        os.ftruncate(ram.fd, 0)
        with pytest.raises(errors.GuestMemoryLost):
            external.preadv(file.fileno(), 0)
        with pytest.raises(errors.GuestMemoryLost):
            external.pwritev(file.fileno(), 0)


LOSES_PAGES = """
import os
from vhostvmbus.memory import GuestMemory
from vhostvmbus.wire.errors import GuestMemoryLost
from vhostvmbus.wire.gpa import GpaRange

pages = 12000
fd = os.memfd_create("ram")
os.ftruncate(fd, pages * 4096)
memory = GuestMemory()
memory.add_region(0, pages * 4096, fd)
os.ftruncate(fd, 0)
for page in range(0, pages, 2):
    with memory.external_data([GpaRange.of_pages([page])]) as data:
        try:
            data.read()
        except GuestMemoryLost:
            continue
    raise SystemExit(f"page {page} is not lost")
print(sum(1 for _ in open("/proc/self/maps")))
"""


def test_lost_pages_do_not_use_up_the_mappings() -> None:
    """In a process of its own, as what is lost is counted once for all."""
    done = subprocess.run(
        [sys.executable, "-c", LOSES_PAGES], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4000  # each page by itself: 6000


def test_a_write_that_is_under_way_is_not_forgotten() -> None:
    """Another thread takes what was written meanwhile: it does not have all of it yet."""
    size = 16 << 20
    memory, fd = GuestMemory(), os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    memory.add_region(0, size, fd)
    mapping = memory.external_data([GpaRange.of_pages(range(size >> 12))])
    for mark in range(1, 50):
        writer = threading.Thread(target=mapping.write, args=(bytes([mark]) * size,))
        writer.start()
        while not mapping.take_written():
            pass
        unfinished = mapping.read(size - 1, 1) != bytes([mark])
        writer.join()
        if unfinished:
            assert mapping.take_written() == [(0, size)]
            break
        mapping.take_written()
    assert unfinished
    mapping.close()
    os.close(fd)
