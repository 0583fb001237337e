# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller on several channels at once: one disk, as many rings as the guest wants."""

from __future__ import annotations

import argparse
import random
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.scsi_guest import MIB, Rig, make_image
from tests.support.waiting import together
from vhostvmbus.devices.scsi import ScsiController, options
from vhostvmbus.devices.scsi.device import MAX_SUB_CHANNELS
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.storvsc import BEGIN, QUERY_PROPERTIES, RESET_BUS, BadAnswer, Storvsc
from vhostvmbus.wire.ntstatus import NtStatus

COUNT = 3
RING = (17, 17)

pytestmark = pytest.mark.usefixtures("plans")


class Subchannels(Rig):
    """A rig whose driver has subchannels."""

    def __init__(self, image: Path, controller: ScsiController, guest: SoftwareGuest) -> None:
        super().__init__(image, controller, guest, RING)
        self.subchannels = self.driver.create_sub_channels(COUNT, ring_pages=RING)
        self.drivers = [self.driver, *self.subchannels]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Subchannels]:
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        yield Subchannels(image, controller, guest)


def test_what_is_announced(rig: Subchannels) -> None:
    assert rig.driver.max_sub_channels == MAX_SUB_CHANNELS
    assert rig.guest.offered == [0, 1, 2, 3]
    assert rig.controller.max_channels == MAX_SUB_CHANNELS + 1


def test_a_request_is_completed_where_it_was_made(rig: Subchannels, plans: bool) -> None:
    """Each channel does its own, and the engine does those of subchannels as well."""
    content = rig.image.read_bytes()
    for number, driver in enumerate(rig.drivers):
        data = bytes([0x41 + number]) * 4096
        assert driver.write(8 * number, data).wait().good
        assert driver.read(8 * number, 8).wait().data == data
        assert driver.read(2048, 64).wait().data == content[MIB : MIB + 32768]
    assert rig.driver.read(0, 32).wait().data == b"".join(
        bytes([0x41 + n]) * 4096 for n in range(4)
    )
    assert rig.guest.host is not None
    rows = {row["index"]: row for row in rig.guest.host.stats()["channels"]}
    assert sorted(rows) == [0, 1, 2, 3]
    for index, row in rows.items():
        assert row["packets_planned"] == (0 if not plans else 3 + (index == 0))


def test_all_channels_at_once(rig: Subchannels) -> None:
    """Each thread has a part of the disk, writes, flushes, reads back and forth."""
    part = 2 * MIB // 512

    def work(driver: Storvsc, number: int) -> None:
        generator = random.Random(number)
        for _ in range(12):
            data = {lba: generator.randbytes(8192) for lba in generator.sample(range(64), 8)}
            start = number * part
            writes = [driver.write(start + 16 * n, block) for n, block in data.items()]
            assert all(request.wait().good for request in writes)
            assert driver.flush().good
            reads = [(block, driver.read(start + 16 * n, 16)) for n, block in data.items()]
            assert all(request.wait().data == block for block, request in reads)

    together(*(partial(work, driver, number) for number, driver in enumerate(rig.drivers)))


def test_state_changes_from_every_channel(rig: Subchannels) -> None:
    """Each change makes the plan anew for all channels, while all of them transfer."""

    def work(driver: Storvsc) -> None:
        for _ in range(40):
            reads = [driver.read(8 * n, 8) for n in range(8)]
            start = driver.submit(bytes.fromhex("1b 00 00 00 01 00"))
            reads += [driver.read(8 * n, 8) for n in range(8)]
            assert all(request.wait().good for request in (*reads, start))

    together(*(partial(work, driver) for driver in rig.drivers))


def test_a_subchannel_has_no_negotiation(rig: Subchannels) -> None:
    for driver in rig.subchannels:
        for operation in (BEGIN, QUERY_PROPERTIES):
            answer = driver.control(operation)
            assert struct.unpack_from("<I", answer, 8)[0] == NtStatus.INVALID_DEVICE_STATE
        assert driver.read(0, 8).wait().good


@pytest.mark.parametrize("count", [MAX_SUB_CHANNELS + 1, 0xFFFF])
def test_wrong_numbers(rig: Subchannels, count: int) -> None:
    with pytest.raises(BadAnswer, match=f"{NtStatus.INVALID_PARAMETER:x}"):
        rig.driver.create_sub_channels(count)


def test_more_than_are_left(rig: Subchannels) -> None:
    with pytest.raises(BadAnswer, match=f"{NtStatus.INSUFFICIENT_RESOURCES:x}"):
        rig.driver.create_sub_channels(MAX_SUB_CHANNELS - COUNT + 1)
    assert rig.guest.offered == [0, 1, 2, 3]
    assert all(driver.read(0, 8).wait().good for driver in rig.drivers)


def test_a_front_end_without_offers(tmp_path: Path) -> None:
    """The guest is told that there are none, and goes on with the channel that it has."""
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller, takes_offers=False) as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        with pytest.raises(BadAnswer, match=f"{NtStatus.NOT_SUPPORTED:x}"):
            driver.create_sub_channels(2)
        assert driver.read(0, 8).wait().good


@pytest.mark.parametrize("count", [0, 2])
def test_fewer_are_announced(tmp_path: Path, count: int) -> None:
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)], sub_channels=count) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.max_sub_channels == count
        with pytest.raises(BadAnswer, match=f"{NtStatus.INVALID_PARAMETER:x}"):
            driver.create_sub_channels(count + 1)
        if count:
            assert len(driver.create_sub_channels(count)) == count
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    with options.make_device(parser.parse_args([str(image), f"--subchannels={count}"])) as made:
        assert made.max_channels == 1 + count
    for wrong in (-1, MAX_SUB_CHANNELS + 1):
        with pytest.raises(ValueError, match="sub_channels"):
            ScsiController(sub_channels=wrong)


def test_detach_and_attach_reach_every_channel(rig: Subchannels, tmp_path: Path) -> None:
    rig.controller.detach(0)
    for driver in rig.drivers:
        assert driver.read(0, 8).wait().srb_status & 0x3F == 0x20
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * MIB)
    rig.controller.attach(str(other))
    for driver in rig.drivers:
        request = driver.read(0, 8).wait()
        if not request.good:  # the unit attention, once
            request = driver.read(0, 8).wait()
        assert request.data == b"o" * 4096


def test_a_reset_waits_for_subchannels(rig: Subchannels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush on a subchannel was there first, so it is answered first."""
    backing = rig.controller.unit(0).backing
    under_way, go_on = threading.Event(), threading.Event()
    flush = backing.flush

    def slow() -> None:
        under_way.set()
        assert go_on.wait(10)
        flush()

    monkeypatch.setattr(backing, "flush", slow)
    flushing = rig.subchannels[1].submit(bytes.fromhex("35" + "00" * 9))
    assert under_way.wait(10)
    packet = rig.driver.packet(b"")
    reset = rig.driver.channel.submit(struct.pack("<I", RESET_BUS) + packet[4:])
    assert rig.driver.read(0, 8).wait().good
    assert not reset.done
    go_on.set()
    assert flushing.wait().good
    reset.wait()


def test_the_driver_is_bound_again(rig: Subchannels) -> None:
    """Closing the primary takes the subchannels; the next driver asks for its own."""
    for count in (1, MAX_SUB_CHANNELS, 2):
        rig.guest.disable(0)
        assert rig.guest.channels == {}
        driver = Storvsc(rig.guest, rig.guest.enable(ring_pages=RING))
        driver.initialize()
        subchannels = driver.create_sub_channels(count, ring_pages=RING)
        assert len(subchannels) == count
        assert all(each.read(0, 8).wait().good for each in (driver, *subchannels))


def test_a_new_back_end_serves_subchannels(rig: Subchannels) -> None:
    """They are resumed; the guest believes them, and the primary, initialized."""
    rig.guest.disconnect()
    rig.controller.close()
    with ScsiController([str(rig.image)]) as second, serving(second) as (_, path, _):
        rig.guest.reconnect(path)
        for driver in rig.drivers:
            assert driver.read(16, 16).wait().good
        assert second.offers.offered == [1, 2, 3]
        rig.guest.disconnect()
