# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller with a driver that has Windows' ways: exact lengths, sense data fetched."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scsi_guest import MIB, make_image
from vhostvmbus.devices.scsi import ScsiController, options
from vhostvmbus.devices.scsi.storvsp import Version
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.storvsc import CREATE_SUB_CHANNELS, Storvsc
from vhostvmbus.guest.storvsc_windows import VERSIONS, WindowsStorvsc
from vhostvmbus.wire.ntstatus import NtStatus

pytestmark = pytest.mark.usefixtures("plans")

RING = (17, 17)
OUT_OF_RANGE = (5, 0x21, 0)
TEST_UNIT_READY = "00" * 6
READ_BEYOND = struct.pack(">BBQIxx", 0x88, 0, 1 << 40, 1)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path)


@pytest.fixture
def controller(image: Path) -> Iterator[ScsiController]:
    with ScsiController([str(image)]) as controller:
        yield controller


@pytest.fixture
def guest(controller: ScsiController) -> Iterator[SoftwareGuest]:
    with SoftwareGuest.for_device(controller) as guest:
        yield guest


def open_driver(guest: SoftwareGuest, autosense: bool = True) -> WindowsStorvsc:
    return WindowsStorvsc(guest, guest.enable(ring_pages=RING), autosense=autosense)


@pytest.mark.parametrize("autosense", [True, False], ids=["autosense", "fetched"])
@pytest.mark.parametrize("version", VERSIONS, ids=hex)
def test_each_version(
    controller: ScsiController,
    guest: SoftwareGuest,
    image: Path,
    tmp_path: Path,
    version: int,
    autosense: bool,
) -> None:
    """It looks at the length of everything that comes; sense data come along, or are fetched."""
    driver = open_driver(guest, autosense)
    assert driver.initialize((version,)) == version
    assert driver.max_sub_channels == (controller.max_channels - 1 if version >= 0x0501 else 0)
    assert driver.read(0, 8).wait().data == image.read_bytes()[:4096]
    assert driver.write(8, b"w" * 4096).wait().good
    bad = driver.command(READ_BEYOND, room=512)
    assert (bad.srb_status, bad.scsi_status) == (0x84 if autosense else 0x04, 2)
    assert bad.sense_code == OUT_OF_RANGE
    assert driver.command("03 00 00 00 12 00", room=18).data[2] == 0, "fetched once"
    assert not driver.is_absent(0)
    assert driver.is_absent(1)
    assert driver.is_absent(0, target=1)
    controller.attach(f"{tmp_path / 'second.raw'}:4M")
    driver.wait_for_rescan()
    assert not driver.is_absent(1)
    assert driver.flush().good


def test_a_longer_packet_is_answered_with_the_versions_length(guest: SoftwareGuest) -> None:
    driver = open_driver(guest)
    driver.initialize((0x0402,))
    short = driver.packet(struct.pack(">BBIxHx", 0x28, 0, 0, 1), size=512, direction=1)
    for size in (48, 56, 64, 128):
        for packet in (short, struct.pack("<III", 5, 1, 0)):  # RESET_ADAPTER
            assert len(driver.channel.send(packet.ljust(size, b"\0"))) == 48


def test_sense_data_are_kept_for_their_unit(
    controller: ScsiController, guest: SoftwareGuest, tmp_path: Path
) -> None:
    """A failure on one is not reported on the other, and a unit attention waits behind it."""
    controller.attach(f"{tmp_path / 'second.raw'}:4M")
    driver = open_driver(guest, autosense=False)
    driver.initialize()
    bad = [driver.submit(READ_BEYOND, room=512, lun=lun).wait() for lun in (0, 1)]
    assert [each.sense for each in bad] == [b"", b""]
    controller.resized(0)
    request_sense = "03 00 00 00 12 00"
    codes = []
    for lun in (0, 1, 0, 0):
        data = driver.command(request_sense, room=18, lun=lun).data
        codes.append((data[2], data[12], data[13]))
    assert codes == [OUT_OF_RANGE, OUT_OF_RANGE, (6, 0x2A, 9), (0, 0, 0)]
    driver.submit(READ_BEYOND, room=512).wait()
    guest.disable(0)
    driver = open_driver(guest)
    driver.initialize()
    assert driver.command(request_sense, room=18).data[2] == 0, "nothing is kept for the next"


@pytest.mark.parametrize("count", [0, 3])
def test_subchannels_before_the_end_of_the_initialization(guest: SoftwareGuest, count: int) -> None:
    driver = open_driver(guest)
    driver.initialize(sub_channels=count, ring_pages=RING)
    assert len(driver.others) == count
    for number, each in enumerate([driver, *driver.others]):
        assert each.write(8 * number, bytes([number]) * 4096).wait().good
        assert each.is_absent(7)
    for number in range(count + 1):
        assert driver.read(8 * number, 8).wait().data == bytes([number]) * 4096


def test_subchannels_may_be_none(image: Path) -> None:
    """The flag says that there could be; the number says that there are none."""
    with (
        ScsiController([str(image)], sub_channels=0) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = open_driver(guest)
        driver.initialize(sub_channels=4)
        assert (driver.max_sub_channels, driver.others) == (0, [])
        assert driver.read(0, 8).wait().good


def test_an_old_version_knows_no_subchannels(guest: SoftwareGuest) -> None:
    driver = open_driver(guest)
    driver.initialize((0x0402,))
    answer = driver.control(CREATE_SUB_CHANNELS, struct.pack("<H", 1))
    assert struct.unpack_from("<I", answer, 8)[0] == NtStatus.INVALID_PARAMETER
    assert guest.offered == [0]


def test_a_stop_flushes_and_takes_nothing_away(
    controller: ScsiController, guest: SoftwareGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []
    monkeypatch.setattr(controller.unit(0).backing, "flush", lambda: flushed.append(True))
    driver = open_driver(guest)
    driver.initialize()
    for cdb, flushes in (
        ("1b 00 00 00 00 00", 1),
        ("1b 00 00 00 04 00", 1),  # NO_FLUSH
        ("1b 00 00 00 01 00", 1),
        ("1b 01 00 00 00 00", 2),
    ):
        assert driver.command(cdb).good
        assert len(flushed) == flushes
        assert driver.command(TEST_UNIT_READY).good
        assert driver.write(0, b"s" * 512).wait().good
        assert driver.read(0, 1).wait().data == b"s" * 512


@pytest.mark.parametrize("newest", Version, ids=str)
def test_the_newest_version_can_be_chosen(image: Path, newest: Version) -> None:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    with (
        options.make_device(parser.parse_args([str(image), f"--protocol={newest}"])) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = open_driver(guest)
        assert driver.initialize() == newest
        assert driver.read(0, 8).wait().good
    with pytest.raises(SystemExit):
        parser.parse_args([str(image), "--protocol=3.0"])


@pytest.mark.parametrize("version", [0x0602, 0x0402], ids=hex)
def test_a_new_back_end_goes_by_the_guests_packets(
    image: Path, tmp_path: Path, version: int
) -> None:
    """It was not there when the version was agreed upon."""
    with ScsiController([str(image)]) as first, SoftwareGuest.for_device(first) as guest:
        driver = open_driver(guest, autosense=False)
        driver.initialize((version,))
        guest.disconnect()
        first.close()
        with ScsiController([str(image)]) as second, serving(second) as (_, path, _):
            guest.reconnect(path)
            assert driver.command(READ_BEYOND, room=512).sense_code == OUT_OF_RANGE
            assert driver.read(0, 8).wait().good
            second.attach(f"{tmp_path / 'second.raw'}:4M")
            driver.wait_for_rescan()
            guest.disconnect()


def test_linux_takes_the_same_answers(guest: SoftwareGuest, image: Path) -> None:
    """The other driver, on a controller that has served this one."""
    driver = open_driver(guest)
    driver.initialize(sub_channels=1, ring_pages=RING)
    guest.disable(0)
    linux = Storvsc(guest, guest.enable(ring_pages=RING))
    linux.initialize()
    assert len(linux.create_sub_channels(2, ring_pages=RING)) == 2
    assert linux.read(2048, 8).wait().data == image.read_bytes()[MIB : MIB + 4096]
