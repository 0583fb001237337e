# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine of a SCSI controller is stopped: memory and images stay as they are meanwhile."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.support.scsi_guest import Rig, make_image
from tests.support.soak import times
from tests.support.stillness import cont, memory_of, stop
from vhostvmbus.devices.scsi import ScsiController, leaving
from vhostvmbus.guest import ChannelNotOpen, SoftwareGuest
from vhostvmbus.guest.errors import ReceiveTimeout
from vhostvmbus.vhost_user import messages as m

pytestmark = pytest.mark.usefixtures("plans")

BLOCKS = 64
"""Of 512 bytes, in each request."""
TURNS = times(6, 200)


def test_nothing_is_written_while_the_machine_stands_still(tmp_path: Path) -> None:
    """Stopped amid reads and writes of memory and image; each request is answered once, rightly."""
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        rig = Rig(image, controller, guest)
        driver = rig.driver
        for turn in range(TURNS):
            writes = [
                driver.write(number * BLOCKS, bytes([turn + number & 0xFF]) * BLOCKS * 512)
                for number in range(20)
            ]
            reads = [driver.read((100 + number) * BLOCKS, BLOCKS) for number in range(20)]
            stop(guest)
            memory, disk = memory_of(guest), image.read_bytes()
            time.sleep(0.005)
            assert memory_of(guest) == memory, turn
            assert image.read_bytes() == disk, turn
            cont(guest)
            assert all(write.wait().good for write in writes)
            before = image.read_bytes()
            for number, read in enumerate(reads):
                at = (100 + number) * BLOCKS * 512
                assert read.wait().data == before[at : at + BLOCKS * 512]
            for request in writes + reads:
                request.release()
            for number in range(20):
                at = number * BLOCKS * 512
                written = bytes([turn + number & 0xFF]) * BLOCKS * 512
                assert before[at : at + BLOCKS * 512] == written
        assert not rig.channel.stray_completions


def test_an_unplugging_waits_for_a_machine_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has its time to remove the disk when it can act again, and not before."""
    monkeypatch.setattr(leaving, "LOOK_SECONDS", 0.4)
    monkeypatch.setattr(leaving, "AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(leaving, "CALM_SECONDS", 0.1)
    image = make_image(tmp_path)
    with (
        ScsiController([str(image)]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        rig = Rig(image, controller, guest)
        stop(guest)
        guest.front_end.request(m.Unplug())
        memory = memory_of(guest)
        time.sleep(1.0)
        assert guest.channel_offers == []
        assert memory_of(guest) == memory
        cont(guest)
        while 0 in guest.offered:  # it takes what it is told, and does not look
            with contextlib.suppress(ReceiveTimeout, ChannelNotOpen):
                rig.channel.receive(0.05)
