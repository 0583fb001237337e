# SPDX-License-Identifier: GPL-2.0-or-later
"""A card's life under traffic: another MTU, drivers, guests and interfaces that come and go.

iperf3 sends both ways over TCP all the time; where its connection can live through what happens,
it has to.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.footprint import Repeated
from tests.support.machines import plug, unplug, watched
from tests.support.net_rig import (
    HOST6,
    MAC,
    MODULE,
    NET_CHARDEV,
    QUEUES,
    Rig,
    copy_in,
    there_and_back,
)
from tests.support.network import wait_for
from tests.support.paths import PROGRAMS
from tests.support.soak import times
from vhostvmbus.devices.net.link.namespace import call_in

TURNS = times(2, 20)
RELOADS = times(5, 100)
PLUGS = times(2, 200)
RMMOD = "for i in $(seq 100); do rmmod hv_netvsc 2>/dev/null && break; sleep 0.1; done"
"""Whoever looks at the interface just now holds the module."""
RELOAD = f"{RMMOD}; [ ! -e /sys/class/net/eth0 ] && modprobe hv_netvsc && {MODULE}"


@pytest.fixture(autouse=True)
def nothing_wrong(rig: Rig) -> Iterator[None]:
    with rig.nothing_wrong():
        yield


def holdings(rig: Rig) -> tuple[object, ...]:
    """What a guest has lent to the back end, and its channels."""
    found = rig.statistics()
    channels = [channel["index"] for channel in found["channels"]]
    return found["gpadls"], found["gpadl_bytes"], channels, found["device"]["receive_sections"]


def sections_come_back(rig: Rig) -> None:
    """All receive sections are free, once nothing is under way."""

    def free() -> bool:
        card = rig.card()
        return bool(card["receive_sections_free"] > card["receive_sections"] - 64)

    wait_for(free, "sections come back", 20)


@contextlib.contextmanager
def knocking(rig: Rig) -> Iterator[None]:
    """Frames for the card all the time, whether it is there or not."""
    frame = MAC + bytes.fromhex("020000000077") + b"\x88\xb5" + bytes(1000)
    over = threading.Event()

    def raw() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((rig.tap, 0))
        return sock

    def knock(sock: socket.socket) -> None:
        while not over.wait(0.002):
            with contextlib.suppress(OSError):
                sock.send(frame)

    with call_in(rig.namespace, raw) as sock:
        thread = threading.Thread(target=knock, args=(sock,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_the_guest_changes_its_mtu(rig: Rig) -> None:
    """The driver opens its channels anew each time; TCP does not notice more than a pause."""
    with rig.traffic():
        for _ in range(TURNS):
            for mtu in (9000, 1500, 576, 1500):
                rig.guest(f"set -e; ip link set eth0 mtu {mtu}; flows 262144")
                assert rig.card()["mtu"] == max(mtu, 1500)
    rig.ping(1472)
    sections_come_back(rig)


def test_the_host_changes_its_mtu(rig: Rig) -> None:
    """What the guest sends by its own MTU is no mistake of its, and arrives."""
    rig.guest("ip link set eth0 mtu 4000")
    with rig.traffic():
        for _ in range(TURNS):
            for mtu in (1500, 9000, 1400, 4000):
                rig.host("ip", "link", "set", rig.tap, "mtu", f"{mtu}")
                wait_for(lambda mtu=mtu: rig.card()["mtu"] == mtu, "the card's MTU")
                rig.guest("flows 262144")
                rig.ping(3972)
    rig.host("ip", "link", "set", rig.tap, "mtu", "1400")
    wait_for(lambda: rig.card()["mtu"] == 1400, "the card's MTU")
    rig.guest("ip link set eth0 mtu 1500; [ $(cat /sys/class/net/eth0/mtu) = 1400 ]")
    rig.ping(1372)
    rig.host("ip", "link", "set", rig.tap, "mtu", "1500")
    wait_for(lambda: rig.card()["mtu"] == 1500, "the card's MTU")
    rig.guest("ip link set eth0 mtu 1500")
    rig.ping(1472)


def test_the_interface_vanishes(rig: Rig) -> None:
    """The guest's link goes down and comes back; connections live on."""
    changes = "cat /sys/class/net/eth0/carrier_changes"
    with rig.traffic():
        for turn in range(1, 1 + TURNS // 2):
            before, vanished = int(rig.guest(changes)), rig.card()["link"]["vanished"]
            rig.host("ip", "link", "del", rig.tap)
            rig.guest(
                f"for i in $(seq 300); do [ $({changes}) -ge {before + 2} ] && break; "
                "sleep 0.1; done; flows 262144"
            )
            assert rig.card()["link"]["vanished"] == vanished + 1, turn
    rig.ping()
    log = rig.backend.child.log.read_text()
    assert "has vanished from the host; the network card has no link" in log
    sections_come_back(rig)


def test_the_driver_goes_and_comes_back(rig: Rig) -> None:
    """With frames for it all the time, and bytes both ways as soon as it is there."""
    with rig.echo() as port, knocking(rig):
        for _ in range(RELOADS):
            rig.guest(RELOAD)
            rig.bring_up()
            rig.guest(there_and_back(port))
    assert "sub channel request failed" not in rig.guest("dmesg")
    channels_are_open(rig)


def test_the_driver_goes_in_the_middle_of_what_it_sends(rig: Rig) -> None:
    """It halts the card first, with large sends in the rings of all channels."""
    with rig.traffic("-b 0"), knocking(rig):
        for _ in range(RELOADS):
            rig.guest(RELOAD)
            rig.bring_up()
            rig.guest("flows 65536")
    channels_are_open(rig)


def channels_are_open(rig: Rig) -> None:
    rig.guest(
        f"for i in $(seq 100); do [ $(ethtool -l eth0 | grep -c 'Combined:.*{QUEUES}') = 2 ] && "
        "exit; sleep 0.1; done; ethtool -l eth0; exit 1"
    )


def test_unplugged_and_plugged_in(rig: Rig, repeated: Repeated) -> None:
    """Under traffic, whose connection waits for the card and goes on."""
    channels_are_open(rig)
    before, kernel = holdings(rig), rig.guest("uname -r").strip()
    turns = repeated(f"{kernel}: a card comes and goes", PLUGS, *watched(rig.machine, rig.backend))
    with rig.traffic("-b 0"), knocking(rig):
        for _ in turns:
            unplug(rig.machine, NET_CHARDEV)
            assert "eth0" not in rig.guest("ls /sys/class/net")
            plug(rig.machine, NET_CHARDEV)
            rig.bring_up()
            rig.guest("flows 65536")
            channels_are_open(rig)
    rig.ping()
    rig.host("ip", "addr", "replace", f"{HOST6}/64", "dev", rig.tap, "nodad")
    channels_are_open(rig)
    assert holdings(rig) == before


@pytest.mark.parametrize("how", ["system_reset", "reboot", "kexec"])
def test_the_guest_starts_again(rig: Rig, how: str) -> None:
    """In the middle of traffic; the back end has what it had, and no more."""
    if how == "kexec":
        plan = rig.machine.plan
        program = PROGRAMS / "kexec_load.py"
        for source in (plan.kernel, plan.initramfs, program):
            copy_in(rig, source, f"/root/{source.name}")
    channels_are_open(rig)
    before, boots = holdings(rig), rig.machine.boots
    with rig.echo() as port:
        with rig.traffic(), knocking(rig):
            if how == "reboot":
                rig.machine.submit("reboot")
            elif how == "kexec":
                files = f"/root/{plan.kernel.name} /root/{plan.initramfs.name}"
                line = '"$(cat /proc/cmdline)"'
                rig.machine.submit(f"python3 /root/{program.name} now {files} {line}")
            else:
                rig.machine.monitor.command("system_reset")
            rig.machine.wait_ready(boots=boots + 1)
            rig.bring_up()
        rig.guest(there_and_back(port))
    rig.ping()
    channels_are_open(rig)
    assert holdings(rig) == before
    sections_come_back(rig)
