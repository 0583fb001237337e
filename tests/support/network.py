# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces, frames and links, for tests that would change a host's network."""

import contextlib
import ctypes
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import pytest
from pyroute2 import IPRoute

from tests.support.vnet import Offload
from vhostvmbus.devices.net.link import Link
from vhostvmbus.devices.net.link.namespace import NAMES
from vhostvmbus.devices.net.link.opening import open_link

_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
BROADCAST = b"\xff" * 6


def require_root() -> None:
    """Fails without root. It never skips: a test that did not run has shown nothing."""
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and TAPs: run it as root")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.fail("this test makes TAPs: there has to be a /dev/net/tun (modprobe tun)")


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Puts this thread, and the threads it starts, into a network namespace without a name."""
    require_root()
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        with IPRoute() as route:
            route.link("set", index=1, state="up")  # loopback
        yield
    finally:
        if _libc.setns(before, _NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(before)


def connect_to_the_world() -> None:
    """Makes an interface with an address and a default route, which is what passt looks for."""
    with IPRoute() as route:
        route.link("add", ifname="world", kind="veth", peer="beyond")
        index = route.link_lookup(ifname="world")[0]
        for name in ("world", "beyond"):
            route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
        route.addr("add", index=index, address="192.0.2.2", prefixlen=24)
        route.route("add", dst="default", gateway="192.0.2.1", oif=index)


def namespace_name() -> str:
    """Returns a name that no namespace of the host has."""
    return f"vhostvmbus-test-{uuid.uuid4().hex[:8]}"


def namespaces() -> set[str]:
    """Returns the names of the namespaces that have one."""
    return set(os.listdir(NAMES)) if NAMES.is_dir() else set()


def wait_for(condition: Callable[[], object], what: str, patience: float = 10.0) -> None:
    """Waits until ``condition`` is true; fails if it does not become so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {patience} s"
        time.sleep(0.01)


@contextlib.contextmanager
def opened(text: str) -> Iterator[Link]:
    """Gives the link that ``NET=text`` names, closed at the end."""
    with contextlib.closing(open_link(text)) as link:
        yield link


class Guest:
    """The end of a link that a card would be: sends, and keeps what comes."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.changes = 0
        self.carriers: list[bool] = []
        """The carrier at each change that the link told of."""
        link.start(self._changed)

    def _changed(self) -> None:
        self.carriers.append(self.link.carrier())
        self.changes += 1

    def send(self, frame: bytes, offload: Offload | None = None) -> bool:
        return self.link.port(0).send(frame, (offload or Offload()).pack())

    def receive(self, queue: int = 0) -> tuple[bytes, Offload] | None:
        received = self.link.port(queue).receive()
        return None if received is None else (received[1], Offload.unpack(received[0]))

    def wait(
        self, wanted: Callable[[bytes], object], what: str, patience: float = 10.0
    ) -> tuple[bytes, Offload]:
        """Returns the next frame of which ``wanted`` is true; others are thrown away."""
        found: list[tuple[bytes, Offload]] = []

        def look() -> bool:
            for queue in range(self.link.queues):
                while (received := self.receive(queue)) is not None:
                    if wanted(received[0]):
                        found.append(received)
                        return True
            return False

        wait_for(look, what, patience)
        return found[0]


def ones_sum(*parts: bytes) -> int:
    """Returns the Internet checksum's sum (RFC 1071), before it is inverted."""
    data = b"".join(bytes(part) + bytes(len(part) % 2) for part in parts)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ethernet(target: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return target + source + struct.pack(">H", kind) + payload


def arp(operation: int, source: bytes, source_ip: bytes, target: bytes, target_ip: bytes) -> bytes:
    """Returns a request (1) or reply (2), RFC 826."""
    body = struct.pack(">HHBBH", 1, 0x800, 6, 4, operation)
    body += source + source_ip + (bytes(6) if operation == 1 else target) + target_ip
    return ethernet(BROADCAST if operation == 1 else target, source, 0x806, body)


def udp(
    target: bytes,
    source: bytes,
    source_ip: bytes,
    target_ip: bytes,
    ports: Sequence[int],
    payload: bytes,
    complete: bool = True,
) -> bytes:
    """Returns an Ethernet frame with a UDP datagram over IPv4.

    If it is not ``complete``, its checksum field holds only the pseudo-header's sum.
    """
    length = 8 + len(payload)
    pseudo = source_ip + target_ip + struct.pack(">HH", 17, length)
    head = struct.pack(">HHH", *ports, length)
    checksum = ones_sum(pseudo)
    if complete:
        checksum = ones_sum(pseudo, head, payload) ^ 0xFFFF
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + source_ip + target_ip
    ip = ip[:10] + struct.pack(">H", ones_sum(ip) ^ 0xFFFF) + ip[12:]
    return ethernet(
        target, source, 0x800, ip + head + struct.pack(">H", checksum or 0xFFFF) + payload
    )


def checksum_is_good(frame: bytes) -> bool:
    """Tells whether the TCP or UDP checksum of an Ethernet frame is complete and right."""
    if frame[12:14] == b"\x08\x00":
        header = 14 + 4 * (frame[14] & 15)
        protocol, addresses = frame[23], frame[26:34]
        end = 14 + struct.unpack(">H", frame[16:18])[0]
    else:
        header, protocol, addresses = 54, frame[20], frame[22:54]
        end = 54 + struct.unpack(">H", frame[18:20])[0]
    data = frame[header:end]
    return ones_sum(addresses, struct.pack(">HH", protocol, len(data)), data) == 0xFFFF
