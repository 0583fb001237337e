# SPDX-License-Identifier: GPL-2.0-or-later
"""The stock ``hv_netvsc`` on a card with several queues: what its own tools say and do."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.machines import MEBIBYTE, plug, unplug
from tests.support.net_rig import ADDRESSES, GUEST4, HOST4, HOST6, MAC, NET_CHARDEV, Rig, trouble
from tests.support.soak import times
from vhostvmbus.devices.net.link.namespace import call_in

LOADS = ("--parallel 1", "--parallel 4", "--udp -b 10M", "--udp -b 3M --parallel 4")


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
    size = times(32, 256) * MEBIBYTE
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


def test_iperf(rig: Rig, record_property: Callable[[str, object], None]) -> None:
    """Each way, each protocol, one stream and four: all of what was sent, in whole seconds."""
    megabits: dict[str, int] = {}
    for address, ways, load in itertools.product((HOST4, HOST6), ("", "--reverse"), LOADS):
        end = rig.iperf(address, f"{ways} {load}")
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
    """The host takes its interface down and up; what TCP lost it sends again."""
    size, count = 32 * MEBIBYTE, times(12, 100)
    changes = "cat /sys/class/net/eth0/carrier_changes"
    before = int(rig.guest(changes))
    received: list[str] = []  # the digest of each time

    def listen() -> socket.socket:
        server = socket.create_server((HOST4, 0))
        server.settimeout(60)
        return server

    def receive(server: socket.socket) -> None:
        connection, _ = server.accept()
        connected.set()
        with connection, connection.makefile("rb", 1 << 20) as stream:
            while data := stream.read(size):
                received.append(hashlib.sha256(data).hexdigest())

    over, connected = threading.Event(), threading.Event()

    def flap() -> None:
        connected.wait(60)  # while the link is down there is no route to connect by
        pause = 0.3
        while not over.wait(pause):
            rig.host("ip", "link", "set", rig.tap, "down")
            time.sleep(0.3)
            rig.host("ip", "link", "set", rig.tap, "up")
            rig.host("ip", "addr", "replace", f"{HOST6}/64", "dev", rig.tap)
            pause = 8.0  # Linux takes 2 seconds for each change, one after the other

    sent = rig.guest(f"head -c {size} /dev/urandom >/tmp/sent; sha256sum </tmp/sent").split()[0]
    with call_in(rig.namespace, listen) as server:
        port = server.getsockname()[1]
        threads = [threading.Thread(target=flap), threading.Thread(target=receive, args=(server,))]
        for thread in threads:
            thread.start()
        try:
            rig.guest(
                f"for i in $(seq {count}); do cat /tmp/sent; done | "
                f"ncat --send-only {HOST4} {port}; rm /tmp/sent",
                timeout=600,
            )
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
    assert received == [sent] * count
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


def replace_back_end(rig: Rig) -> None:
    backend = next(backend for backend in rig.machine.backends if backend.name == "net0")
    rig.machine.backends_may_end = True
    backend.kill()
    backend.start()
    rig.machine.backends_may_end = False


def test_another_back_end_takes_over(rig: Rig) -> None:
    """The card is offered anew: the interface goes and comes back, and works."""
    before = rig.guest("cat /sys/class/net/eth0/ifindex").strip()
    replace_back_end(rig)
    rig.guest(
        "for i in $(seq 300); do index=$(cat /sys/class/net/eth0/ifindex 2>/dev/null); "
        f'[ -n "$index" ] && [ "$index" != {before} ] && exit; sleep 0.1; done; exit 1'
    )
    rig.guest(ADDRESSES)
    rig.ping()
    assert re.findall(r"Combined:\s+(\d+)", rig.guest("ethtool -l eth0")) == ["4", "4"]


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5, 2.5])
def test_unplugged_while_another_back_end_takes_over(rig: Rig, seconds: float) -> None:
    """At any moment of what the new one has to do before it can offer the card anew."""
    rig.guest("dmesg -C")
    with rig.traffic("-b 0"):
        replace_back_end(rig)
        time.sleep(seconds)
        unplug(rig.machine, NET_CHARDEV)
        assert "eth0" not in rig.guest("ls /sys/class/net")
    plug(rig.machine, NET_CHARDEV)
    rig.bring_up()
    # The TAP went with the old one, and the connections with its addresses.
    with rig.traffic("-b 0"):
        rig.guest("flows 65536")
    refused = "nvsp_rndis_pkt_complete error status: 2"  # what the old one had taken
    assert [line for line in trouble(rig.machine) if refused not in line] == []
