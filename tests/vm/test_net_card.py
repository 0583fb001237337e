# SPDX-License-Identifier: GPL-2.0-or-later
"""The stock ``hv_netvsc`` on a card with several queues: what its own tools say and do.

The host's side is a TAP in a network namespace that is made for the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from net_support import namespace_name, require_root
from vm_support import MEBIBYTE, SOAK, MakePlan, plug, unplug

from vhostvmbus.devices.net.link.namespace import call_in
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

MAC = bytes.fromhex("525400000003")
HOST4, GUEST4, HOST6, GUEST6 = "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"
ADDRESSES = (
    f"ip addr add {GUEST4}/24 dev eth0; ip addr add {GUEST6}/64 dev eth0 nodad; "
    "ip link set eth0 up; "
    "for i in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; sleep 0.1; done"
)
NET_CHARDEV = "vmbus1"
"""The second one: the first is the root disk's."""
MODULE = "for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done"


@dataclass(frozen=True)
class Rig:
    """A guest with one card, and where the other end of its cable is."""

    machine: Machine
    namespace: str

    def guest(self, script: str, timeout: float = 120.0) -> str:
        return self.machine.check(script, timeout)

    def host(self, *words: str) -> str:
        """Run a program at the other end of the cable."""
        words = ("nsenter", f"--net=/run/netns/{self.namespace}", *words)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    @property
    def tap(self) -> str:
        """The interface at the other end."""
        names = [line.split()[0] for line in self.host("ip", "-br", "link").splitlines()]
        return next(name for name in names if name.startswith("vmbus"))

    def ping(self, size: int = 56, address: str = HOST4) -> None:
        """Three in a row, none lost. A card that was just set up anew gets time to settle."""
        deadline = time.monotonic() + 15
        while True:
            text = self.machine.run(f"ping -c 3 -i 0.2 -s {size} -M do {address}").stdout.decode()
            if " 0% packet loss" in text:
                return
            assert time.monotonic() < deadline, text

    def counter(self, name: str) -> int:
        """One of the guest's ``/proc/net/snmp``, as ``Udp.InErrors``."""
        group, field = name.split(".")
        head, values = re.findall(rf"^{group}: (.*)$", self.guest("cat /proc/net/snmp"), re.M)
        return int(values.split()[head.split().index(field)])


@pytest.fixture(scope="module", params=images.KERNEL_SERIES)
def rig(request: pytest.FixtureRequest, plan_for: MakePlan, root_template: Path) -> Iterator[Rig]:
    require_root()
    name = namespace_name()
    link = f"netns:{name},mac={MAC.hex(':')},ip={HOST4}/24,ip={HOST6}/64,queues=4"
    plan = plan_for(request.param, root=root_template, networks=[link], smp=4)
    with Machine(plan) as machine:
        machine.wait_ready()
        rig = Rig(machine, name)
        rig.guest(f"{MODULE}; {ADDRESSES}")
        yield rig
        machine.poweroff()


def test_what_ethtool_says(rig: Rig) -> None:
    features = rig.guest("ethtool -k eth0")
    for feature in (
        "tx-checksum-ipv4: on",
        "tx-checksum-ipv6: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "large-receive-offload: on",
        "receive-hashing: on",
        "tx-vlan-offload: on",
    ):
        assert feature in features
    channels = re.findall(r"Combined:\s+(\d+)", rig.guest("ethtool -l eth0"))
    assert channels == ["4", "4"]
    table = rig.guest("ethtool -x eth0")
    entries = re.findall(r"^\s+\d+:((?:\s+\d+)+)$", table, re.M)
    assert [int(word) for line in entries for word in line.split()] == [n % 4 for n in range(128)]
    assert "eth0" in rig.guest("ip link")
    assert MAC.hex(":") in rig.guest("cat /sys/class/net/eth0/address")


@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_ping(rig: Rig, address: str) -> None:
    rig.ping(56, address)
    rig.ping(1472 if address == HOST4 else 1452, address)


def test_a_larger_mtu(rig: Rig) -> None:
    rig.guest("ip link set eth0 mtu 9000")
    rig.ping(8972)
    rig.guest("ethtool -K eth0 lro off")
    rig.ping(8972)
    rig.guest("ethtool -K eth0 lro on; ip link set eth0 mtu 1500")
    rig.ping(1472)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bytes_arrive_as_they_were(rig: Rig, family: socket.AddressFamily) -> None:
    """Both ways at once; the segments that cross are larger than the MTU."""
    size = (256 if SOAK else 32) * MEBIBYTE
    down, up = os.urandom(size), hashlib.sha256()
    before = rig.guest("cat /sys/class/net/eth0/statistics/tx_packets").strip()
    address = HOST4 if family == socket.AF_INET else HOST6

    def listen() -> socket.socket:
        server = socket.create_server((address, 0), family=family)
        server.settimeout(60)
        return server

    with call_in(rig.namespace, listen) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                sender = threading.Thread(target=connection.sendall, args=(down,))
                sender.start()
                while data := connection.recv(1 << 16):
                    up.update(data)
                sender.join()

        thread = threading.Thread(target=serve)
        thread.start()
        target = address if family == socket.AF_INET else f"[{address}]"
        text = rig.guest(
            f"head -c {size} /dev/urandom >/tmp/up; sha256sum </tmp/up; "
            f"socat -t 60 - TCP:{target}:{port} </tmp/up | sha256sum; rm /tmp/up",
            timeout=180,
        )
        thread.join(60)
    sent, received = (line.split()[0] for line in text.splitlines())
    assert received == hashlib.sha256(down).hexdigest()
    assert sent == up.hexdigest()
    after = rig.guest("cat /sys/class/net/eth0/statistics/tx_packets").strip()
    assert int(after) - int(before) < size // 1448


@contextlib.contextmanager
def iperf_server(rig: Rig) -> Iterator[None]:
    words = ["nsenter", f"--net=/run/netns/{rig.namespace}", "iperf3", "--server", "--forceflush"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            while "Server listening" not in server.stdout.readline():
                assert server.poll() is None
            yield
        finally:
            server.kill()


def test_iperf(rig: Rig, record_property: Callable[[str, object], None]) -> None:
    """Each way, each protocol, one stream and four: all of what was sent, in whole seconds."""
    megabits: dict[str, int] = {}
    with iperf_server(rig):
        for address, ways, load in itertools.product(
            (HOST4, HOST6), ("", "--reverse"), ("--parallel 1", "--parallel 4", "--udp -b 10M")
        ):
            text = rig.guest(f"iperf3 --client {address} --json --time 1 {ways} {load}", 60)
            end = json.loads(text)["end"]
            name = f"{'v6' if ':' in address else 'v4'} {ways} {load}"
            if "--udp" in load:
                assert end["sum"]["packets"] > 500
                assert end["sum"]["lost_packets"] < end["sum"]["packets"] // 2, name
                megabits[name] = round(end["sum"]["bits_per_second"] / 1e6)
            else:
                assert end["sum_received"]["bytes"] > MEBIBYTE, name
                megabits[name] = round(end["sum_received"]["bits_per_second"] / 1e6)
    record_property("megabits_per_second", megabits)
    print(f"megabits per second: {megabits}")


def test_bytes_arrive_while_the_link_flaps(rig: Rig) -> None:
    """The host takes its interface down and up all the time; what TCP lost it sends again."""
    size, times = 32 * MEBIBYTE, 32 if SOAK else 1
    data = f"for i in $(seq {times}); do cat /tmp/sent; done"
    changes = "cat /sys/class/net/eth0/carrier_changes"
    before = int(rig.guest(changes))
    digest = hashlib.sha256()

    def listen() -> socket.socket:
        server = socket.create_server((HOST4, 0))
        server.settimeout(60)
        return server

    def receive(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 20):
                digest.update(data)

    over = threading.Event()

    def flap() -> None:
        while not over.wait(0.3):
            rig.host("ip", "link", "set", rig.tap, "down")
            time.sleep(0.2)
            rig.host("ip", "link", "set", rig.tap, "up")
            rig.host("ip", "addr", "replace", f"{HOST6}/64", "dev", rig.tap)

    rig.guest(f"head -c {size} /dev/urandom >/tmp/sent")
    with call_in(rig.namespace, listen) as server:
        port = server.getsockname()[1]
        threads = [threading.Thread(target=flap), threading.Thread(target=receive, args=(server,))]
        for thread in threads:
            thread.start()
        try:
            rig.guest(f"({data}) | ncat --send-only {HOST4} {port}", timeout=600)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
    sent = rig.guest(f"({data}) | sha256sum; rm /tmp/sent").split()[0]
    assert sent == digest.hexdigest()
    assert int(rig.guest(changes)) >= before + 2
    rig.ping()


def test_channels_and_rings_are_changed(rig: Rig) -> None:
    rig.guest("ethtool -L eth0 combined 2")
    rig.ping()
    assert re.findall(r"Combined:\s+(\d+)", rig.guest("ethtool -l eth0")) == ["4", "2"]
    rig.guest("ethtool -X eth0 weight 0 1")
    table = rig.guest("ethtool -x eth0")
    entries = re.findall(r"^\s+\d+:((?:\s+\d+)+)$", table, re.M)
    assert {word for line in entries for word in line.split()} == {"1"}
    rig.ping()
    rig.guest("ethtool -G eth0 rx 300 tx 50")
    assert "RX:\t\t300" in rig.guest("ethtool -g eth0")
    rig.ping(1472)
    rig.guest("ethtool -L eth0 combined 4")
    rig.ping()
    statistics = rig.guest("ethtool -S eth0")
    assert "tx_queue_3_packets" in statistics
    for name in ("tx_too_big", "tx_no_space", "rx_comp_busy", "vlan_error"):
        assert f"{name}: 0\n" in statistics


def test_a_wrong_checksum_is_seen_as_such(rig: Rig) -> None:
    """Written into the TAP as it is: nobody says that it was verified, and the guest looks."""

    def raw() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        name = next(name for _, name in socket.if_nameindex() if name.startswith("vmbus"))
        sock.bind((name, 0))
        return sock

    addresses = socket.inet_aton(HOST4) + socket.inet_aton(GUEST4)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 28 + 8, 1, 0, 64, 17, 0) + addresses
    words = sum(struct.unpack(">10H", header))
    words = (words & 0xFFFF) + (words >> 16)
    header = header[:10] + struct.pack(">H", ~words & 0xFFFF) + header[12:]
    datagram = struct.pack(">HHHH", 4000, 4000, 16, 0xBAD1) + b"wrong..."
    before = rig.counter("Udp.InCsumErrors")
    with call_in(rig.namespace, raw) as sock:
        sock.send(MAC + bytes.fromhex("020000000077") + b"\x08\0" + header + datagram)
    for _ in range(50):
        if rig.counter("Udp.InCsumErrors") > before:
            break
    assert rig.counter("Udp.InCsumErrors") == before + 1


def test_the_driver_goes_and_comes_back(rig: Rig) -> None:
    for _ in range(20 if SOAK else 5):
        # Whoever looks at the interface just now holds the module.
        rig.guest(
            "for i in $(seq 100); do rmmod hv_netvsc 2>/dev/null && break; sleep 0.1; done; "
            f"[ ! -e /sys/class/net/eth0 ] && modprobe hv_netvsc && {MODULE}"
        )
    rig.guest(ADDRESSES)
    rig.ping()
    assert re.findall(r"Combined:\s+(\d+)", rig.guest("ethtool -l eth0")) == ["4", "4"]
    assert "sub channel request failed" not in rig.guest("dmesg")


def test_unplugged_and_plugged_in(rig: Rig) -> None:
    for _ in range(20 if SOAK else 3):
        unplug(rig.machine, NET_CHARDEV)
        assert "eth0" not in rig.guest("ls /sys/class/net")
        plug(rig.machine, NET_CHARDEV)
        rig.guest(f"{MODULE}; {ADDRESSES}")
        rig.ping()


def test_another_back_end_takes_over(rig: Rig) -> None:
    """The card is offered anew: the interface goes and comes back, and works."""
    backend = next(backend for backend in rig.machine.backends if backend.name == "net0")
    before = rig.guest("cat /sys/class/net/eth0/ifindex").strip()
    rig.machine.backends_may_end = True
    backend.kill()
    backend.start()
    rig.machine.backends_may_end = False
    rig.guest(
        "for i in $(seq 300); do index=$(cat /sys/class/net/eth0/ifindex 2>/dev/null); "
        f'[ -n "$index" ] && [ "$index" != {before} ] && exit; sleep 0.1; done; exit 1'
    )
    rig.guest(ADDRESSES)
    rig.ping()
    assert re.findall(r"Combined:\s+(\d+)", rig.guest("ethtool -l eth0")) == ["4", "4"]
