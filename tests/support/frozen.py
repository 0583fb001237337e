# SPDX-License-Identifier: GPL-2.0-or-later
"""Stops a machine again and again, and takes the device's right to write to the guest's memory.

A program of its own, because whoever writes all the same ends it, by a signal, and faulthandler
says which line that was. ``python -m tests.support.frozen disk|card|stubborn IMAGE``.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tests.support import scsi_guest
from tests.support.devices import Noting
from tests.support.net_card import MAC, SocketLink, ethernet
from tests.support.soak import times
from tests.support.stillness import cont, stop
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import DeviceHost, stillness
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.scsi import ScsiController
from vhostvmbus.engine import ffi
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.errors import ReceiveTimeout
from vhostvmbus.guest.netvsc import Netvsc
from vhostvmbus.vhost_user.errors import RequestRefused

TURNS = times(15, 200)
STOPPED = 0.003
"""Seconds for which the machine is stopped in each turn."""


def _protect(host: DeviceHost, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for region in host.memory.regions:
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(region.view)))
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(region.size), protection):
            raise OSError(ctypes.get_errno(), "mprotect")


@contextlib.contextmanager
def frozen(guest: SoftwareGuest) -> Iterator[None]:
    """Stops the machine; in the ``with`` block the device cannot write to its memory and live."""
    assert guest.host is not None
    stop(guest)
    _protect(guest.host, mmap.PROT_READ)
    yield
    _protect(guest.host, mmap.PROT_READ | mmap.PROT_WRITE)
    cont(guest)


def disk(image: str) -> None:
    """Reads and writes are under way in each turn, by the plan and without."""
    for plans in (True, False):
        ScsiController.plans = plans
        with (
            ScsiController([f"{image}:8M"]) as controller,
            SoftwareGuest.direct(controller) as guest,
        ):
            driver = scsi_guest.Storvsc(guest, guest.enable(ring_pages=(33, 33)))
            driver.initialize()
            for _ in range(TURNS):
                requests = [driver.read(number * 64, 64) for number in range(20)]
                requests += [driver.write(number * 64, bytes(64 * 512)) for number in range(20)]
                with frozen(guest):
                    time.sleep(STOPPED)
                assert all(request.wait().good for request in requests)
                for request in requests:
                    request.release()


def card(image: str) -> None:
    """Frames come all the time, from the link and from the guest."""
    link = SocketLink()
    network_card = NetworkCard(link)
    ended = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                link.put(ethernet(to=MAC))

    world = threading.Thread(target=flood)
    with (
        SoftwareGuest.direct(network_card) as guest,
        guest.open_channel(ring_pages=(17, 65)) as channel,
    ):
        driver = Netvsc(guest, channel)
        driver.initialize()
        world.start()
        for _ in range(TURNS):
            with frozen(guest):
                link.set_carrier(not link.up)
                time.sleep(STOPPED)
            for _ in range(50):
                driver.receive()
        ended.set()
        while world.is_alive():
            with contextlib.suppress(ReceiveTimeout):
                driver.pump(0.05)
    world.join()
    network_card.close()


class Stubborn(Noting):
    """Writes to the external data of a packet that it does not complete."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = threading.Event()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        data = packet.external_data
        assert data is not None

        def write() -> None:
            while True:
                data.write(b"x")
                self.writes.set()
                time.sleep(0.001)

        threading.Thread(target=write, daemon=True).start()


def stubborn(image: str) -> None:
    """A device whose packets do not end: it writes while the machine is stopped."""
    device = Stubborn()
    stillness.SUSPEND_SECONDS = 0.1
    with SoftwareGuest.direct(device) as guest, guest.open_channel() as channel:
        channel.submit_with_external_pfns(b"", guest.ram.alloc_pages(1))
        assert device.writes.wait(10)
        with contextlib.suppress(RequestRefused):
            stop(guest)
        assert guest.host is not None
        _protect(guest.host, mmap.PROT_READ)
        time.sleep(10)


KINDS: dict[str, Callable[[str], None]] = {"disk": disk, "card": card, "stubborn": stubborn}

if __name__ == "__main__":
    faulthandler.enable()
    KINDS[sys.argv[1]](sys.argv[2])
