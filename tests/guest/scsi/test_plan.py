# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller's plan for the ring engine: when there is one; that it changes no answer."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostvmbus.channel import ChannelStats
from vhostvmbus.devices.scsi import ScsiController, options
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.storvsc import RESET_BUS, PendingRequest, Storvsc
from vhostvmbus.wire.gpa import GpaRange

MIB = 1 << 20
STOP, START = "1b 00 00 00 00 00", "1b 00 00 00 01 00"


class Rig:
    """A controller with one 8 MiB disk, its guest, and what the host's end of the channel says."""

    def __init__(self, stack: ExitStack, image: Path, *, plans: bool = True, options: str = ""):
        self.image = image
        image.write_bytes(random.Random(7).randbytes(8 * MIB))
        spec = f"{image},serial=SAME{options}"
        self.controller = stack.enter_context(ScsiController([spec], plans=plans))
        self.guest = stack.enter_context(SoftwareGuest.for_device(self.controller, code_map=True))
        self.channel = self.guest.enable(ring_pages=(33, 33))
        self.driver = Storvsc(self.guest, self.channel)
        self.driver.initialize()
        self.seen = 0

    @property
    def stats(self) -> ChannelStats:
        return self.controller._open[0].channel.stats

    def planned(self, request: PendingRequest) -> bool:
        """Waits for a request that has to succeed; whether the engine did any since last time."""
        assert request.wait().good
        before, self.seen = self.seen, self.stats.packets_planned
        return self.seen > before


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack, tmp_path / "disk.raw")


def read10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIxHx", 0x28, 0, lba, blocks)


def write10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", 0x2A, flags, lba, blocks)


def test_which_commands_are_planned(rig: Rig) -> None:
    submit, room = rig.driver.submit, 4096
    data = b"p" * 4096
    assert rig.planned(submit(read10(0, 8), room=room))
    assert rig.planned(submit(struct.pack(">BBQIxx", 0x88, 0x10, 0, 8), room=room)), "DPO"
    assert rig.planned(submit(write10(8, 8), data=data))
    assert rig.planned(submit(struct.pack(">BBQIxx", 0x8A, 0, 16, 8), data=data))
    assert not rig.planned(submit(read10(0, 0)))
    assert not rig.planned(submit(write10(24, 8, 0x08), data=data)), "FUA"
    assert not rig.planned(submit(struct.pack(">BBHBx", 0x08, 0, 0, 8), room=room)), "READ(6)"
    assert not rig.planned(submit(struct.pack(">BBIIxx", 0xA8, 0, 0, 8), room=room)), "READ(12)"
    assert not rig.planned(submit(bytes(6)))
    content = rig.image.read_bytes()
    assert content[4096 : 4 * 4096] == data * 3
    assert rig.controller.requests == 9
    assert rig.controller.stats()["requests"] == 9
    rig.guest.disable(0)
    assert rig.controller.requests == 9


@pytest.mark.parametrize("version", [0x0602, 0x0501, 0x0402, 0x0200])
def test_every_version_has_a_plan(tmp_path: Path, version: int) -> None:
    with ExitStack() as stack:
        rig = Rig(stack, tmp_path / "disk.raw")
        rig.driver.initialize((version,))
        assert rig.planned(rig.driver.read(0, 8))
        assert rig.planned(rig.driver.write(0, bytes(512)))


def test_no_plan_before_the_handshake_is_done(rig: Rig) -> None:
    packet = rig.driver.packet(read10(0, 8), size=4096, direction=1)
    for operation in (7, 9):  # BEGIN_INITIALIZATION, QUERY_PROTOCOL_VERSION
        body = struct.pack("<H", 0x0602) if operation == 9 else b""
        assert rig.driver.control(operation, body)[8:12] == bytes(4)
        pending = rig.channel.submit_with_external_pfns(packet, rig.guest.ram.alloc_pages(1))
        assert struct.unpack_from("<I", pending.wait(), 8) == (0xC0000184,)
    rig.driver.initialize()
    assert rig.planned(rig.driver.read(0, 8))


def test_a_unit_attention_is_not_overtaken(rig: Rig) -> None:
    # Sent behind the reset without waiting for it: done after it, and so told of it.
    reset = rig.channel.submit(struct.pack("<III", RESET_BUS, 1, 0).ljust(64, b"\0"))
    told = rig.driver.read(0, 8).wait()
    assert told.sense_code == (6, 0x29, 2)
    assert reset.wait()[8:12] == bytes(4)
    assert rig.planned(rig.driver.read(0, 8))
    rig.controller.resized(0)
    assert rig.driver.write(0, bytes(512)).wait().sense_code == (6, 0x2A, 9)
    assert rig.planned(rig.driver.write(0, bytes(512)))


def test_a_stopped_unit_still_transfers(rig: Rig) -> None:
    assert rig.driver.command(STOP).good
    assert rig.planned(rig.driver.write(0, b"x" * 512))
    assert rig.planned(rig.driver.read(0, 1))


def test_without_a_write_cache_writes_are_durable(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[bool] = []
    unit = rig.controller.unit(0)
    monkeypatch.setattr(unit.backing, "flush", lambda: flushes.append(unit.write_cache))
    off, on = (bytes(4) + b"\x08\x12" + flag + bytes(17) for flag in (b"\0", b"\4"))
    assert rig.driver.command("15 10 0000 18 00", data=off).good
    assert flushes == [False], "flushed when no write could stay in the cache any more"
    assert not rig.planned(rig.driver.write(0, b"d" * 512))
    assert flushes == [False, False]
    assert rig.planned(rig.driver.read(0, 1)), "reads have nothing to do with it"
    assert rig.driver.command("15 10 0000 18 00", data=on).good
    assert rig.planned(rig.driver.write(0, b"d" * 512))
    assert len(flushes) == 2


@pytest.mark.parametrize(("command", "data"), [(STOP, None), ("15 10 0000 18 00", b"\x08\x12")])
def test_a_flush_that_fails_changes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, command: str, data: bytes | None
) -> None:
    def flush() -> None:
        raise OSError(5, "no")

    page = None if data is None else bytes(4) + data + bytes(18)
    with monkeypatch.context() as patch:
        patch.setattr(rig.controller.unit(0).backing, "flush", flush)
        assert rig.driver.command(command, data=page).sense_code == (3, 0x0C, 0)
    assert rig.planned(rig.driver.write(0, b"d" * 512))


def test_a_read_only_disk(tmp_path: Path) -> None:
    with ExitStack() as stack:
        rig = Rig(stack, tmp_path / "disk.raw", options=",ro")
        assert rig.planned(rig.driver.read(0, 8))
        assert rig.driver.write(0, bytes(512)).wait().sense_code == (7, 0x27, 0)


def test_an_odd_sized_image_ends_in_zeroes(tmp_path: Path) -> None:
    image = tmp_path / "odd.raw"
    image.write_bytes(b"o" * 1000)
    with (
        ScsiController([f"{image},ro"]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.read(0, 2).wait().data == b"o" * 1000 + bytes(24)


def is_cached(path: Path, offset: int) -> bool:
    """Whether a file's page is in the page cache. (A read that asks would have it fetched.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.c_ubyte()
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_COPY, offset=offset) as mapped,
    ):
        page = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(page))
        failed = libc.mincore(address, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(answer))
        del page
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return bool(answer.value & 1)


def test_cold_reads_go_to_the_pool(rig: Rig) -> None:
    content = rig.image.read_bytes()
    backing = rig.controller.unit(0).backing
    assert isinstance(backing, FileDisk)
    os.fsync(backing.fileno())
    # The host may keep a page that it is asked to drop, and a file system in memory keeps them all.
    for _ in range(100):
        os.posix_fadvise(backing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cold := not is_cached(rig.image, 8192 * 512):
            break
    assert rig.planned(rig.driver.read(8192, 8)) is not cold
    pending = [(lba, rig.driver.read(lba, 64)) for lba in range(0, 16384, 64)]
    assert all(one.wait().data == content[lba * 512 :][:32768] for lba, one in pending)
    rig.seen = rig.stats.packets_planned
    assert rig.planned(rig.driver.read(8192, 8))


def test_disks_come_and_go_under_load(rig: Rig, tmp_path: Path) -> None:
    """Each time another file, and often the same descriptor: no byte may go to the wrong one."""
    stop = threading.Event()
    answers: set[tuple[int, bytes]] = set()

    def traffic() -> None:
        while not stop.is_set():
            for one in [rig.driver.write(i * 8, b"t" * 4096, lun=1) for i in range(16)]:
                done = one.wait()
                answers.add((done.srb_status, done.sense))

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        for turn in range(20):
            path = tmp_path / f"{turn}.raw"
            rig.controller.attach(f"{path}:1M", lun=1)
            before = rig.stats.packets_planned
            deadline = time.monotonic() + 10
            while rig.stats.packets_planned < before + 20 and time.monotonic() < deadline:
                time.sleep(0.001)
            rig.controller.detach(1)
            with (tmp_path / "bystander").open("w+b") as bystander:
                time.sleep(0.002)
                assert os.fstat(bystander.fileno()).st_size == 0
            assert path.read_bytes()[: 8 * 512] == b"t" * 4096
    finally:
        stop.set()
        thread.join()
    assert answers == {(0x01, b""), (0x20, b"")}
    assert rig.image.read_bytes() == random.Random(7).randbytes(8 * MIB)


def test_mixed_traffic_byte_for_byte(rig: Rig) -> None:
    """Everything that changes or shows the disk, planned or not, many at a time."""
    chance = random.Random(31)
    model = bytearray(rig.image.read_bytes())
    commands = ("88", "8a", "28", "2a", "08", "0a", "a8", "fua", "unmap", "zero", "flush", "far")
    for _ in range(60):
        batch: list[tuple[PendingRequest, bytes | None, bool]] = []
        taken: list[tuple[int, int]] = []
        for _ in range(40):
            kind = chance.choice(commands)
            blocks = chance.choice((1, 2, 7, 8, 64, 255))
            lba = chance.randrange(16384 - blocks)
            if any(lba < high and low < lba + blocks for low, high in taken):
                continue
            taken.append((lba, lba + blocks))
            at, end = lba * 512, (lba + blocks) * 512
            offset = chance.choice((0, 512, 1000, 4095))
            new = chance.randbytes(end - at)
            write = kind in ("8a", "2a", "0a", "fua")
            cdb = {
                "88": struct.pack(">BBQIxx", 0x88, 0, lba, blocks),
                "8a": struct.pack(">BBQIxx", 0x8A, 0, lba, blocks),
                "28": read10(lba, blocks),
                "2a": write10(lba, blocks),
                "08": struct.pack(">BBHBx", 0x08, 0, lba, blocks),
                "0a": struct.pack(">BBHBx", 0x0A, 0, lba, blocks),
                "a8": struct.pack(">BBIIxx", 0xA8, 0, lba, blocks),
                "fua": write10(lba, blocks, 0x08),
                "zero": struct.pack(">BBQIxx", 0x93, 0x01, lba, blocks),
                "flush": bytes((0x35,)) + bytes(9),
                "far": struct.pack(">BBQIxx", 0x8A, 0, 16384 - blocks + 1, blocks),
            }.get(kind, b"")
            if kind == "unmap":
                parameters = struct.pack(">HH4xQI4x", 22, 16, lba, blocks)
                cdb = bytes.fromhex("42" + "00" * 6 + "001800")
                one = rig.driver.submit(cdb, data=parameters)
                model[at:end] = bytes(end - at)
                expected = None
            elif kind in ("zero", "flush"):
                one, expected = rig.driver.submit(cdb), None
                if kind == "zero":
                    model[at:end] = bytes(end - at)
            elif write or kind == "far":
                one = rig.driver.submit(cdb, data=new, byte_offset=offset)
                expected = None
                if write:
                    model[at:end] = new
            else:
                one = rig.driver.submit(cdb, room=end - at, byte_offset=offset)
                expected = bytes(model[at:end])
            batch.append((one, expected, kind != "far"))
        for one, expected, good in batch:
            done = one.wait()
            assert done.good is good
            assert expected is None or done.data == expected
    assert rig.image.read_bytes() == bytes(model)
    planned, received = rig.stats.packets_planned, rig.stats.packets_received
    assert 100 < planned < received
    assert rig.stats.completions_sent == received
    assert not rig.stats.errors


def mutated(chance: random.Random, driver: Storvsc) -> tuple[bytes, int]:
    """A READ or WRITE with some of its bytes wrong, and the size of its buffer."""
    blocks, lba = chance.choice((1, 8, 9, 64)), chance.choice((0, 1, 16320, 16380, 1 << 31))
    size = chance.choice((512, 4096, 4608, 32768))
    cdb = chance.choice(
        (
            read10(lba, blocks),
            write10(lba, blocks),
            struct.pack(">BBQIxx", 0x88, 0, lba, blocks),
            struct.pack(">BBQIxx", 0x8A, 0, chance.choice((lba, 1 << 55, (1 << 64) - 1)), blocks),
        )
    )
    direction = 0 if cdb[0] in (0x2A, 0x8A) else 1
    packet = bytearray(driver.packet(cdb, size=size, direction=direction))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 4))):
        at = chance.randrange(4, len(packet))
        packet[at] = chance.choice((0, 1, 8, 16, 0xFF, chance.randrange(256)))
    if packet[28] in (0x1B, 0x15, 0x55):
        packet[28] = 0  # these change what follows; they have tests of their own
    return bytes(packet[: chance.choice((64, 64, 64, 64, 56, 48))]), size


@pytest.mark.parametrize("seed", range(4))
def test_hostile_packets_get_the_same_answer_with_and_without(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with ExitStack() as stack:
        rigs = [Rig(stack, tmp_path / f"{plans}.raw", plans=plans) for plans in (True, False)]
        version = chance.choice((0x0602, 0x0402))
        pfns = []
        for rig in rigs:
            rig.driver.initialize((version,))
            pfns.append(rig.guest.ram.alloc_pages(9))
        for _ in range(400):
            packet, size = mutated(chance, rigs[0].driver)
            offset = chance.choice((0, 0, 100, 4095))
            before = chance.randbytes(9 * 4096)
            results = []
            for rig, pages in zip(rigs, pfns, strict=True):
                rig.guest.ram.write(pages, before)
                used = pages[: -(-(offset + size) // 4096)]
                pending = rig.channel.submit_with_external_ranges(
                    packet, [GpaRange(size, offset, used)]
                )
                results.append((pending.wait(), rig.guest.ram.read(pages, 0, 9 * 4096)))
            assert results[0] == results[1], packet.hex(" ")
        assert rigs[0].image.read_bytes() == rigs[1].image.read_bytes()
        assert rigs[0].controller.requests == rigs[1].controller.requests
        assert rigs[0].controller.malformed == rigs[1].controller.malformed
        first, second = (rig.stats for rig in rigs)
        assert first.packets_planned > 50
        assert second.packets_planned == 0
        for name in ("packets_received", "bytes_received", "external_bytes", "completions_sent"):
            assert getattr(first, name) == getattr(second, name)


# -- translated code -----------------------------------------------------------------------------


def pages_of(invalidations: Sequence[Sequence[tuple[int, int]]]) -> set[int]:
    return {
        pfn
        for ranges in invalidations
        for start, size in ranges
        for pfn in range(start >> 12, (start + size + 4095) >> 12)
    }


def test_translated_code_is_discarded_before_the_completion(tmp_path: Path) -> None:
    """For each read of a batch, and only for the pages that it wrote."""
    seen: list[int] = []
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(7).randbytes(MIB))
    content = image.read_bytes()

    def look(ranges: Sequence[tuple[int, int]]) -> None:
        for start, _ in ranges:
            assert guest.ram.read([start >> 12], 0, 4096) in content, "the new bytes are there"
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            seen.append(channel.ring.state.rx_available)

    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller, code_map=True, on_invalidate=look) as guest,
    ):
        channel = guest.enable(ring_pages=(33, 33))
        driver = Storvsc(guest, channel)
        driver.initialize()
        assert guest.code_map is not None
        code = guest.code_map
        pfns = guest.ram.alloc_pages(32)
        for turn in range(3):
            guest.invalidations.clear()
            for pfn in pfns:
                code.mark(pfn, pfn % 2 == 0 or turn == 0)
            packet = driver.packet(read10(turn * 8, 8), size=8192, direction=1)
            pairs = [pfns[i : i + 2] for i in range(0, 32, 2)]
            # One transfer of 8 blocks in a buffer of two pages: only the first page is written.
            pending = [channel.submit_with_external_pfns(packet, pair) for pair in pairs]
            for one, pair in zip(pending, pairs, strict=True):
                assert driver.decode(one.wait()).good
                if code.is_marked(pair[0]):
                    assert pair[0] in pages_of(guest.invalidations), "published too early"
            firsts = {pair[0] for pair in pairs}
            assert pages_of(guest.invalidations) == {p for p in firsts if code.is_marked(p)}
        assert controller._open[0].channel.stats.packets_planned == 48
        assert controller._open[0].channel.stats.code_invalidations > 0
        # Writing to the disk only reads the guest's pages.
        guest.invalidations.clear()
        packet = driver.packet(write10(0, 8), size=4096, direction=0)
        assert driver.decode(channel.submit_with_external_pfns(packet, [pfns[0]]).wait()).good
        assert guest.invalidations == []
    assert seen


def test_a_single_planned_completion_waits_for_the_front_end(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    in_ring: list[int] = []

    def look(ranges: Sequence[tuple[int, int]]) -> None:
        end = time.monotonic() + 0.1
        while time.monotonic() < end or len(in_ring) < 10:
            in_ring.append(channel.ring.state.rx_available)
            time.sleep(0.005)

    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller, code_map="unknown", on_invalidate=look) as guest,
    ):
        channel = guest.enable(ring_pages=(33, 33))
        driver = Storvsc(guest, channel)
        driver.initialize()
        assert driver.read(0, 8).wait().good
        assert controller._open[0].channel.stats.packets_planned == 1
        assert len(in_ring) >= 10
        assert set(in_ring) == {0}


def test_what_a_failed_plan_wrote_is_invalidated_too(tmp_path: Path) -> None:
    """The image ends in the middle of the read: pages are written, the command fails."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"i" * MIB)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller, code_map="unknown") as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        os.truncate(image, 4096)
        bad = driver.read(0, 16).wait()
        assert bad.sense_code == (3, 0x11, 0)
        assert bad.data[:4096] == b"i" * 4096
        assert controller._open[0].channel.stats.packets_planned == 0
        assert len(pages_of(guest.invalidations)) == 2


@pytest.mark.parametrize("words", [(), ("--no-plan",)])
def test_the_command_line_can_do_without(tmp_path: Path, words: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    chosen = parser.parse_args([f"{tmp_path / 'disk.raw'}:1M", *words])
    with (
        options.make_device(chosen) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.write(0, bytes(512)).wait().good
        planned = controller._open[0].channel.stats.packets_planned
        assert planned == (0 if words else 1)
