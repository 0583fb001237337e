# SPDX-License-Identifier: GPL-2.0-or-later
"""An image on a file system that is frozen: a write hangs in the kernel, and nobody can recall it.

It reaches the image when the file system is thawed, long after the guest has closed its channel,
or has gone, and uses the memory for something else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.scsi_guest import MIB, Rig
from tests.support.waiting import eventually
from vhostvmbus.device import host
from vhostvmbus.devices.scsi import ScsiController
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.vhost_user.errors import Disconnected, RequestRefused

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
"""``linux/fs.h``"""
WRITE = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 8, 0)
OLD, ASKED, LATER = b"\x11" * 4096, b"\xaa" * 4096, b"\xbb" * 4096


class FrozenSystem:
    """A file system of its own with an image of 1 MiB, that can be frozen."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "mounted"
        self.root.mkdir()
        container = folder / "container"
        with container.open("wb") as file:
            file.truncate(8 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", container], check=True)
        subprocess.run(["mount", "-o", "loop", container, self.root], check=True)
        self.image = self.root / "disk.raw"
        self.image.write_bytes(OLD * 256)
        self._fd = os.open(self.root, os.O_RDONLY)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(self._fd, FITHAW, 0)

    def end(self) -> None:
        os.close(self._fd)
        subprocess.run(["umount", "--lazy", self.root], check=True)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[FrozenSystem]:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.fail("this test mounts a file system of its own: it wants root and loop devices")
    system = FrozenSystem(tmp_path)
    try:
        yield system
    finally:
        system.end()


def hanging() -> bool:
    """Tells whether a thread of this process hangs in the kernel."""
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path("/proc/self/task").iterdir()
    ]
    return "D" in states


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CLOSING_SECONDS", 0.4)
    monkeypatch.setattr(host, "HURRY_SECONDS", 0.2)


def resets(guest: SoftwareGuest, path: Path) -> SoftwareGuest:
    guest.reset()
    return guest


def closes(guest: SoftwareGuest, path: Path) -> SoftwareGuest:
    """It is not told that this is done: the connection ends."""
    with pytest.raises(Disconnected):
        guest.disable(0)
    return SoftwareGuest.connect(path)


@pytest.mark.parametrize("end", [resets, closes])
@pytest.mark.parametrize("plans", [True, False], ids=["planned", "unplanned"])
def test_a_write_that_hangs(
    system: FrozenSystem, plans: bool, end: Callable[[SoftwareGuest, Path], SoftwareGuest]
) -> None:
    """It writes what it was asked to, and until then nobody uses the disk."""
    with (
        ScsiController([FileDisk(str(system.image))]) as controller,
        serving(controller) as (_, path, _),
        contextlib.closing(SoftwareGuest.connect(path)) as guest,
        contextlib.ExitStack() as stack,
    ):
        controller.plans = plans
        rig = Rig(system.image, controller, guest)
        with system.frozen():
            request = rig.driver.submit(WRITE, data=ASKED)
            eventually(hanging)
            following = stack.enter_context(contextlib.closing(end(guest, path)))
            rig.driver._scatter(request.ranges, LATER)
            with pytest.raises(RequestRefused):
                following.enable(ring_pages=(33, 33))
        eventually(lambda: not controller.unit(0).stragglers)
        assert system.image.read_bytes() == ASKED + OLD * 255
