# SPDX-License-Identifier: GPL-2.0-or-later
"""In a virtual machine: ``iperf3`` over our network card beside QEMU's own virtio-net (without
vhost), each on a TAP, both in one machine and one network namespace.

They take turns within each round, in the opposite order every other round; the figure is the
median of the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyroute2 import IPRoute, netns

from benchmarks.table import Table
from vhostvmbus.devices.net.link.namespace import Namespace
from vhostvmbus.vm import images
from vhostvmbus.vm.accel import choose
from vhostvmbus.vm.machine import Machine, Plan

ROUNDS = 3
OURS, VIRTIO = "ours", "virtio"
MAC = {OURS: "52:54:00:00:00:01", VIRTIO: "52:54:00:00:00:02"}
SUBNET = {OURS: "10.9.0", VIRTIO: "10.8.0"}
SMALL = 18
"""Bytes of UDP that make a frame of 60, the smallest; 64 with its check sequence."""
PATIENCE = 60.0


@dataclass(frozen=True)
class Pattern:
    """One way of running iperf3. ``unit`` is that of the figure."""

    title: str
    words: str
    unit: str


PATTERNS = tuple(
    Pattern(f"{title}, {where}", f"{words}{way}", unit)
    for title, words, unit in (
        ("TCP, 1 stream", "--parallel 1", "Mbit/s"),
        ("TCP, 4 streams", "--parallel 4", "Mbit/s"),
        ("UDP, 1448 bytes", "--udp -b 0 -l 1448", "Mbit/s"),
        ("UDP, frames of 64 bytes", f"--udp -b 0 -l {SMALL}", "packets/s"),
    )
    for where, way in (("to the host", ""), ("to the guest", " --reverse"))
)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and the processes it starts, in a network namespace that is made for it."""
    namespace = Namespace(name)
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()
        namespace.close()


@contextmanager
def iperf_server() -> Iterator[None]:
    """For every client that comes."""
    words = ["iperf3", "--server", "--forceflush"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            while "Server listening" not in server.stdout.readline():
                if server.poll() is not None:
                    raise RuntimeError("iperf3 did not start")
            yield
        finally:
            server.kill()


def plan() -> Plan:
    """A machine with both cards."""
    kernel = images.find_kernel("6.12")
    tap = "tap,id=other,ifname=other,script=no,downscript=no,vhost=off"
    return Plan(
        qemu=images.qemu_binary(),
        kernel=kernel.image,
        initramfs=images.find_initramfs(kernel),
        accel=choose("auto").name,
        root=images.root_template(),
        append="vhostvmbus.dhcp=0",
        networks=(f"tap,mac={MAC[OURS]},ip={SUBNET[OURS]}.1/24",),
        extra=(
            "-netdev",
            tap,
            "-device",
            f"virtio-net-pci,netdev=other,romfile=,mac={MAC[VIRTIO]}",
        ),
    )


def connect(machine: Machine) -> None:
    """Addresses at both ends of both cables."""
    with IPRoute() as route:
        index = route.link_lookup(ifname="other")[0]
        route.addr("add", index=index, address=f"{SUBNET[VIRTIO]}.1", prefixlen=24)
        route.link("set", index=index, state="up")
    machine.check("modprobe virtio_pci; modprobe virtio_net")
    for name, mac in MAC.items():
        machine.check(
            "for i in $(seq 100); do for card in /sys/class/net/*; do "
            f'[ "$(cat $card/address)" = {mac} ] || continue; card=${{card##*/}}; '
            f"ip addr add {SUBNET[name]}.2/24 dev $card; ip link set $card up; "
            f"ping -c 1 -w 20 {SUBNET[name]}.1 && exit; done; sleep 0.1; done; exit 1"
        )


def run(machine: Machine, name: str, pattern: Pattern, seconds: float) -> float:
    """One run; its figure."""
    text = machine.check(
        f"iperf3 --client {SUBNET[name]}.1 --json --time {max(1, round(seconds))} {pattern.words}",
        PATIENCE + seconds,
    )
    end = json.loads(text)["end"]
    if "--udp" not in pattern.words:
        return float(end["sum_received"]["bits_per_second"]) / 1e6
    total = end["sum"]
    arrived = (total["packets"] - total["lost_packets"]) / total["seconds"]
    return float(arrived * 1448 * 8 / 1e6 if pattern.unit == "Mbit/s" else arrived)


def tables(seconds: float) -> Iterator[Table]:
    """The table of this benchmark."""
    table = Table(
        "In a virtual machine: iperf3 over our network card and over QEMU's virtio-net",
        ("load", "unit", "ours", "virtio-net", "ratio", "rounds apart"),
        notes=["a TAP each, checksum and segmentation offloads on; UDP: what arrived"],
    )
    if os.geteuid() != 0:
        print("net_vm is left out: it makes TAPs in a network namespace, as root", file=sys.stderr)
        return
    with inside(f"vhostvmbus-bench-{os.getpid()}"), Machine(plan()) as machine:
        machine.wait_ready()
        connect(machine)
        with iperf_server():
            for pattern in PATTERNS:
                print(f"  {pattern.title} ...", file=sys.stderr, flush=True)
                figures: dict[str, list[float]] = {OURS: [], VIRTIO: []}
                for number in range(ROUNDS):
                    for name in (OURS, VIRTIO) if number % 2 == 0 else (VIRTIO, OURS):
                        figures[name].append(run(machine, name, pattern, seconds))
                ours, virtio = (statistics.median(figures[name]) for name in (OURS, VIRTIO))
                apart = max((max(runs) - min(runs)) / statistics.median(runs)
                            for runs in figures.values())  # fmt: skip
                table.add(pattern.title, pattern.unit, ours, virtio, ours / virtio, f"{apart:.0%}")
        machine.poweroff()
    yield table
