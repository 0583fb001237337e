# SPDX-License-Identifier: GPL-2.0-or-later
"""User-mode network with a real passt, in a network namespace whose "world" is a veth pair.

The guest is frames made by hand; the servers are sockets on the namespace's loopback, which passt
shows the guest at its router's address (passt(1), ``--no-map-gw``).
"""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support.network import (
    BROADCAST,
    Guest,
    arp,
    connect_to_the_world,
    opened,
    private_network,
    udp,
    wait_for,
)
from tests.support.vnet import Offload
from vhostvmbus.devices.net.link import Capabilities, Link, LinkDown
from vhostvmbus.devices.net.link import passt as passt_module
from vhostvmbus.devices.net.link.opening import open_link

MAC = bytes.fromhex("525400000001")
ADDRESS, ROUTER = bytes([192, 0, 2, 2]), bytes([192, 0, 2, 1])
NOWHERE, EVERYBODY = bytes(4), b"\xff" * 4
COOKIE = bytes.fromhex("63825363")


@pytest.fixture
def network(network: None) -> None:
    connect_to_the_world()


def process_of(link: Link) -> int:
    """The pid of the passt that this process started for *link*."""
    number = os.readlink(f"/proc/self/fd/{link.port(0).fileno()}")
    assert number.startswith("socket:")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for task in Path("/proc/self/task").iterdir():
        children += (task / "children").read_text().split()
    (found,) = {int(pid) for pid in children if is_passt(int(pid))}
    return found


def is_passt(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("passt")
    except OSError:
        return False


def unread(link: Link) -> int:
    """How much of what was sent to passt it has not read yet, about."""
    answer = fcntl.ioctl(link.port(0).fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def dhcp(kind: int, *options: bytes) -> bytes:
    """A client's message (RFC 2131) in a broadcast frame."""
    message = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16)
    message += MAC + bytes(10) + bytes(192) + COOKIE
    message += bytes([53, 1, kind, *b"".join(options), 255])
    return udp(BROADCAST, MAC, NOWHERE, EVERYBODY, (68, 67), message.ljust(300, b"\0"))


def dhcp_options(frame: bytes) -> dict[int, bytes]:
    """What a server's message says."""
    data = frame[42:]
    assert data[236:240] == COOKIE
    data, found = data[240:], {}
    while data[0] != 255:
        found[data[0]] = data[2 : 2 + data[1]]
        data = data[2 + data[1] :]
    return found


def is_dhcp(frame: bytes) -> bool:
    return frame[34:38] == struct.pack(">HH", 67, 68)


def find_router(guest: Guest) -> bytes:
    """The router's MAC address."""
    guest.send(arp(1, MAC, ADDRESS, bytes(6), ROUTER))
    frame, _ = guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "an ARP reply")
    return frame[22:28]


@pytest.mark.usefixtures("network")
def test_answers_that_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some of them passt sends only the length, when its socket is full just then. The stream
    goes on; which sizes of the socket's buffer have that happen is the kernel's business."""
    question = arp(1, MAC, ADDRESS, bytes(6), ROUTER)
    missing = 0
    for size in range(2304, 6000, 400):
        monkeypatch.setattr(passt_module, "SOCKET_BUFFER", size)
        with opened("user") as link:
            guest = Guest(link)
            router = find_router(guest)
            for _ in range(20):
                wait_for(lambda: guest.send(question), "room for a question")  # noqa: B023
            wait_for(lambda: unread(link) == 0, "passt takes them")
            for _ in range(20):
                assert find_router(guest) == router
            assert link.carrier()
            missing = link.stats()["missing"]
            assert link.stats()["ended"] == 0
        if missing:
            break
    assert missing, "this passt waits until there is room: one of Debian 12 is needed here"


@pytest.mark.usefixtures("network")
def test_an_address_by_dhcp() -> None:
    with opened("user,mtu=1400,mac=52:54:00:00:00:01") as link:
        assert link.carrier()
        assert link.capabilities == Capabilities()
        assert (link.name, link.queues, link.mtu, link.mac) == ("user", 1, 1400, MAC)
        guest = Guest(link)
        assert guest.send(dhcp(1))
        offer, offload = guest.wait(is_dhcp, "an offer")
        assert offload == Offload()
        assert offer[58:62] == ADDRESS
        options = dhcp_options(offer)
        assert options[53] == b"\x02"
        assert options[3] == ROUTER
        assert options[26] == struct.pack(">H", 1400)
        request = dhcp(3, bytes([50, 4]) + ADDRESS, bytes([54, 4]) + options[54])
        assert guest.send(request)
        acknowledged, _ = guest.wait(is_dhcp, "an acknowledgement")
        assert dhcp_options(acknowledged)[53] == b"\x05"


@pytest.mark.usefixtures("network")
def test_datagrams_to_a_server_on_loopback() -> None:
    with opened("user") as link, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        port = server.getsockname()[1]
        guest = Guest(link)
        router = find_router(guest)
        for size in (1, 500, 1472):
            data = os.urandom(size)
            guest.send(udp(router, MAC, ADDRESS, ROUTER, (3000, port), data))
            received, peer = server.recvfrom(2000)
            assert received == data
            server.sendto(data[::-1], peer)
            frame, _ = guest.wait(
                lambda frame: frame[34:36] == struct.pack(">H", port), "the answer"
            )
            assert frame[42 : 42 + size] == data[::-1]
            assert frame[26:34] == ROUTER + ADDRESS


@pytest.mark.usefixtures("network")
def test_forwarded_ports() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        other.bind(("127.0.0.1", 0))
        tcp_port, udp_port = one.getsockname()[1], other.getsockname()[1]
    with opened(f"user,hostfwd=tcp:{tcp_port}:22,hostfwd=udp:{udp_port}:53") as link:
        guest = Guest(link)
        guest.send(dhcp(1))
        guest.wait(is_dhcp, "an offer")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"question", ("127.0.0.1", udp_port))
            frame, _ = guest.wait(lambda frame: frame[36:38] == b"\x00\x35", "the question")
            assert frame.endswith(b"question")
        with socket.socket() as caller:
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", tcp_port))
            frame, _ = guest.wait(
                lambda frame: frame[23] == 6 and frame[36:38] == b"\x00\x16", "a connection"
            )
            assert frame[47] & 0x12 == 0x02  # SYN, not ACK
        with socket.socket() as caller, pytest.raises(OSError, match="refused"):
            caller.connect(("192.0.2.2", tcp_port))  # on loopback only


@pytest.mark.usefixtures("network")
def test_what_passt_cannot_do_is_refused_here() -> None:
    with opened("user") as link:
        guest = Guest(link)
        frame = udp(BROADCAST, MAC, ADDRESS, ROUTER, (1, 2), b"x")
        assert not guest.send(frame, offload=Offload(needs_checksum=True, start=34, offset=6))
        assert not guest.send(b"short")
        assert link.stats()["send_failed"] == 2
        link.set_mtu(9000)
        with pytest.raises(OSError, match="65520"):
            link.set_mtu(65521)
        link.use_queues(1)
        with pytest.raises(ValueError, match="one queue"):
            link.use_queues(2)


@pytest.mark.usefixtures("network")
def test_a_passt_that_dies_is_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(passt_module, "FIRST_PAUSE", 0.5)
    with opened("user") as link:
        guest = Guest(link)
        router = find_router(guest)
        number, first = link.port(0).fileno(), process_of(link)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: not link.carrier(), "the link is down")
        wait_for(lambda: guest.changes == 1, "a call")
        assert not guest.send(udp(router, MAC, ADDRESS, ROUTER, (1, 2), b"x"))
        assert guest.receive() is None
        assert "passt ended with status -9" in caplog.text
        wait_for(link.carrier, "the link is up again")
        assert guest.changes == 2
        assert link.port(0).fileno() == number
        assert process_of(link) != first
        assert find_router(guest) == router
        assert link.stats()["ended"] == 1


@pytest.mark.usefixtures("network")
def test_nothing_is_left_of_one_that_is_closed() -> None:
    before = set(os.listdir("/proc/self/fd"))
    link = open_link("user")
    pid = process_of(link)
    link.close()
    link.close()
    assert not is_passt(pid)
    with contextlib.closing(open_link("user")) as link:
        Guest(link)
        pid = process_of(link)
    assert not is_passt(pid)
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)


HOLDER = """
import sys, time
from vhostvmbus.devices.net.link.opening import open_link
link = open_link("user")
print(link._process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.usefixtures("network")
def test_nothing_is_left_of_one_that_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE)
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert is_passt(pid)
    child.kill()
    child.wait()
    child.stdout.close()
    wait_for(lambda: not is_passt(pid), "passt ends with its user")


def test_a_host_without_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(passt_module, "FIRST_PAUSE", 0.2)
    with private_network(), opened("user") as link:
        assert not link.carrier()
        assert "trying again until the host has a network" in caplog.text
        guest = Guest(link)
        assert guest.receive() is None
        time.sleep(0.3)
        connect_to_the_world()
        wait_for(link.carrier, "the link is up")
        find_router(guest)


@pytest.mark.usefixtures("network")
def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LinkDown, match=f"passt did not start.*{port}"):
            open_link(f"user,hostfwd=tcp:{port}:22")


def test_no_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LinkDown, match="apt install passt"):
        open_link("user")


def test_one_that_never_takes_frames(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho 'I am thinking' >&2\nexec sleep 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(passt_module, "START_PATIENCE", 0.5)
    with pytest.raises(LinkDown, match="did not start: I am thinking"):
        open_link("user")


LIAR = """#!{python}
import socket, sys, time
sock = socket.socket(fileno=int(sys.argv[-1]))
sock.recv(1000)
sock.sendall(b"\\xff" * 100)
time.sleep(100)
"""


def test_one_that_does_not_send_frames(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "passt"
    program.write_text(LIAR.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(passt_module, "FIRST_PAUSE", 60)
    with opened("user") as link:
        guest = Guest(link)
        wait_for(lambda: guest.receive() or not link.carrier(), "found out")
        wait_for(lambda: link.stats()["ended"], "ended")
        assert not link.carrier()
        wait_for(lambda: guest.changes == 1, "a call")
        assert "passt was ended, because it sent a frame of 4294967295 bytes" in caplog.text
        assert "status" not in caplog.text
