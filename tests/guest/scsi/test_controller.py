# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller as a guest's driver meets it: real socket, rings and pages, no VM."""

from __future__ import annotations

import os
import random
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scsi_guest import MIB, Rig, make_image
from vhostvmbus.devices.scsi import DiskLocked, ScsiController
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.devices.scsi.unit import Direct
from vhostvmbus.guest import ChannelNotOpen, CompletionTimeout, SoftwareGuest, serving
from vhostvmbus.guest.storvsc import (
    ENUMERATE_BUS,
    QUERY_PROPERTIES,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    Storvsc,
)
from vhostvmbus.wire.gpa import GpaRange

pytestmark = pytest.mark.usefixtures("plans")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        yield Rig(image, controller, guest)


@pytest.mark.parametrize(
    ("versions", "accepted"),
    [
        ((0x0602, 0x0600, 0x0501), 0x0602),
        ((0x0600, 0x0501), 0x0600),
        ((0x0501,), 0x0501),
        ((0x0402,), 0x0402),
        ((0x0200,), 0x0200),
        ((0x0700, 0x0501), 0x0501),
    ],
)
def test_each_version_reads_writes_and_fails_properly(
    tmp_path: Path, versions: tuple[int, ...], accepted: int
) -> None:
    image = make_image(tmp_path)
    content = image.read_bytes()
    with ScsiController([str(image)]) as controller, SoftwareGuest.for_device(controller) as guest:
        driver = Storvsc(guest, guest.enable())
        assert driver.initialize(versions) == accepted
        assert driver.max_transfer_bytes >= MIB
        done = driver.read(3, 9).wait()
        assert done.good
        assert done.transferred == 9 * 512
        assert done.data == content[3 * 512 : 12 * 512]
        assert driver.write(5, b"q" * 512).wait().good
        bad = driver.read(16384, 1).wait()
        assert (bad.srb_status, bad.scsi_status, bad.transferred) == (0x84, 2, 0)
        assert len(bad.sense) == 18
        assert bad.sense_code == (5, 0x21, 0)
    assert image.read_bytes() == content[:2560] + b"q" * 512 + content[3072:]


def test_many_queued_transfers_from_scattered_pages(rig: Rig) -> None:
    """Random reads and writes, many at a time, at odd offsets into the pages, byte for byte."""
    chance = random.Random(11)
    model = bytearray(rig.image.read_bytes())
    for _ in range(12):
        batch = []
        taken: list[tuple[int, int]] = []
        for _ in range(32):
            blocks = chance.choice((1, 2, 7, 8, 16, 63, 64, 255))
            lba = chance.randrange(16384 - blocks)
            if any(lba < high and low < lba + blocks for low, high in taken):
                continue  # simple tags have no order: overlapping ones could go either way
            taken.append((lba, lba + blocks))
            offset = chance.choice((0, 4, 512, 1000, 4095))
            if chance.random() < 0.5:
                data = chance.randbytes(blocks * 512)
                batch.append((rig.driver.write(lba, data, byte_offset=offset), None))
                model[lba * 512 : (lba + blocks) * 512] = data
            else:
                expected = bytes(model[lba * 512 : (lba + blocks) * 512])
                batch.append((rig.driver.read(lba, blocks, byte_offset=offset), expected))
        for request, expected in batch:
            done = request.wait()
            assert done.good
            assert expected is None or done.data == expected
            assert done.transferred == len(done.data)
    assert rig.driver.flush().good
    assert rig.image.read_bytes() == bytes(model)


def test_one_large_transfer(rig: Rig) -> None:
    content = rig.image.read_bytes()
    size = rig.driver.max_transfer_bytes
    assert size == 2 * MIB
    done = rig.driver.read(1, size // 512, byte_offset=100).wait()
    assert done.good
    assert done.data == content[512 : 512 + size]
    new = random.Random(2).randbytes(size)
    assert rig.driver.write(9, new, byte_offset=3000).wait().good
    assert rig.image.read_bytes()[9 * 512 : 9 * 512 + size] == new


def test_several_ranges_in_one_request(rig: Rig) -> None:
    content = rig.image.read_bytes()
    cdb = struct.pack(">BBQIxx", 0x88, 0, 20, 16)
    done = rig.driver.command(cdb, room=8192, pieces=(100, 4996, 3096), byte_offset=17)
    assert done.good
    assert done.data == content[20 * 512 : 36 * 512]
    cdb = struct.pack(">BBQIxx", 0x8A, 0, 40, 8)
    new = random.Random(3).randbytes(4096)
    assert rig.driver.command(cdb, data=new, pieces=(1, 4095), byte_offset=5).good
    assert rig.image.read_bytes()[40 * 512 : 48 * 512] == new


def test_buffer_longer_or_shorter_than_the_transfer(rig: Rig) -> None:
    cdb = struct.pack(">BBIxHx", 0x28, 0, 0, 2)
    done = rig.driver.command(cdb, room=4096)
    assert done.good
    assert done.transferred == 1024, "the residual is what is left"
    assert done.data[1024:] == bytes(3072)
    short = rig.driver.command(cdb, room=1023)
    assert short.srb_status == 0x84
    assert short.sense_code == (5, 0x24, 0)
    assert short.data == bytes(1023)
    none = rig.driver.command(cdb)
    assert none.sense_code == (5, 0x24, 0)


def test_unmap_makes_holes_and_flush_is_durable(rig: Rig) -> None:
    fd = os.open(rig.image, os.O_RDONLY)
    try:
        os.fsync(fd)
        before = rig.image.stat().st_blocks
        assert rig.driver.unmap(2048, 4096).good
        assert rig.image.stat().st_blocks <= before - 4096
        assert os.lseek(fd, 0, os.SEEK_HOLE) == MIB
        assert os.lseek(fd, MIB, os.SEEK_DATA) == 3 * MIB
        assert rig.driver.read(2048, 64).wait().data == bytes(32768)
        same = rig.driver.command(struct.pack(">BBQIxx", 0x93, 0x09, 8192, 2048))
        assert same.good
        assert os.lseek(fd, 4 * MIB, os.SEEK_DATA) == 5 * MIB
        assert rig.driver.flush().good
        assert rig.image.stat().st_size == 8 * MIB
    finally:
        os.close(fd)


def test_a_scan_as_linux_does_it(rig: Rig) -> None:
    """INQUIRY and REPORT LUNS to every target: 16 of them, nothing but LUN 0 is found."""
    for target in range(2):
        found = rig.driver.command("12 00 00 00 24 00", room=36, target=target)
        assert found.good
        assert found.transferred == 36
        assert (found.data[0] == 0) is (target == 0)
        luns = rig.driver.command("a0" + "00" * 5 + "00001000" + "0000", room=4096, target=target)
        assert luns.good
        assert struct.unpack_from(">I", luns.data)[0] == (0 if target else 8)
    missing = rig.driver.command("00" * 6, lun=7)
    assert (missing.srb_status, missing.scsi_status, missing.sense) == (0x20, 2, b"")
    assert missing.status == 0xC00000C0
    assert rig.driver.command("12 00 00 00 24 00", room=36, lun=7).data[0] == 0x7F


def test_disks_come_and_go(rig: Rig, tmp_path: Path) -> None:
    second = tmp_path / "second.raw"
    assert rig.controller.attach(f"{second}:4M") == 1
    note = rig.channel.receive()
    assert note.payload[:4] == struct.pack("<I", ENUMERATE_BUS)
    assert note.transaction_id == 0
    assert len(note.payload) == 64
    assert rig.driver.write(8191, b"e" * 512, lun=1).wait().good
    assert rig.controller.luns == [0, 1]
    with pytest.raises(ValueError, match="taken"):
        rig.controller.attach(f"{tmp_path / 'third.raw'}:4M", lun=1)
    rig.controller.detach(1)
    assert rig.channel.receive().payload[:4] == struct.pack("<I", ENUMERATE_BUS)
    assert rig.driver.read(0, 1, lun=1).wait().srb_status == 0x20
    assert rig.driver.read(0, 1).wait().good
    with second.open("rb") as file:
        file.seek(8191 * 512)
        assert file.read() == b"e" * 512
    ScsiController([str(second)]).close()


def test_read_only_disk(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    content = image.read_bytes()
    with (
        ScsiController([f"{image},ro"]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.command("1a 00 3f 00 ff 00", room=255).data[2] & 0x80
        for done in (driver.write(0, bytes(512)).wait(), driver.unmap(0, 8)):
            assert done.srb_status == 0x84
            assert done.sense_code == (7, 0x27, 0)
        assert driver.flush().good
        assert driver.read(0, 8).wait().data == content[:4096]
        with pytest.raises(DiskLocked):
            ScsiController([str(image)])
        ScsiController([f"{image},ro"]).close()
    assert image.read_bytes() == content


def test_image_in_use(rig: Rig) -> None:
    with pytest.raises(DiskLocked, match="in use"):
        ScsiController([str(rig.image)])
    with pytest.raises(DiskLocked, match="in use"):
        rig.controller.attach(str(rig.image))
    assert rig.controller.luns == [0]


def test_truncated_image_is_a_medium_error(rig: Rig) -> None:
    os.truncate(rig.image, MIB)
    gone = rig.driver.read(4096, 8).wait()
    assert (gone.srb_status, gone.sense_code) == (0x84, (3, 0x11, 0))
    part = rig.driver.read(2040, 16).wait()
    assert part.sense_code == (3, 0x11, 0)
    assert rig.driver.read(0, 8).wait().good
    same = struct.pack(">BBQIxx", 0x93, 0, 4096, 8)
    writes = [
        rig.driver.write(4096, bytes(4096)),
        rig.driver.write(0, bytes(4096), fua=True),
        rig.driver.submit(same, data=bytes(512)),
        rig.driver.submit(same, data=b"x" * 512),
    ]
    for write in writes:
        assert write.wait().sense_code == (3, 0x0C, 0)
    assert rig.image.stat().st_size == MIB, "it has not grown again, with a hole"
    os.truncate(rig.image, 8 * MIB)
    assert rig.driver.write(0, bytes(4096)).wait().good


def test_write_that_the_host_refuses_is_a_medium_error(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        bad = rig.driver.write(1024, bytes(4096)).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (bad.srb_status, bad.sense_code) == (0x84, (3, 0x0C, 0))
    assert rig.driver.write(1024, bytes(4096)).wait().good


def test_full_file_system(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full stands for it: every write there is ENOSPC."""
    backing = rig.controller.unit(0).backing
    full = os.open("/dev/full", os.O_RDWR)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(backing, "_fd", full)
            patch.setattr(backing, "_is_block", True)  # its length says nothing
            rig.controller.replan()
            bad = rig.driver.write(0, bytes(512)).wait()
        rig.controller.replan()
    finally:
        os.close(full)
    assert (bad.srb_status, bad.sense_code) == (0x84, (7, 0x27, 7))


@pytest.mark.parametrize("operation", [RESET_BUS, RESET_ADAPTER, RESET_LUN])
def test_reset_is_answered_and_raises_a_unit_attention(rig: Rig, operation: int) -> None:
    pending = [rig.driver.read(lba, 8) for lba in range(8)]
    answer = rig.driver.control(operation)
    assert answer[8:12] == bytes(4)
    assert all(request.wait().good for request in pending)
    ascq = 3 if operation == RESET_LUN else 2
    assert rig.driver.command("00" * 6).sense_code == (6, 0x29, ascq)
    assert rig.driver.command("00" * 6).good


def test_reset_waits_for_slow_requests(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    backing = rig.controller.unit(0).backing
    go, running = threading.Event(), threading.Event()

    def flush() -> None:
        running.set()
        assert go.wait(10)

    monkeypatch.setattr(backing, "flush", flush)
    slow = rig.driver.submit(bytes.fromhex("35" + "00" * 9))
    assert running.wait(5)
    assert rig.driver.read(0, 1).wait().good, "a flush does not hold up the channel"
    reset = rig.channel.submit(struct.pack("<III", RESET_BUS, 1, 0).ljust(64, b"\0"))
    with pytest.raises(CompletionTimeout):
        reset.wait(0.2)
    go.set()
    assert slow.wait().good
    assert reset.wait()[8:12] == bytes(4)


def test_a_read_that_the_host_has_to_fetch_holds_up_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing = rig.controller.unit(0).backing
    content = rig.image.read_bytes()
    go, running = threading.Event(), threading.Event()
    read_into = backing.read_into

    def slow_read(data: object, offset: int, length: int) -> None:
        if offset == MIB:
            running.set()
            assert go.wait(10)
        read_into(data, offset, length)  # type: ignore[arg-type]

    assert isinstance(backing, FileDisk)
    direct = Direct(backing.fileno(), MIB, nowait=True)  # no plan for what lies behind
    monkeypatch.setattr(backing, "direct", lambda: direct)
    monkeypatch.setattr(backing, "would_wait", lambda offset, length: offset == MIB)
    monkeypatch.setattr(backing, "read_into", slow_read)
    rig.controller.replan()
    cold = rig.driver.read(2048, 8)
    assert running.wait(5)
    assert rig.driver.read(0, 8).wait().good
    go.set()
    assert cold.wait().data == content[MIB : MIB + 4096]


def test_detach_waits_for_slow_requests(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    backing = rig.controller.unit(0).backing
    go, running = threading.Event(), threading.Event()

    def flush() -> None:
        running.set()
        assert go.wait(10)
        os.fstat(backing.fileno())  # type: ignore[attr-defined]

    monkeypatch.setattr(backing, "flush", flush)
    slow = rig.driver.submit(bytes.fromhex("35" + "00" * 9))
    assert running.wait(5)
    with pytest.raises(TimeoutError, match="still in use"):
        rig.controller.detach(0, timeout=0.1)
    assert rig.driver.read(0, 1).wait().srb_status == 0x20
    go.set()
    assert slow.wait().good


def test_close_with_requests_outstanding(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    backing = rig.controller.unit(0).backing
    go, running = threading.Event(), threading.Event()

    def flush() -> None:
        running.set()
        go.wait(10)

    monkeypatch.setattr(backing, "flush", flush)
    slow = [rig.driver.submit(bytes.fromhex("35" + "00" * 9)) for _ in range(12)]
    assert running.wait(5)
    rig.guest.disable(0)
    for request in slow:
        with pytest.raises(ChannelNotOpen):
            request.wait()
    go.set()
    driver = Storvsc(rig.guest, rig.guest.enable())
    driver.initialize()
    monkeypatch.undo()
    assert driver.read(0, 8).wait().good
    assert driver.flush().good


def test_guest_unloads_and_loads_its_driver(rig: Rig) -> None:
    content = rig.image.read_bytes()
    rig.driver.command("15 10 0000 18 00", data=bytes(4) + b"\x08\x12" + bytes(18))
    assert not rig.controller.unit(0).write_cache
    rig.guest.disable(0)
    for version in (0x0602, 0x0402, 0x0501):
        with rig.guest.open_channel() as channel:
            driver = Storvsc(rig.guest, channel)
            driver.initialize((version,))
            assert rig.controller.unit(0).write_cache, "mode pages are back at their defaults"
            assert driver.read(0, 8).wait().data == content[:4096]


def test_guest_goes_on_with_a_new_back_end(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    content = image.read_bytes()
    with ScsiController([str(image)]) as first, SoftwareGuest.for_device(first) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        guest.disconnect()
        waiting = driver.read(8, 8)
        first.close()
        with ScsiController([str(image)]) as second, serving(second) as (_, path, _):
            guest.reconnect(path)
            assert waiting.wait().data == content[4096:8192]
            assert driver.write(0, b"n" * 512).wait().good
            assert driver.control(QUERY_PROPERTIES)[8:12] != bytes(4), "it is past that"
            guest.close()
    assert image.read_bytes()[:512] == b"n" * 512


def test_another_file_is_not_taken_for_the_guests_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The image is deleted while there is no back end, and PATH:SIZE makes a new one."""
    path, kept = tmp_path / "disk.raw", tmp_path / "kept.raw"
    spec, no_medium = f"{path}:1M", (2, 0x3A, 0)
    with ScsiController([spec]) as first, SoftwareGuest.for_device(first) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.write(0, b"o" * 4096).wait().good
        guest.disconnect()
        first.close()
        os.link(path, kept)
        path.unlink()
        for _ in range(2):  # it does not become the guest's disk by waiting
            with ScsiController([spec]) as second, serving(second) as (_, socket, _):
                guest.reconnect(socket)
                for request in (driver.write(0, b"n" * 512), driver.read(0, 8)):
                    assert request.wait().sense_code == no_medium
                assert driver.command("12 00 00 00 24 00", room=36).good
                assert second.attach(f"{tmp_path / 'more.raw'}:1M") == 1
                assert driver.write(0, b"n" * 512, lun=1).wait().good
                guest.disconnect()
            assert path.read_bytes() == bytes(MIB)
        assert "is another file than the guest has had" in caplog.text
        with ScsiController([str(kept)]) as third, serving(third) as (_, socket, _):
            guest.reconnect(socket)
            assert driver.read(0, 8).wait().data == b"o" * 4096, "whatever its name"
            guest.disconnect()
        with ScsiController([spec]) as fourth, serving(fourth) as (_, socket, _):
            guest.reconnect(socket)
            assert driver.read(0, 8).wait().sense_code == no_medium
            guest.reset()
            driver = Storvsc(guest, guest.enable())
            driver.initialize()
            assert driver.write(0, b"n" * 4096).wait().good, "a guest that starts has it"
            guest.disconnect()
        with ScsiController([spec]) as fifth, serving(fifth) as (_, socket, _):
            guest.reconnect(socket)
            assert driver.read(0, 8).wait().data == b"n" * 4096
            guest.close()


def test_malformed_packets_cost_themselves_only(rig: Rig) -> None:
    chance = random.Random(5)
    for size in (0, 1, 4, 8, 12, 40, 48, 63, 64, 200, 256):
        for operation in range(16):
            body = struct.pack("<I", operation) + chance.randbytes(256)
            if operation == 7:
                continue  # it would start the handshake anew
            answer = rig.channel.send(body[:size])
            assert answer[:4] == b"\x01\0\0\0"
    assert rig.controller.malformed > 50
    rig.driver.command("00" * 6)  # takes a unit attention of the resets, if there is one
    assert rig.driver.read(0, 8).wait().good


def test_malformed_external_data_is_answered(rig: Rig) -> None:
    packet = rig.driver.packet(struct.pack(">BBIxHx", 0x28, 0, 0, 8), size=4096, direction=1)
    for pfn in (0xFFFFFFFFFF, 1 << 51):
        pending = rig.channel.submit_with_external_ranges(packet, [GpaRange(4096, 0, [pfn])])
        done = rig.driver.decode(pending.wait())
        assert (done.srb_status, done.status) == (0x06, 0xC000000D)
    begin = struct.pack("<III", 7, 1, 0).ljust(64, b"\0")
    refused = rig.channel.submit_with_external_ranges(begin, [GpaRange(4096, 0, [1 << 51])]).wait()
    assert struct.unpack_from("<III", refused) == (1, 1, 0xC000000D)
    assert rig.driver.read(0, 8).wait().good


def test_random_requests_never_stop_the_controller(rig: Rig) -> None:
    chance = random.Random(23)
    opcodes = (0x00, 0x03, 0x08, 0x12, 0x15, 0x1A, 0x1B, 0x25, 0x28, 0x2F, 0x35, 0x41, 0x42, 0x55,
               0x5A, 0x88, 0x8F, 0x91, 0x93, 0x9E, 0xA0, 0xA3, 0xA8, 0xAF, 0xFF)  # fmt: skip
    for _ in range(40):
        batch = []
        for _ in range(16):
            cdb = bytes((chance.choice(opcodes),)) + chance.randbytes(chance.choice((5, 9, 11, 15)))
            room = chance.choice((0, 1, 24, 255, 512, 4096))
            out = chance.random() < 0.3
            batch.append(
                rig.driver.submit(
                    cdb,
                    lun=chance.choice((0, 0, 0, 1, 255)),
                    data=chance.randbytes(room) if out and room else None,
                    room=room,
                )
            )
        for request in batch:
            done = request.wait()
            assert done.srb_status in (0x01, 0x84, 0x20, 0x06)
            assert done.transferred <= len(done.data)
    rig.driver.command("1b 00 00 00 01 00")
    rig.driver.command("00" * 6)
    assert rig.driver.read(0, 8).wait().good
