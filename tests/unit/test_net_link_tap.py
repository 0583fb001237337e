# SPDX-License-Identifier: GPL-2.0-or-later
"""TAPs of a real kernel, in network namespaces of the tests' own."""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from net_support import (
    Guest,
    arp,
    checksum_is_good,
    namespace_name,
    namespaces,
    private_network,
    require_root,
    udp,
    wait_for,
)
from pyroute2 import IPRoute, netns

from vhostvmbus.devices.net.link import Capabilities, Gso, Link, LinkDown, Offload, spec
from vhostvmbus.devices.net.link import tap as tap_module
from vhostvmbus.devices.net.link.namespace import RECORDS, call_in

HOST, GUEST = bytes([10, 9, 0, 1]), bytes([10, 9, 0, 2])
MAC = bytes.fromhex("525400000001")
ALL = Capabilities(checksum=True, tso4=True, tso6=True)


@pytest.fixture
def network() -> Iterator[None]:
    with private_network():
        yield


@contextlib.contextmanager
def opened(text: str) -> Iterator[Link]:
    with contextlib.closing(spec.open(text)) as link:
        yield link


def interface(name: str) -> dict[str, object] | None:
    """What the kernel says of an interface of this thread's namespace."""
    with IPRoute() as route:
        found = route.link_lookup(ifname=name)
        if not found:
            return None
        state = route.get_links(found[0])[0]
        addresses = [
            f"{entry.get_attr('IFA_ADDRESS')}/{entry['prefixlen']}"
            for entry in route.get_addr(index=found[0])
        ]
        return {
            "index": found[0],
            "up": bool(state["flags"] & 1),
            "mtu": state.get_attr("IFLA_MTU"),
            "master": state.get_attr("IFLA_MASTER"),
            "mac": bytes.fromhex(state.get_attr("IFLA_ADDRESS").replace(":", "")),
            "addresses": addresses,
        }


def change(name: str, **what: object) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], **what)


def make_existing(name: str, *, multi_queue: bool) -> None:
    """A persistent TAP, as an administrator makes one."""
    words = ["ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"]
    subprocess.run([*words, *["multi_queue"] * multi_queue], check=True)
    change(name, state="up")


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
        assert link.capabilities == ALL
        with opened("tap") as other:
            assert other.name != link.name
    assert interface(link.name) is None


@pytest.mark.usefixtures("network")
def test_a_frame_each_way() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.9.0.1", 7))
            server.settimeout(5)
            assert guest.send(
                udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"in")  # type: ignore[arg-type]
            )
            data, peer = server.recvfrom(100)
            assert (data, peer) == (b"in", ("10.9.0.2", 1000))
            server.sendto(b"out", peer)
            guest.wait(lambda frame: frame[12:22].endswith(b"\x00\x01"), "an ARP request")
            guest.send(arp(2, MAC, GUEST, host["mac"], HOST))  # type: ignore[arg-type]
            frame, offload = guest.wait(lambda frame: frame[34:36] == b"\x00\x07", "the answer")
            assert frame.endswith(b"out")
            assert frame[:6] == MAC
            assert offload == Offload()
            assert checksum_is_good(frame)


@pytest.mark.usefixtures("network")
def test_a_checksum_left_to_the_other_side() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        guest.link.use_receive_offloads(Capabilities(checksum=True))
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.9.0.1", 7))
            server.settimeout(5)
            frame = udp(
                host["mac"],  # type: ignore[arg-type]
                MAC, GUEST, HOST, (1000, 7), b"odd", complete=False,
            )  # fmt: skip
            assert not checksum_is_good(frame)
            guest.send(frame, offload=Offload(needs_checksum=True, start=34, offset=6))
            data, peer = server.recvfrom(100)
            assert data == b"odd"
            server.sendto(b"answer", peer)
            frame, offload = guest.wait(lambda frame: frame[34:36] == b"\x00\x07", "the answer")
            assert offload.needs_checksum
            assert (offload.start, offload.offset) == (34, 6)
            assert not checksum_is_good(frame)
            # A wrong checksum that claims nothing is seen as such.
            wrong = bytearray(udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"bad"))  # type: ignore[arg-type]
            wrong[-1] ^= 1
            guest.send(bytes(wrong))
            guest.send(udp(host["mac"], MAC, GUEST, HOST, (1000, 7), b"good"))  # type: ignore[arg-type]
            assert server.recv(100) == b"good"


class Bridge:
    """Carries frames between two links, as a guest with two cards would that forwards."""

    def __init__(self, one: Link, other: Link) -> None:
        self.longest = 0
        self.segments: set[Gso] = set()
        self.partial = 0
        self.bad = 0
        self.last = time.monotonic()
        self.running = True
        self._threads = [
            threading.Thread(target=self._carry, args=pair) for pair in ((one, other), (other, one))
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: Link, target: Link) -> None:
        room = memoryview(bytearray(70000))
        while self.running:
            quiet = True
            for queue in range(source.queues):
                while (received := source.receive_into(queue, [room])) is not None:
                    quiet = False
                    self.last = time.monotonic()
                    size, offload = received
                    self.longest = max(self.longest, size)
                    self.segments.add(offload.gso)
                    self.partial += offload.needs_checksum
                    if not offload.needs_checksum and room[23] == 6 and room[12:14] == b"\x08\x00":
                        self.bad += not checksum_is_good(bytes(room[:size]))
                    target.send(queue % target.queues, [room[:54], room[54:size]], offload)
            if quiet:
                time.sleep(0.001)

    def stop(self) -> None:
        self.running = False
        for thread in self._threads:
            thread.join()


def transfer(one: str, other: str, address: str, size: int) -> None:
    """Send *size* bytes over TCP from one namespace into another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = call_in(other, lambda: socket.create_server((address, 5000), family=family))
    client = call_in(one, lambda: socket.socket(family, socket.SOCK_STREAM))
    data = os.urandom(1 << 16) * (size >> 16)
    with server, client:
        client.settimeout(30)
        client.connect((address, 5000))
        sender = threading.Thread(target=lambda: (client.sendall(data), client.close()))
        sender.start()
        accepted, _ = server.accept()
        accepted.settimeout(30)
        received = bytearray()
        while piece := accepted.recv(1 << 20):
            received += piece
        accepted.close()
        sender.join()
    assert received == data


@pytest.mark.parametrize(
    ("address", "kind"), [("10.9.0.2", Gso.TCPV4), ("fd09::2", Gso.TCPV6)], ids=["v4", "v6"]
)
def test_long_segments_cross_whole(address: str, kind: Gso) -> None:
    require_root()
    one, other = namespace_name(), namespace_name()
    with (
        opened(f"netns:{one},ip=10.9.0.1/24,ip=fd09::1/64,queues=2") as a,
        opened(f"netns:{other},ip=10.9.0.2/24,ip=fd09::2/64,queues=1") as b,
    ):
        for link in (a, b):
            link.use_queues(link.queues)
            link.use_receive_offloads(ALL)
        bridge = Bridge(a, b)
        try:
            transfer(one, other, address, 4 << 20)
            assert kind in bridge.segments
            assert bridge.longest > 20000
            assert bridge.partial
            for link in (a, b):
                link.use_receive_offloads(Capabilities())
            # What was queued before is on its way as it was.
            wait_for(lambda: time.monotonic() > bridge.last + 0.3, "silence")
            bridge.longest, bridge.partial, bridge.segments = 0, 0, set()
            transfer(one, other, address, 1 << 20)
            assert bridge.longest <= 1514
            assert bridge.partial == 0
            assert bridge.segments == {Gso.NONE}
            assert bridge.bad == 0
        finally:
            bridge.stop()
    assert not {one, other} & namespaces()


@pytest.mark.usefixtures("network")
def test_queues_that_are_used_get_frames_and_others_none() -> None:
    with opened("tap,ip=10.9.0.1/24,queues=4") as link:
        guest = Guest(link)
        host = interface(link.name)
        assert host is not None
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")

        def used() -> set[int]:
            seen = set()
            for port in range(2000, 2064):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"x", ("10.9.0.2", port))
            for queue in range(4):
                while guest.receive(queue) is not None:
                    seen.add(queue)
            return seen

        assert used() == {0}
        link.use_queues(3)
        assert used() == {0, 1, 2}
        link.use_queues(1)
        assert used() == {0}
        link.use_queues(4)
        assert used() == {0, 1, 2, 3}
        for wrong in (0, 5):
            with pytest.raises(ValueError, match="1 to 4"):
                link.use_queues(wrong)


@pytest.mark.usefixtures("network")
def test_a_frame_that_just_fits_and_one_that_does_not() -> None:
    with opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(101), ("10.9.0.2", 9))
            sender.sendto(bytes(100), ("10.9.0.2", 9))
        room = memoryview(bytearray(142))
        received = link.receive_into(0, [room[:50], room[50:]])
        assert received == (142, Offload())
        assert link.stats()["too_long"] == 1


@pytest.mark.usefixtures("network")
def test_nonsense_is_refused_and_counted() -> None:
    with opened("tap") as link:
        guest = Guest(link)
        frame = udp(MAC, MAC, GUEST, HOST, (1, 2), b"")
        assert not guest.send(frame, offload=Offload(needs_checksum=True, start=40, offset=6000))
        assert not guest.send(frame, offload=Offload(needs_checksum=True, start=1 << 20))
        assert not guest.send(b"short")
        assert link.stats()["send_failed"] == 3
        assert guest.send(frame)


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
        number = link.fileno(0)
        with IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname=link.name)[0])
        wait_for(lambda: guest.changes >= 2, "lost and made again")
        assert link.fileno(0) == number
        assert link.carrier()
        assert link.stats()["vanished"] == 1
        found = interface(link.name)
        assert found is not None
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
        assert link.receive_into(0, [memoryview(bytearray(2000))]) is None
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
            spec.open("tap:given")


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
        spec.open(text)
    assert words in str(caught.value)
    with IPRoute() as route:
        names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
    assert not [name for name in names if name.startswith("vmbus") or name == "nothere"]
    assert len(os.listdir("/proc/self/fd")) == len(before)


UNPRIVILEGED = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from vhostvmbus.devices.net.link import LinkDown, spec
try:
    spec.open(sys.argv[1])
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
        spec.open("tap")


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
        spec.open("tap")
    assert words in str(caught.value)
    assert "NET=user" in str(caught.value)


# -- namespaces and what is left over -----------------------------------------------------------


def test_a_namespace_lives_as_long_as_its_users() -> None:
    require_root()
    name = namespace_name()
    here = os.readlink("/proc/thread-self/ns/net")
    one = spec.open(f"netns:{name},ip=10.9.0.1/24")
    other = spec.open(f"netns:{name}")
    assert os.readlink("/proc/thread-self/ns/net") == here
    assert one.name != other.name
    assert call_in(name, lambda: interface("lo"))["up"]  # type: ignore[index]
    one.close()
    assert name in namespaces()
    assert call_in(name, lambda: interface(other.name)) is not None
    other.close()
    assert name not in namespaces()
    assert not (RECORDS / name).exists()


def test_anothers_namespace_is_used_and_left() -> None:
    require_root()
    name = namespace_name()
    netns.create(name)
    try:
        with opened(f"netns:{name}") as link:
            assert call_in(name, lambda: interface(link.name)) is not None
        assert name in namespaces()
        assert call_in(name, lambda: interface(link.name)) is None
    finally:
        netns.remove(name)


HOLDER = """
import sys, time
from vhostvmbus.devices.net.link import spec
links = [spec.open(text) for text in sys.argv[1:]]
print(*[link.name for link in links], flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_of_one_that_was_killed() -> None:
    require_root()
    name, other = namespace_name(), namespace_name()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"netns:{name},ip=10.9.0.1/24"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    tap = child.stdout.readline().decode().strip()
    assert call_in(name, lambda: interface(tap)) is not None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    wait_for(lambda: call_in(name, lambda: interface(tap)) is None, "the TAP goes at once")
    assert name in namespaces()  # a name stays until somebody comes
    with opened(f"netns:{other}"):
        assert name not in namespaces()
        assert other in namespaces()
    assert not {name, other} & namespaces()


def test_a_namespace_of_the_same_name_is_anothers() -> None:
    require_root()
    name, other = namespace_name(), namespace_name()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"netns:{name}"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    netns.remove(name)
    netns.create(name)
    try:
        with opened(f"netns:{other}"):
            assert name in namespaces()
            assert not (RECORDS / name).exists()
    finally:
        netns.remove(name)


def test_a_tap_of_one_that_was_killed() -> None:
    with private_network():
        child = subprocess.Popen([sys.executable, "-c", HOLDER, "tap"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        name = child.stdout.readline().decode().strip()
        assert interface(name) is not None
        child.kill()
        child.wait()
        child.stdout.close()
        wait_for(lambda: interface(name) is None, "the TAP goes at once")


def test_the_header_of_a_strange_segment_is_dropped() -> None:
    """Somebody else's TAP settings may let segments through that nobody asked for."""
    with private_network(), opened("tap,ip=10.9.0.1/24") as link:
        guest = Guest(link)
        reader, writer = os.pipe2(os.O_NONBLOCK)
        frame = udp(MAC, MAC, GUEST, HOST, (1, 2), b"")
        for kind in (3, 0):  # UDP fragments; a plain frame
            os.write(writer, struct.pack("<BBHHHH", 0, kind, 0, 0, 0, 0) + frame)
        # A pipe has no message boundaries: room for exactly the frame, read one at a time.
        os.dup2(reader, link.fileno(0))
        room = memoryview(bytearray(len(frame)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link, "_spare", bytearray(0))
            assert link.receive_into(0, [room]) == (len(frame), Offload())
        assert link.stats()["bad_header"] == 1
        del guest
        os.close(reader)
        os.close(writer)
