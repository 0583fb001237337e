# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces of links, and what is left of processes that were killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute, netns

from tests.support.network import (
    namespace_name,
    namespaces,
    opened,
    private_network,
    require_root,
    wait_for,
)
from tests.support.taps import interface
from vhostvmbus.devices.net.link.namespace import NAMES, RECORDS, call_in
from vhostvmbus.devices.net.link.opening import open_link


def test_a_namespace_lives_as_long_as_its_users() -> None:
    require_root()
    name = namespace_name()
    here = os.readlink("/proc/thread-self/ns/net")
    one = open_link(f"netns:{name},ip=10.9.0.1/24")
    other = open_link(f"netns:{name}")
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
from vhostvmbus.devices.net.link.opening import open_link
links = [open_link(text) for text in sys.argv[1:]]
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


@contextlib.contextmanager
def held(*texts: str) -> Iterator[None]:
    """Links that a process has open, which is killed in the end."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER, *texts], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        yield
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("10.8.0.2", 7))
print(flush=True)
while True:
    data, peer = server.recvfrom(100)
    server.sendto(data, peer)
"""


@contextlib.contextmanager
def inhabitant(name: str) -> Iterator[None]:
    """A process in the namespace that answers at 10.8.0.2, through an interface of ours."""
    with IPRoute() as route:
        target = os.open(NAMES / name, os.O_RDONLY)
        try:
            route.link("add", ifname="moved", kind="veth", peer={"ifname": "mine"})
            route.link("set", index=route.link_lookup(ifname="moved")[0], net_ns_fd=target)
        finally:
            os.close(target)
        give_address(route, "mine", "10.8.0.1")

    def inside() -> None:
        with IPRoute() as route:
            give_address(route, "moved", "10.8.0.2")

    call_in(name, inside)
    words = ["nsenter", f"--net={NAMES / name}", sys.executable, "-c", ECHO]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def give_address(route: IPRoute, name: str, address: str) -> None:
    (index,) = route.link_lookup(ifname=name)
    route.addr("add", index=index, address=address, prefixlen=24)
    route.link("set", index=index, state="up")


def test_who_lives_in_a_namespace_stays_when_its_card_is_killed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next start takes the namespace over; one of another namespace lets it be, unless nobody
    is in it."""
    name, empty, other = (namespace_name() for _ in range(3))
    with private_network(), contextlib.ExitStack() as stack:
        with held(f"netns:{name}", f"netns:{empty}"):
            stack.enter_context(inhabitant(name))
            before = (NAMES / name).stat().st_ino
        with opened(f"netns:{other}"):
            assert name in namespaces()
            assert empty not in namespaces()
        with opened(f"netns:{name},ip=10.9.0.1/24") as link:
            assert f"{name}: taken over" in caplog.text
            assert (NAMES / name).stat().st_ino == before
            assert call_in(name, lambda: interface(link.name)) is not None
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect(("10.8.0.2", 7))
                client.settimeout(10)
                client.send(b"are you there")
                assert client.recv(100) == b"are you there"
    assert name not in namespaces()
    assert not (RECORDS / name).exists()


def test_a_namespace_of_the_same_name_is_anothers() -> None:
    """Also if it has the inode number of the one before, which may come again."""
    require_root()
    new, same, other = (namespace_name() for _ in range(3))
    with held(f"netns:{new}", f"netns:{same}"):
        pass
    for name in (new, same):
        netns.remove(name)
        netns.create(name)
    try:
        found = (NAMES / same).stat()
        record = (RECORDS / same).read_text().split(" ", 1)[1]
        (RECORDS / same).write_text(f"{found.st_dev}:{found.st_ino} {record}")
        for name in (new, same, other):
            with opened(f"netns:{name}"):
                assert {new, same} <= namespaces()
        assert {new, same} <= namespaces()
        assert not (RECORDS / new).exists()
        assert not (RECORDS / same).exists()
    finally:
        for name in (new, same):
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
