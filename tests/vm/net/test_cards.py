# SPDX-License-Identifier: GPL-2.0-or-later
"""Several cards in one stock guest, each on a link of its own.

Two are in a bridge of the host, and one of these is in a network namespace of the guest: so the
guest talks to itself through the host, also in virtual networks (802.1Q), which the host need not
know. The host's side is a network namespace without a name, in which the machine runs.
"""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import MakePlan, device_of, plug, unplug
from tests.support.net_rig import there_and_back, trouble
from tests.support.network import connect_to_the_world, private_network, wait_for
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

NEAR, FAR, SMALL, USER = (f"52:54:00:00:00:0{number}" for number in range(1, 5))
LINKS = (
    f"tap,bridge=br9,mac={NEAR}",
    f"bridge:br9,mac={FAR}",
    f"tap,ip=10.9.3.1/24,mtu=1400,mac={SMALL}",
    f"user,mac={USER}",
)
CARDS = """\
card() {
    for try in $(seq 100); do
        for entry in /sys/class/net/*; do
            [ -e $entry/device ] && [ "$(cat $entry/address)" = "$1" ] || continue
            echo "${entry##*/}"
            return
        done
        sleep 0.1
    done
    echo "no card $1" >&2
    return 1
}
carrier() {
    for try in $(seq 100); do
        [ "$(cat /sys/class/net/$(card $1)/carrier)" = $2 ] && return
        sleep 0.1
    done
    ip link >&2
    return 1
}
far() {
    ip netns exec far "$@"
}
"""
"""Shell functions for the guest: ``card MAC`` prints the interface; ``carrier MAC 0|1`` waits;
``far COMMAND`` runs it where the far card is."""
FAR_END = f"""
set -e
name=$(card {FAR})
ip netns add far 2>/dev/null || true
ip link set $name netns far
far ip link set $name name eth0
far ip addr add 10.9.1.2/24 dev eth0
far ip link set lo up
far ip link set eth0 up
"""
ECHO = "far socat TCP6-LISTEN:7,fork,reuseaddr,ipv6only=0 EXEC:cat >/dev/null 2>&1 </dev/null & "


class Rig:
    """The guest, and the host's side of its links."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def guest(self, script: str, timeout: float = 120.0) -> str:
        return self.machine.check(CARDS + script, timeout)

    def card(self, number: int) -> dict[str, Any]:
        backend = next(b for b in self.machine.backends if b.name == f"net{number}")
        found: dict[str, Any] = read_statistics(backend.socket)["device"]
        return found

    def log(self, number: int) -> str:
        backend = next(b for b in self.machine.backends if b.name == f"net{number}")
        return backend.child.log.read_text()


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def make_bridge() -> None:
    ip("link", "add", "br9", "type", "bridge")
    ip("link", "set", "br9", "up")


@pytest.fixture(scope="module", params=images.KERNEL_SERIES)
def rig(request: pytest.FixtureRequest, plan_for: MakePlan, root_template: Path) -> Iterator[Rig]:
    with private_network():
        connect_to_the_world()
        make_bridge()
        plan = plan_for(request.param, root=root_template, networks=LINKS, smp=2)
        with Machine(plan) as machine:
            machine.wait_ready()
            rig = Rig(machine)
            rig.guest(
                f"{FAR_END} near=$(card {NEAR}); ip addr add 10.9.1.1/24 dev $near; "
                f"ip link set $near up; small=$(card {SMALL}); ip link set $small up; "
                f"ip addr add 10.9.3.2/24 dev $small; {ECHO}"
            )
            yield rig
            assert trouble(machine) == []
            assert [rig.card(number)["errors"] for number in range(len(LINKS))] == [{}] * 4
            machine.poweroff()


def ping(address: str, size: int = 56) -> str:
    return (
        f"for try in $(seq 20); do ping -c 2 -i 0.2 -W 1 -M do -s {size} {address} | "
        "grep -q ' 0% packet loss' && break; [ $try -lt 20 ] || exit 1; done; "
    )


def user_works(rig: Rig) -> None:
    """The card with user-mode network fetches something from the host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"hello\n")

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        assert rig.guest(f"socat -u TCP:192.0.2.1:{port} -") == "hello\n"
        thread.join()


def test_each_works_for_itself(rig: Rig) -> None:
    rig.guest("/run/vhostvmbus/network wait 60")
    rig.guest(
        ping("10.9.1.2", 1472) + ping("10.9.3.1", 1372) + there_and_back(7, address="10.9.1.2")
    )
    user_works(rig)
    rig.guest(f"[ $(cat /sys/class/net/$(card {SMALL})/mtu) = 1400 ]")
    assert [rig.card(number)["mtu"] for number in range(4)][:3] == [1500, 1500, 1400]


def test_one_goes_and_the_others_stay(rig: Rig) -> None:
    """By its link, and then by its device."""
    name = rig.card(2)["link"]["name"]
    ip("link", "set", name, "down")
    rig.guest(f"carrier {SMALL} 0 && carrier {NEAR} 1 && carrier {USER} 1; " + ping("10.9.1.2"))
    chardev = "vmbus3"  # the root disk's is the first
    assert device_of(rig.machine, chardev)
    unplug(rig.machine, chardev)
    user_works(rig)
    rig.guest(ping("10.9.1.2"))
    ip("link", "set", name, "up")
    plug(rig.machine, chardev)
    rig.guest(
        f"small=$(card {SMALL}); ip link set $small up; ip addr add 10.9.3.2/24 dev $small; "
        + ping("10.9.3.1")
    )


def test_their_bridge_vanishes(rig: Rig) -> None:
    """Both links go down, and come back with the bridge; a connection lives on."""
    rig.guest(
        "(while sleep 0.05; do echo tick; done) | socat -t 60 - TCP:10.9.1.2:7 "
        ">/tmp/ticks 2>/dev/null & echo $! >/tmp/ticks.pid; "
        "for try in $(seq 100); do [ -s /tmp/ticks ] && exit; sleep 0.1; done; exit 1"
    )
    ip("link", "del", "br9")
    try:
        rig.guest(
            f"carrier {NEAR} 0 && carrier {SMALL} 1 && for try in $(seq 100); do "
            "[ $(far cat /sys/class/net/eth0/carrier) = 0 ] && exit; sleep 0.1; done; exit 1"
        )
        for number in (0, 1):
            assert "bridge br9 has vanished; the network card has no link" in rig.log(number)
            assert not rig.card(number)["connected"]
    finally:
        make_bridge()
    rig.guest(
        f"carrier {NEAR} 1; size=$(stat -c %s /tmp/ticks); for try in $(seq 300); do "
        "[ $(stat -c %s /tmp/ticks) -gt $((size + 100)) ] && break; sleep 0.1; done; "
        "[ $try -lt 300 ] && kill $(cat /tmp/ticks.pid)"
    )
    wait_for(lambda: all(rig.card(number)["connected"] for number in (0, 1)), "both are there")
    rig.guest(ping("10.9.1.2"))


# -- 802.1Q ----------------------------------------------------------------------------------------

TAGGED = ("10.9.7.2", "fd07::2")
SIX = "[fd07::2]"


@pytest.fixture
def tagged(rig: Rig) -> Iterator[Rig]:
    """Virtual network 7 at both ends. (One in another is more than the driver can: of a tag in a
    frame and one beside it, it leaves out the latter.)"""

    def both(run: str, parent: str, number: int) -> str:
        return "".join(
            f"{run} ip {words}; "
            for words in (
                f"link add link {parent} name seven type vlan id 7 egress-qos-map 0:5",
                f"addr add 10.9.7.{number}/24 dev seven",
                f"addr add fd07::{number}/64 dev seven nodad",
                "link set seven up",
            )
        )

    rig.guest("set -e; modprobe 8021q; " + both("", f"$(card {NEAR})", 1) + both("far", "eth0", 2))
    yield rig
    rig.guest(
        "ip link del seven; far ip link del seven; "
        # Linux switches it off, and keeps it off, as long as there is a virtual network.
        f"ethtool -K $(card {NEAR}) lro on; ethtool -S $(card {NEAR}) | grep -q 'vlan_error: 0'"
    )


def test_tagged_packets_of_every_size(tagged: Rig) -> None:
    """Up to 1500 bytes behind the tag."""
    for address in TAGGED:
        for size in (0, 56, 1452 if ":" in address else 1472):
            tagged.guest(ping(address, size))


def test_the_tag_arrives_as_it_was(tagged: Rig) -> None:
    text = tagged.guest(
        "far timeout 30 tcpdump -c 1 -e -nn -i eth0 'vlan 7 and icmp' 2>/dev/null >/tmp/seen & "
        "for try in $(seq 100); do [ -s /tmp/seen ] && break; ping -c 1 -W 1 10.9.7.2 >/dev/null; "
        "sleep 0.1; done; cat /tmp/seen"
    )
    assert "vlan 7, p 5, ethertype IPv4" in text


def test_tagged_bytes_there_and_back(tagged: Rig) -> None:
    """Large segments cross whole, with their tags; and without offloads, as frames."""
    before = [tagged.card(number)["large_sends"] for number in (0, 1)]
    for address in (TAGGED[0], SIX):
        tagged.guest(there_and_back(7, 4 << 20, address))
    after = [tagged.card(number)["large_sends"] for number in (0, 1)]
    assert min(now - then for now, then in zip(after, before, strict=True)) > 50
    for feature in ("rx", "tx", "tso", "gro"):
        tagged.guest(f"ethtool -K $(card {NEAR}) {feature} off")
        tagged.guest(
            there_and_back(7, 1 << 20, TAGGED[0]) + " && " + there_and_back(7, 1 << 20, SIX)
        )
        tagged.guest(f"ethtool -K $(card {NEAR}) {feature} on")


def test_what_the_driver_fixes(tagged: Rig) -> None:
    """Linux has no way to keep hv_netvsc from having tags beside the frame."""
    features = tagged.guest(f"ethtool -k $(card {NEAR})")
    assert "rx-vlan-offload: on [fixed]" in features
    assert "tx-vlan-offload: on [fixed]" in features
