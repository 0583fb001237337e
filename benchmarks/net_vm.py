# SPDX-License-Identifier: GPL-2.0-or-later
"""In a virtual machine: ``iperf3`` over our network card beside QEMU's own virtio-net (without
vhost), each on a TAP, both in one machine and one network namespace; with one queue each, and with
one for each of the guest's processors.

They take turns within each round, in the opposite order every other round. The figures are medians;
the ratio is the median of the rounds' ratios, since one round's two runs have the same neighbours.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pyroute2 import IPRoute, netns

from benchmarks.guest import plain_guest
from benchmarks.table import Table
from vhostvmbus.devices.net.link.namespace import Namespace
from vhostvmbus.vm.machine import Machine, MachinePlan

KERNEL = "6.12"
ROUNDS = 9
OURS, VIRTIO = "ours", "virtio"
MAC = {OURS: "52:54:00:00:00:01", VIRTIO: "52:54:00:00:00:02"}
SUBNET = {OURS: "10.9.0", VIRTIO: "10.8.0"}
SMALL = 18
"""The bytes of UDP that make a frame of 60, the smallest; 64 with its check sequence."""
QUEUES = (1, 2)
"""The numbers of queues of both cards; the last is the number of the guest's processors."""
PATIENCE = 20.0
TRIES = 3


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
    """Puts this thread, and the processes it starts, into a network namespace made for it."""
    namespace = Namespace(name)
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()
        namespace.close()


@contextmanager
def iperf_server() -> Iterator[None]:
    """Runs an iperf3 server for one client."""
    words = ["iperf3", "--server", "--one-off", "--forceflush"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            while "Server listening" not in server.stdout.readline():
                if server.poll() is not None:
                    raise RuntimeError("iperf3 did not start")
            yield
        finally:
            server.kill()


def plan() -> MachinePlan:
    """Returns the plan of a guest with both cards.

    Call it outside of the namespace: what is missing is fetched.
    """
    queues = QUEUES[-1]
    tap = f"tap,id=other,ifname=other,script=no,downscript=no,vhost=off,queues={queues}"
    virtio = f"netdev=other,romfile=,mq=on,vectors={2 * queues + 2},mac={MAC[VIRTIO]}"
    return replace(
        plain_guest(KERNEL),
        append="vhostvmbus.dhcp=0",
        smp=queues,
        networks=(f"tap,mac={MAC[OURS]},ip={SUBNET[OURS]}.1/24",),
        extra=(
            "-netdev",
            tap,
            "-device",
            f"virtio-net-pci,{virtio}",
        ),
    )


def connect(machine: Machine) -> None:
    """Sets addresses at both ends of both cables; in the guest the cards are called as in here."""
    with IPRoute() as route:
        index = route.link_lookup(ifname="other")[0]
        route.addr("add", index=index, address=f"{SUBNET[VIRTIO]}.1", prefixlen=24)
        route.link("set", index=index, state="up")
    machine.check("modprobe virtio_pci; modprobe virtio_net")
    for name, mac in MAC.items():
        machine.check(
            "for i in $(seq 100); do for card in /sys/class/net/*; do "
            f'[ "$(cat $card/address)" = {mac} ] || continue; card=${{card##*/}}; '
            f"ip link set $card down; ip link set $card name {name}; "
            f"ip addr add {SUBNET[name]}.2/24 dev {name}; ip link set {name} up; "
            f"{reached(name)} && exit; done; sleep 0.1; done; exit 1"
        )


def reached(name: str) -> str:
    """Returns the guest's command that waits until a card is connected."""
    return f"ping -c 1 -w 20 {SUBNET[name]}.1"


def use_queues(machine: Machine, count: int) -> None:
    """Has both cards use ``count`` queues."""
    for name in MAC:
        now = f"ethtool -l {name} | awk '/Combined/ {{ n = $2 }} END {{ print n }}'"
        machine.check(
            f'[ "$({now})" = {count} ] || ethtool -L {name} combined {count}; '
            f'[ "$({now})" = {count} ] && {reached(name)}'
        )


def iperf_client(machine: Machine, name: str, pattern: Pattern, seconds: int) -> str:
    """Returns what iperf3 reports.

    Client and server of iperf3 3.12 may wait for each other at the end of several streams to the
    client, over any card (seen once in 30 to 100 runs): so there is another try.
    """
    words = f"--client {SUBNET[name]}.1 --json --time {seconds} {pattern.words}"
    for _ in range(TRIES):
        with iperf_server():
            result = machine.run(
                f"timeout {PATIENCE + seconds:.0f} iperf3 {words}", 2 * PATIENCE + seconds
            )
        if result.status == 0:
            return result.stdout.decode()
    raise RuntimeError(f"iperf3 {words}: {result}")


def run(machine: Machine, name: str, pattern: Pattern, seconds: float) -> float:
    """Does one run. Returns its figure."""
    end = json.loads(iperf_client(machine, name, pattern, max(1, round(seconds))))["end"]
    arrived = end["sum_received"]
    if pattern.unit == "Mbit/s":
        return float(arrived["bits_per_second"]) / 1e6
    return float(arrived["bytes"]) / SMALL / float(arrived["seconds"])


def compare(machine: Machine, pattern: Pattern, seconds: float) -> tuple[float, float, float, str]:
    """Returns our figure, virtio-net's, their ratio, and where half of the rounds' ratios are."""
    figures: dict[str, list[float]] = {OURS: [], VIRTIO: []}
    for number in range(ROUNDS):
        for name in (OURS, VIRTIO) if number % 2 == 0 else (VIRTIO, OURS):
            figures[name].append(run(machine, name, pattern, seconds))
    ours, virtio = (statistics.median(figures[name]) for name in (OURS, VIRTIO))
    ratios = [mine / other for mine, other in zip(*figures.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return ours, virtio, middle, f"{low:.2f} to {high:.2f}"


def may_run() -> bool:
    """Tells whether this process may make a network namespace and TAPs."""
    return os.geteuid() == 0


def prepare() -> None:
    """Has what the guest is made of built and fetched; the namespace will have no way out."""
    if may_run():
        plain_guest(KERNEL)


def tables(seconds: float) -> Iterator[Table]:
    """Returns the table of this benchmark."""
    table = Table(
        "In a virtual machine: iperf3 over our network card and over QEMU's virtio-net",
        ("load", "queues", "unit", "ours", "virtio-net", "ratio", "half of the rounds"),
        notes=["a TAP each, checksum and segmentation offloads on; UDP: what arrived"],
    )
    if not may_run():
        print("net_vm is left out: it makes TAPs in a network namespace, as root", file=sys.stderr)
        return
    guest = plan()
    with inside(f"vhostvmbus-bench-{os.getpid()}"), Machine(guest) as machine:
        machine.wait_ready()
        connect(machine)
        for queues in QUEUES:
            use_queues(machine, queues)
            for pattern in PATTERNS:
                print(f"  {pattern.title}, queues: {queues} ...", file=sys.stderr, flush=True)
                table.add(pattern.title, queues, pattern.unit, *compare(machine, pattern, seconds))
        machine.poweroff()
    yield table
