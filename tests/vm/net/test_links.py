# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock guest on each kind of link: one card on user-mode network, one on a TAP.

The host's side is a network namespace without a name, in which the machine runs, with a "world"
that has nobody in it; the TAP is in another namespace.
"""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.machines import MEBIBYTE, MakePlan
from tests.support.network import (
    connect_to_the_world,
    namespace_name,
    namespaces,
    private_network,
    wait_for,
)
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

USER, TAP = "52:54:00:00:00:01", "52:54:00:00:00:02"
CARDS = """\
card() {
    for entry in /sys/class/net/*; do
        [ "$(cat $entry/address)" = "$1" ] && echo "${entry##*/}" && return
    done
    echo "no card $1" >&2
    return 1
}
"""
"""A shell function for the guest: ``card MAC`` prints the interface."""


@dataclass(frozen=True)
class Rig:
    """A guest, and the host's side of its links."""

    machine: Machine
    namespace: str
    pcap: Path
    port: int
    """Of the host's loopback, forwarded to the guest's port 22."""

    def guest(self, script: str, timeout: float = 120.0) -> str:
        return self.machine.check(CARDS + script, timeout)

    def host(self, *words: str) -> str:
        """Run a program on the host's side of the TAP."""
        words = ("nsenter", f"--net=/run/netns/{self.namespace}", *words)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", params=images.KERNEL_SERIES)
def rig(
    request: pytest.FixtureRequest,
    plan_for: MakePlan,
    root_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    pcap = tmp_path_factory.mktemp("net") / "tap.pcapng"
    name = namespace_name()
    with private_network():
        connect_to_the_world()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        links = [
            f"user,mac={USER},hostfwd=tcp:{port}:22",
            f"netns:{name},mac={TAP},ip=10.9.0.1/24,ip=fd09::1/64,pcap={pcap}",
        ]
        with Machine(plan_for(request.param, root=root_template, networks=links)) as machine:
            machine.wait_ready()
            rig = Rig(machine, name, pcap, port)
            rig.guest(
                f"tap=$(card {TAP}) && ip link set $tap up && ip addr add 10.9.0.2/24 dev $tap && "
                "ip addr add fd09::2/64 dev $tap nodad"
            )
            yield rig
            machine.poweroff()
        assert name not in namespaces()


@contextlib.contextmanager
def serving(data: bytes) -> Iterator[int]:
    """A server on the host's loopback that gives *data* to the first caller; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_an_address_by_dhcp_and_a_fetch(rig: Rig) -> None:
    rig.guest("/run/vhostvmbus/network wait 60")
    text = rig.guest(f"ip -4 -br addr show $(card {USER}); ip route")
    assert "192.0.2.2/24" in text
    assert "default via 192.0.2.1" in text
    data = os.urandom(4 * MEBIBYTE)
    with serving(data) as port:
        text = rig.guest(f"socat -u TCP:192.0.2.1:{port} - | sha256sum")
    assert text.split()[0] == hashlib.sha256(data).hexdigest()


def test_a_forwarded_port(rig: Rig) -> None:
    rig.guest("/run/vhostvmbus/network wait 60")
    data = os.urandom(MEBIBYTE)
    rig.guest(
        "timeout 60 socat -u TCP-LISTEN:22 CREATE:/tmp/received & "
        "until ss -ltn | grep -q :22; do sleep 0.1; done"
    )
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the guest has it all
    text = rig.guest("sha256sum </tmp/received; rm /tmp/received")
    assert text.split()[0] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("address", ["10.9.0.{}", "fd09::{}"], ids=["v4", "v6"])
@pytest.mark.parametrize("size", [56, 1400])
def test_ping(rig: Rig, address: str, size: int) -> None:
    assert " 0% packet loss" in rig.guest(f"ping -c 3 -i 0.2 -s {size} {address.format(1)}")
    assert " 0% packet loss" in rig.host(
        "ping", "-c", "3", "-i", "0.2", "-s", f"{size}", address.format(2)
    )


def test_the_recording_and_the_guests_own_agree(rig: Rig) -> None:
    rig.guest(
        f"timeout 60 tcpdump -i $(card {TAP}) -w /tmp/guest.pcap -U 'icmp[icmptype] == icmp-echo "
        "or icmp[icmptype] == icmp-echoreply' >/dev/null 2>/tmp/tcpdump & "
        "until grep -q listening /tmp/tcpdump; do sleep 0.1; done; "
        "ping -c 5 -i 0.2 -p 766d627573766d62 10.9.0.1 >/dev/null; "
        "for i in $(seq 50); do [ $(tcpdump -nn -r /tmp/guest.pcap 2>/dev/null | wc -l) = 10 ] "
        "&& break; sleep 0.1; done; pkill tcpdump; wait"
    )
    text = rig.guest("tcpdump -nn -r /tmp/guest.pcap 2>/dev/null | grep -c 'ICMP echo'")
    assert text.strip() == "10"
    recorded = rig.pcap.read_bytes()
    assert recorded.count(b"vmbusvmb" * 5) == 10


def test_a_flap(rig: Rig) -> None:
    lines = rig.host("ip", "-br", "link").splitlines()
    (name,) = [line.split()[0] for line in lines if line.startswith("vmbus")]
    for state, carrier in (("down", "0"), ("up", "1"), ("down", "0"), ("up", "1")):
        rig.host("ip", "link", "set", name, state)
        rig.guest(
            f"for i in $(seq 100); do [ $(cat /sys/class/net/$(card {TAP})/carrier) = {carrier} ] "
            "&& exit; sleep 0.1; done; exit 1"
        )
    assert " 0% packet loss" in rig.guest("ping -c 3 -i 0.2 10.9.0.1")
    # Gone altogether, it is made again.
    rig.host("ip", "link", "del", name)
    rig.guest("for i in $(seq 100); do ping -c 1 -W 1 10.9.0.1 >/dev/null && exit; done; exit 1")


def test_passt_killed(rig: Rig) -> None:
    rig.guest("/run/vhostvmbus/network wait 60")
    backend = next(b for b in rig.machine.backends if b.name == "net0")
    (pid,) = [
        int(pid)
        for task in Path(f"/proc/{backend.child.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    changes = f"cat /sys/class/net/$(card {USER})/carrier_changes"
    before = int(rig.guest(changes))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: int(rig.guest(changes)) >= before + 2, "down and up again", 30)
    with serving(b"still there\n") as port:
        assert "still there" in rig.guest(f"socat -u TCP:192.0.2.1:{port} -")


def test_the_tap_is_in_its_namespace_only(rig: Rig) -> None:
    here = subprocess.check_output(["ip", "-br", "link"], text=True)
    assert "world" in here
    assert "vmbus" not in here
    assert "vmbus" in rig.host("ip", "-br", "link")
