# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces of links, and what is left of processes that were killed."""

import os
import signal
import subprocess
import sys

from pyroute2 import netns

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
    inode = (NAMES / name).stat().st_ino
    for _ in range(300):  # the kernel soon uses a number again
        netns.remove(name)
        netns.create(name)
        if (NAMES / name).stat().st_ino == inode:
            break
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
