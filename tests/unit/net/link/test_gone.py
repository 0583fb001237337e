# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TAP is in vanishes: its bridge, the name of its network namespace."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute, netns

from tests.support.network import (
    Guest,
    arp,
    namespace_name,
    namespaces,
    private_network,
    require_root,
    wait_for,
)
from vhostvmbus.devices.net.link import Link
from vhostvmbus.devices.net.link.namespace import NAMES, RECORDS, call_in
from vhostvmbus.devices.net.link.opening import open_link

HOST, GUEST = bytes([10, 9, 0, 1]), bytes([10, 9, 0, 2])
MAC = bytes.fromhex("525400000001")


@pytest.fixture
def network() -> Iterator[None]:
    with private_network():
        yield


@contextlib.contextmanager
def opened(text: str) -> Iterator[Link]:
    with contextlib.closing(open_link(text)) as link:
        yield link


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def master(name: str) -> int | None:
    """The index of the bridge that the interface *name* is in."""
    with IPRoute() as route:
        (state,) = route.get_links(route.link_lookup(ifname=name)[0])
        found: int | None = state.get_attr("IFLA_MASTER")
        return found


def index_of(name: str) -> int:
    with IPRoute() as route:
        return int(route.link_lookup(ifname=name)[0])


@pytest.mark.usefixtures("network")
def test_a_bridge_that_vanishes(caplog: pytest.LogCaptureFixture) -> None:
    """No link until there is one of that name again, which gets the interface."""
    ip("link", "add", "br9", "type", "bridge")
    with opened("bridge:br9") as link:
        guest = Guest(link)
        for turn in range(1, 4):
            ip("link", "del", "br9")
            wait_for(lambda: not link.carrier(), "no carrier")
            wait_for(lambda turn=turn: guest.changes == 2 * turn - 1, "a call")  # type: ignore[misc]
            assert link.stats()["vanished"] == turn
            ip("link", "add", "br9", "mtu", f"{1500 + turn}", "type", "bridge")
            ip("link", "set", "br9", "up")
            wait_for(link.carrier, "the carrier")
            assert master(link.name) == index_of("br9")
            wait_for(lambda turn=turn: link.mtu == 1500 + turn, "the bridge's MTU")  # type: ignore[misc]
            guest.changes = 2 * turn
        text = [record.message for record in caplog.records]
        assert text.count("bridge br9 has vanished; the network card has no link") == 3


@pytest.mark.usefixtures("network")
def test_another_thing_of_the_bridges_name() -> None:
    ip("link", "add", "br9", "type", "bridge")
    with opened("bridge:br9") as link:
        Guest(link)
        ip("link", "del", "br9")
        ip("link", "add", "br9", "type", "veth", "peer", "other")
        wait_for(lambda: not link.carrier(), "no carrier")
        ip("link", "del", "br9")
        ip("link", "add", "br9", "type", "bridge")
        wait_for(link.carrier, "the carrier")


@pytest.mark.usefixtures("network")
def test_taken_out_of_its_bridge_by_hand() -> None:
    """That is the administrator's business."""
    ip("link", "add", "br9", "type", "bridge")
    with opened("bridge:br9") as link:
        guest = Guest(link)
        ip("link", "set", link.name, "nomaster")
        ip("link", "set", link.name, "mtu", "1400")
        wait_for(lambda: guest.changes == 1, "a call")
        assert link.mtu == 1400
        assert link.carrier()
        assert master(link.name) is None


@pytest.mark.usefixtures("network")
def test_interface_and_bridge_vanish(caplog: pytest.LogCaptureFixture) -> None:
    ip("link", "add", "br9", "type", "bridge")
    with opened("tap,bridge=br9") as link:
        Guest(link)
        ip("link", "del", "br9")
        # Of two that go between two looks at them, only the interface is missed.
        wait_for(lambda: link.stats()["vanished"] == 1, "the bridge has vanished")
        ip("link", "del", link.name)
        wait_for(lambda: link.stats()["vanished"] == 2, "both have vanished")
        assert not link.carrier()
        ip("link", "add", "br9", "type", "bridge")
        wait_for(link.carrier, "the carrier")
        assert master(link.name) == index_of("br9")


def test_the_namespace_loses_its_name() -> None:
    """It lives on with the card in it, and what is made anew is made there."""
    require_root()
    name = namespace_name()
    with opened(f"netns:{name},ip=10.9.0.1/24") as link:
        guest = Guest(link)
        inside = os.open(NAMES / name, os.O_RDONLY)
        netns.remove(name)
        netns.create(name)  # another's
        try:
            link.set_mtu(3000)
            wait_for(lambda: link.mtu == 3000, "the MTU")
            for turn in (1, 2):
                request = arp(1, MAC, GUEST, bytes(6), HOST)
                wait_for(lambda request=request: guest.send(request), "it is there")  # type: ignore[misc]
                guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
                call_in(f"/proc/self/fd/{inside}", lambda: ip("link", "del", link.name))
                wait_for(lambda turn=turn: link.stats()["vanished"] == turn, "it has vanished")  # type: ignore[misc]
                wait_for(link.carrier, "the carrier")
                assert link.mtu == 3000
        finally:
            os.close(inside)
            link.close()
            assert name in namespaces()
            netns.remove(name)
    assert not (RECORDS / name).exists()
