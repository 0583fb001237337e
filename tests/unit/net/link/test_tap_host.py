# SPDX-License-Identifier: GPL-2.0-or-later
"""TAPs as the host sees them: made, found, watched, in a bridge, missing or forbidden."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from tests.support.network import Guest, arp, opened, require_root, udp, wait_for
from tests.support.taps import ALL, GUEST, HOST, MAC, change, interface, make_existing
from vhostvmbus.devices.net.link import LinkDown
from vhostvmbus.devices.net.link import tap as tap_module
from vhostvmbus.devices.net.link.opening import open_link


@pytest.mark.usefixtures("network")
def test_made_as_asked_and_gone_at_the_end() -> None:
    with opened("tap,ip=10.9.0.1/24,ip=fd09::1/64,mtu=4000,queues=3,mac=52:54:00:00:00:01") as link:
        found = interface(link.name)
        assert found is not None
        assert found["up"]
        assert found["mtu"] == link.mtu == 4000
        assert {"10.9.0.1/24", "fd09::1/64"} <= set(found["addresses"])  # type: ignore[call-overload]
        assert link.carrier()
        assert link.queues == 3
        assert link.mac == MAC
        assert found["mac"] == b"\xfe" + MAC[1:]
        assert link.capabilities == ALL
        with opened("tap") as other:
            assert other.name != link.name
    assert interface(link.name) is None


@pytest.mark.usefixtures("network")
def test_carrier_and_mtu_are_watched() -> None:
    with opened("tap") as link:
        guest = Guest(link)
        change(link.name, state="down")
        wait_for(lambda: not link.carrier(), "no carrier")
        wait_for(lambda: guest.changes == 1, "a call")
        assert not guest.send(udp(MAC, MAC, GUEST, HOST, (1, 2), b""))
        change(link.name, state="up")
        wait_for(link.carrier, "the carrier")
        change(link.name, mtu=9000)
        wait_for(lambda: link.mtu == 9000, "the MTU")
        wait_for(lambda: guest.changes == 3, "calls")
        link.set_mtu(1400)
        found = interface(link.name)
        assert found is not None
        assert found["mtu"] == link.mtu == 1400
        with pytest.raises(OSError, match="Invalid argument"):
            link.set_mtu(100000)


@pytest.mark.usefixtures("network")
def test_an_interface_that_vanishes_comes_back() -> None:
    with opened("tap,ip=10.9.0.1/24,queues=2") as link:
        guest = Guest(link)
        link.use_queues(2)
        link.set_mtu(3000)
        number = link.port(0).fileno()
        before = interface(link.name)
        with IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname=link.name)[0])
        # The watch may have said before that there is another MTU.
        wait_for(lambda: guest.carriers[-2:] == [False, True], "lost and made again")
        assert link.port(0).fileno() == number
        assert link.stats()["vanished"] == 1
        found = interface(link.name)
        assert found is not None
        assert before is not None
        assert found["index"] != before["index"]
        assert found["mac"] == before["mac"]
        assert found["mtu"] == 3000
        assert "10.9.0.1/24" in found["addresses"]  # type: ignore[operator]
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")


@pytest.mark.usefixtures("network")
def test_an_existing_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_module, "RETRY", 0.1)
    make_existing("given", multi_queue=True)
    with opened("tap:given,queues=2") as link:
        guest = Guest(link)
        assert (link.name, link.queues) == ("given", 2)
        wait_for(link.carrier, "the carrier")
        with IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname="given")[0])
        wait_for(lambda: not link.carrier(), "no carrier")
        assert guest.receive() is None
        assert not guest.send(udp(MAC, MAC, GUEST, HOST, (1, 2), b""))
        with pytest.raises(LinkDown, match="vanished"):
            link.set_mtu(1600)
        link.use_queues(2)
        time.sleep(0.3)
        assert interface("given") is None  # it is not ours to make
        make_existing("given", multi_queue=True)
        wait_for(link.carrier, "the carrier again")
        assert guest.send(udp(MAC, MAC, GUEST, HOST, (1, 2), b""))
    assert interface("given") is not None  # nor to remove


@pytest.mark.usefixtures("network")
def test_an_existing_one_with_one_queue() -> None:
    make_existing("given", multi_queue=False)
    with opened("tap:given,mtu=2000") as link:
        assert link.queues == 1
        assert link.mtu == 2000
        link.use_queues(1)
        with pytest.raises(LinkDown, match="in use by another program"):
            open_link("tap:given")


@pytest.mark.usefixtures("network")
def test_its_station_address() -> None:
    """Made from the card's, if that is known, but never the same."""
    given = "fe:54:00:00:00:01"
    with opened(f"tap,mac={given}") as same, opened("tap") as one, opened("tap") as other:
        found = [interface(link.name) for link in (same, one, other)]
        addresses = {bytes(each["mac"]) for each in found if each is not None}  # type: ignore[call-overload]
        assert len(addresses) == 3
        assert bytes.fromhex(given.replace(":", "")) not in addresses
        assert {address[0] for address in addresses} == {0xFE}


@pytest.mark.usefixtures("network")
def test_a_bridge_keeps_its_station_address() -> None:
    """It takes the least of its interfaces'."""
    with IPRoute() as route:
        route.link("add", ifname="br9", kind="bridge")
        route.link("add", ifname="first", kind="veth", peer="beyond", address="f2:00:00:00:00:01")
        index = route.link_lookup(ifname="br9")[0]
        route.link("set", index=route.link_lookup(ifname="first")[0], master=index)
    before = interface("br9")
    assert before is not None
    assert before["mac"] == bytes.fromhex("f20000000001")
    for text in ("bridge:br9", "bridge:br9,mac=52:54:00:00:00:01"):
        with opened(text):
            assert interface("br9")["mac"] == before["mac"]  # type: ignore[index]


@pytest.mark.usefixtures("network")
def test_in_a_bridge() -> None:
    with IPRoute() as route:
        route.link("add", ifname="br9", kind="bridge")
        index = route.link_lookup(ifname="br9")[0]
        route.link("set", index=index, mtu=1400, state="up")
    with opened("bridge:br9") as one, opened("tap,bridge=br9") as other:
        for link in (one, other):
            found = interface(link.name)
            assert found is not None
            assert found["master"] == index
            assert found["mtu"] == link.mtu == 1400
        a, b = Guest(one), Guest(other)
        frame = arp(1, MAC, GUEST, bytes(6), HOST)

        def crosses() -> bool:
            a.send(frame)
            received = b.receive()
            return received is not None and received[0] == frame

        wait_for(crosses, "a frame from one card to the other")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bridge:nothere", "no bridge nothere; to make one: ip link add nothere type bridge"),
        ("bridge:lo", "no bridge lo"),
        ("tap:nothere", "no interface nothere; to make it: ip tuntap add dev nothere"),
        ("tap:lo", "it is no TAP"),
    ],
)
def test_what_is_not_there(text: str, words: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LinkDown) as caught:
        open_link(text)
    assert words in str(caught.value)
    with IPRoute() as route:
        names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
    assert not [name for name in names if name.startswith("vmbus") or name == "nothere"]
    assert len(os.listdir("/proc/self/fd")) == len(before)


UNPRIVILEGED = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from vhostvmbus.devices.net.link import LinkDown
from vhostvmbus.devices.net.link.opening import open_link
try:
    open_link(sys.argv[1])
except LinkDown as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tap", ("CAP_NET_ADMIN", "NET=user")),
        ("netns:blue", ("CAP_SYS_ADMIN", "NET=user")),
    ],
)
def test_without_the_right(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    require_root()
    # The package is read before the rights are given up: its folder may be closed to others.
    program = "import vhostvmbus.devices.net.link.tap\n" + UNPRIVILEGED
    done = subprocess.run(
        [sys.executable, "-c", program, text], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if oct(os.stat("/dev/net/tun").st_mode)[-1] != "6" and text == "tap":
        words = ("/dev/net/tun: Permission denied", "NET=user")
    for word in words:
        assert word in done.stdout


def test_no_right_in_the_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> bytes:
        raise PermissionError(1, "Operation not permitted")

    require_root()
    monkeypatch.setattr(fcntl, "ioctl", refused)
    with pytest.raises(LinkDown, match=r"CAP_NET_ADMIN.*NET=tap:tap0.*NET=user"):
        open_link("tap")


@pytest.mark.parametrize(
    ("number", "words"),
    [(2, "there is no /dev/net/tun: load the module"), (13, "be in its group or root")],
)
def test_no_tun_device(number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    really: Callable[..., int] = os.open

    def refused(path: str, flags: int, mode: int = 0o777) -> int:
        if path == "/dev/net/tun":
            raise OSError(number, os.strerror(number), path)
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(LinkDown) as caught:
        open_link("tap")
    assert words in str(caught.value)
    assert "NET=user" in str(caught.value)
