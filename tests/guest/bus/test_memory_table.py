# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests that change the memory table: done whole, or refused and nothing has changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from tests.support.devices import Digest, Echo
from vhostvmbus.guest import GuestRam, SoftwareGuest
from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.ram import RamRegion
from vhostvmbus.memory import ExternalData
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import PAGE_SIZE

LOW, HIGH, NEW = 0, 1 << 32, 1 << 33
MIB = 1 << 20
INVALID, RESOURCES = NtStatus.INVALID_PARAMETER, NtStatus.INSUFFICIENT_RESOURCES
CONFLICT = NtStatus.CONFLICTING_ADDRESSES


def described(region: RamRegion) -> m.MemoryRegion:
    return m.MemoryRegion(region.guest_phys_addr, region.size, region.user_addr, region.mmap_offset)


@dataclass
class Scene:
    """A device with an open channel, whose ring lies in the lower of two regions."""

    guest: SoftwareGuest
    channel: GuestChannel
    low: RamRegion
    high: RamRegion
    device: Digest

    def digest_of(self, pfn: int, data: bytes) -> bool:
        """Tells whether the device sees ``data``, written by the guest into this page."""
        self.guest.ram.write([pfn], data.ljust(PAGE_SIZE, b"."))
        wanted = hashlib.sha256(data.ljust(PAGE_SIZE, b".")).digest()
        return self.channel.send_with_external_pfns(b"", [pfn]) == wanted

    @property
    def high_pfn(self) -> int:
        return self.high.guest_phys_addr // PAGE_SIZE

    def hold(self, region: RamRegion) -> ExternalData:
        """Something inside the back end that uses the region, and does not end in time."""
        assert self.guest.host is not None
        pfn = region.guest_phys_addr // PAGE_SIZE
        return self.guest.host.memory.external_data([GpaRange.of_pages([pfn])])

    def refused(self, message: m.Message, fds: list[int], status: NtStatus) -> None:
        """Checks that ``message`` is refused, and that the map and the channel are as they were."""
        host = self.guest.host
        assert host is not None
        before, channels, events = host.memory.regions, host.channels, list(self.device.events)
        with pytest.raises(RequestRefused) as caught:
            self.guest.front_end.request(message, fds)
        assert caught.value.status == status
        assert host.memory.regions == before
        assert (host.channels, self.device.events) == (channels, events)
        assert self.digest_of(self.high_pfn, b"after the refusal")
        assert len(self.channel.send(b"in-band.")) == 32


@pytest.fixture
def scene() -> Iterator[Scene]:
    device = Digest()
    with (
        contextlib.closing(GuestRam([(LOW, 8 * MIB)])) as ram,
        SoftwareGuest.for_device(device, ram=ram, ram_in_table=True) as guest,
    ):
        channel = guest.enable()  # its ring can only be in the lower region
        high = ram.add(HIGH, 8 * MIB)
        guest.set_memory_table(ram.regions)
        scene = Scene(guest, channel, ram.regions[0], high, device)
        assert scene.digest_of(scene.high_pfn, b"at first")
        yield scene


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("table", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def as_it_is(fd: int) -> int:
    return os.dup(fd)


def read_only(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def eventfd(_: int) -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)


BAD: dict[str, tuple[int, int, int, Callable[[int], int], NtStatus]] = {
    "no file": (NEW, MIB, 0, eventfd, INVALID),
    "longer than its file": (NEW, MIB + PAGE_SIZE, 0, as_it_is, INVALID),
    "behind its file's end": (NEW, PAGE_SIZE, MIB, as_it_is, INVALID),
    "a part of a page": (NEW, PAGE_SIZE + 8, 0, as_it_is, INVALID),
    "an address within a page": (NEW + 8, PAGE_SIZE, 0, as_it_is, INVALID),
    "an offset within a page": (NEW, PAGE_SIZE, 8, as_it_is, INVALID),
    "an overlap": (LOW + PAGE_SIZE, PAGE_SIZE, 0, as_it_is, CONFLICT),
    "a file that cannot be mapped": (NEW, MIB, 0, read_only, RESOURCES),
}
"""Regions by address, size and offset, each with what is done to the descriptor of a file of 1 MiB,
and the status that refuses it."""


@pytest.mark.parametrize("ring_stays", [True, False])
@pytest.mark.parametrize("reason", BAD)
def test_a_table_with_one_bad_region(scene: Scene, reason: str, ring_stays: bool) -> None:
    """Also one that would have taken the memory of the channel's ring away."""
    address, size, offset, change, status = BAD[reason]
    with memfd(MIB) as file, memfd(8 * MIB) as other:
        fd = change(file)
        table = (
            described(scene.low)
            if ring_stays
            else m.MemoryRegion(LOW, 8 * MIB, LOW, 0),  # the same addresses, another file
            m.MemoryRegion(address, size, NEW, offset),
        )
        fds = [scene.low.fd if ring_stays else other, fd]
        scene.refused(m.SetMemTable(table), fds, status)
        os.close(fd)
    # And the table can be changed as if nothing had been.
    scene.guest.set_memory_table([scene.low])
    assert scene.channel.send_with_external_pfns(b"", [scene.high_pfn]) == Digest.REJECTED
    scene.guest.set_memory_table([scene.low, scene.high])
    assert scene.digest_of(scene.high_pfn, b"once more")
    assert scene.device.events == ["opened 0"]


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_region_is_not_added(scene: Scene, reason: str) -> None:
    address, size, offset, change, status = BAD[reason]
    with memfd(MIB) as file:
        fd = change(file)
        message = m.AddMemReg(m.MemoryRegion(address, size, NEW, offset))
        scene.refused(message, [fd], status)
        os.close(fd)
        if status is not CONFLICT:
            scene.guest.front_end.request(m.AddMemReg(m.MemoryRegion(NEW, MIB, NEW, 0)), [file])


def test_more_regions_than_slots(scene: Scene) -> None:
    with memfd(MIB) as fd:
        for number in range(98):
            region = m.MemoryRegion(NEW + number * MIB, MIB, NEW, 0)
            scene.guest.front_end.request(m.AddMemReg(region), [fd])
        scene.refused(m.AddMemReg(m.MemoryRegion(NEW * 2, MIB, NEW, 0)), [fd], RESOURCES)


def test_a_region_that_is_not_there_is_not_removed(scene: Scene) -> None:
    known = described(scene.high)
    for change in ({"size": 4 * MIB}, {"guest_phys_addr": NEW}, {"user_addr": 1}):
        scene.refused(m.RemMemReg(replace(known, **change)), [], INVALID)
    scene.guest.front_end.request(m.RemMemReg(known))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhostvmbus.device.host.PATIENCE", 0.05)
    monkeypatch.setattr("vhostvmbus.device.host.LAST_PATIENCE", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("which", ["ring", "data"])
def test_a_region_that_stays_in_use_is_not_removed(scene: Scene, which: str) -> None:
    region = scene.low if which == "ring" else scene.high
    held = scene.hold(region)
    scene.refused(m.RemMemReg(described(region)), [], NtStatus.IO_TIMEOUT)
    held.close()
    scene.guest.remove_memory(region)
    assert scene.device.events[-1] == ("closed 0" if which == "ring" else "opened 0")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("which", ["ring", "data"])
def test_a_table_that_would_take_what_stays_in_use(scene: Scene, which: str) -> None:
    going, staying = scene.low, scene.high
    if which == "data":
        going, staying = staying, going
    held = scene.hold(going)
    with memfd(MIB) as fd:
        new = m.MemoryRegion(NEW, MIB, NEW, 0)
        table = m.SetMemTable((described(staying), new))
        scene.refused(table, [staying.fd, fd], NtStatus.IO_TIMEOUT)
        # What was new has not come either.
        scene.guest.front_end.request(m.AddMemReg(new), [fd])
        held.close()
        scene.guest.front_end.request(table, [staying.fd, fd])
    assert scene.guest.host is not None
    assert [r.guest_phys_addr for r in scene.guest.host.memory.regions] == [
        staying.guest_phys_addr,
        NEW,
    ]
    assert scene.device.events[-1] == ("closed 0" if which == "ring" else "opened 0")


def test_the_same_addresses_in_another_file_are_another_region() -> None:
    """The ring of the channel is not there any more, so the channel is closed."""
    device = Echo()
    with (
        contextlib.closing(GuestRam([(LOW, 8 * MIB)])) as ram,
        SoftwareGuest.for_device(device, ram=ram, ram_in_table=True) as guest,
        memfd(8 * MIB) as other,
    ):
        assert guest.enable().send(b"8 bytes!") == b"8 bytes!"
        region = m.MemoryRegion(LOW, 8 * MIB, LOW, 0)
        guest.front_end.request(m.SetMemTable((region,)), [other])
        assert device.events == ["opened 0", "suspended 0", "closed 0"]


def test_a_table_closes_no_more_channels_than_it_has_to() -> None:
    class Two(Echo):
        channels = max_channels = 2

    device = Two()
    with (
        contextlib.closing(GuestRam([(LOW, 8 * MIB)])) as ram,
        SoftwareGuest.for_device(device, ram=ram, ram_in_table=True) as guest,
    ):
        first = guest.enable(0)
        ram.alloc_pages(ram.free_page_count)
        high = ram.add(HIGH, 8 * MIB)
        guest.set_memory_table(ram.regions)
        guest.enable(1)
        guest.set_memory_table([region for region in ram.regions if region is not high])
        assert device.events == ["opened 0", "opened 1", "suspended 1", "closed 1"]
        assert first.send(b"goes on.") == b"goes on."
