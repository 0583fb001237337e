# SPDX-License-Identifier: GPL-2.0-or-later
"""A TAP device of the host: the kernel's end of the card's cable is an interface.

Facts: ``Documentation/networking/tuntap.rst`` and ``linux/if_tun.h``. Each queue is a descriptor
of ``/dev/net/tun``; a frame is one read or write, with a virtio-net header before it.

A TAP that is made here is not persistent: it exists as long as its descriptors, so the kernel
removes it when this process ends, also when it is killed. When the interface vanishes from the
host (``ip link del``), the link is down; one that was made here is made again, with the station
address that it had, an existing one is waited for by name.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Callable
from typing import Final

from pyroute2 import IPRoute

from vhostvmbus.devices.net.link import Capabilities, LinkDown
from vhostvmbus.devices.net.link import interface as interfaces
from vhostvmbus.devices.net.link.namespace import Namespace, call_in
from vhostvmbus.devices.net.link.port import HEADER_SIZE, Framing, Port
from vhostvmbus.devices.net.link.spec import LinkSpec
from vhostvmbus.devices.net.link.watch import Watch

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/net/tun"
NAME_PATTERN: Final = "vmbus%d"
"""The name of interfaces that are made; the kernel fills in a number."""
DEFAULT_QUEUES: Final = 8
RETRY: Final = 1.0
"""The seconds between attempts to make a vanished interface again."""

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNSETVNETLE: Final = 0x400454DC
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_ATTACH_QUEUE: Final = 0x0200
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_CHECKSUM: Final = 1
_TSO4: Final = 2
_TSO6: Final = 4
_IFREQ: Final = struct.Struct("16sH22x")
"""The layout of ``struct ifreq`` with ``ifr_flags``."""
_LAST: Final = 0xFE
"""The first byte of the host's end: a bridge takes the least station address of its interfaces,
and keeps its own if these are the greatest."""


class Tap:
    """A link to a TAP; see :class:`~vhostvmbus.devices.net.link.Link`."""

    capabilities = Capabilities(checksum=True, tso4=True, tso6=True)

    def __init__(self, spec: LinkSpec) -> None:
        """Makes what ``spec`` asks for, or opens the existing TAP that it names.

        Raises LinkDown, whose message says what is missing and what would work.
        """
        self._spec = spec
        self._existing = spec.name if spec.kind == "tap" else None
        self.name = self._existing or ""
        self.mac = spec.mac
        self._own_mac = own_mac(spec.mac)
        self.mtu = spec.mtu or 1500
        self._wanted_mtu = spec.mtu
        self._changed: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._mtu_lock = threading.Lock()  # what was looked up is not older than what was set
        self._used = 1
        self._attached = 0
        self._receiving = Capabilities()
        self._index = -1
        self._master: int | None = None
        self._carrier = False
        self._lost = False
        self._counters = {"vanished": 0}
        self._namespace = Namespace(spec.name) if spec.kind == "netns" and spec.name else None
        self._place = self._namespace.path if self._namespace else None
        self._ports: list[Port] = []
        self._watch: Watch | None = None
        try:
            fds = call_in(self._place, self._make)
            self.queues = len(fds)
            self._ports = [Port(Framing.DATAGRAM) for _ in fds]
            self._adopt(fds)
            self._watch = Watch(self.name, self._place, self._look)
        except BaseException as error:
            self.close()
            if isinstance(error, LinkDown) or not isinstance(error, OSError):
                raise
            what = f"TAP {self.name}" if self.name else "making a TAP"
            raise LinkDown(f"{what}: {_explained(error, self._existing)}") from error

    # -- making ------------------------------------------------------------------------------------

    def _make(self) -> list[int]:
        """Makes or opens the interface, in the right namespace. Returns its queues' descriptors."""
        spec = self._spec
        wanted = spec.queues or DEFAULT_QUEUES
        fds: list[int] = []
        try:
            if self._existing is None:
                name = NAME_PATTERN
                for _ in range(wanted):
                    fd, name = _attach(name, _IFF_MULTI_QUEUE)
                    fds.append(fd)
            else:
                name = self._existing
                self._open_existing(name, wanted, fds)
            index = interfaces.find(name)
            if index is None:
                raise OSError(errno.ENODEV, "the interface vanished")
            fcntl.ioctl(fds[0], _TUNSETVNETHDRSZ, struct.pack("=i", HEADER_SIZE))
            with contextlib.suppress(OSError):  # an old kernel; then it is little-endian anyway
                fcntl.ioctl(fds[0], _TUNSETVNETLE, struct.pack("=i", 1))
            if self._existing is None:
                state = interfaces.configure(
                    index,
                    mac=self._own_mac,
                    mtu=self._wanted_mtu,
                    bridge=spec.bridge,
                    addresses=spec.addresses,
                )
            else:
                if self._wanted_mtu is not None:
                    interfaces.set_mtu(index, self._wanted_mtu)
                with IPRoute() as route:
                    found = interfaces.look(route, index)
                if found is None:
                    raise OSError(errno.ENODEV, "the interface vanished")
                state = found
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.name, self._index = state.name, index
        self._carrier, self.mtu = state.carrier, state.mtu
        self._master = state.master
        return fds

    def _open_existing(self, name: str, wanted: int, fds: list[int]) -> None:
        # TUNSETIFF would make one of that name if there were none.
        if interfaces.find(name) is None:
            raise LinkDown(
                f"there is no interface {name}; to make it: "
                f"ip tuntap add dev {name} mode tap multi_queue vnet_hdr user $USER"
            )
        try:
            fds.append(_attach(name, _IFF_MULTI_QUEUE)[0])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fds.append(_attach(name, 0)[0])  # it has one queue
            return
        try:
            while len(fds) < wanted:
                fds.append(_attach(name, _IFF_MULTI_QUEUE)[0])
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise

    def _adopt(self, fds: list[int]) -> None:
        """Uses these descriptors from now on, as many and with the offloads that were asked for."""
        with self._lock:
            # An existing TAP may have come back with more or fewer queues.
            self._attached = min(len(fds), len(self._ports))
            for fd in fds[self._used :]:
                _set_queue(fd, _IFF_DETACH_QUEUE)
            for port, fd in zip(self._ports, fds, strict=False):
                port.put(fd)
            for fd in fds:
                os.close(fd)
            self._set_offloads()
            self._lost = False

    # -- life --------------------------------------------------------------------------------------

    def start(self, changed: Callable[[], None]) -> None:
        """Watches the interface from now on."""
        self._changed = changed
        assert self._watch is not None
        self._watch.start()

    def _look(self, route: IPRoute) -> float | None:
        """Looks how the interface is; the watch calls this, in the namespace."""
        with self._mtu_lock:
            before = self.mtu
            state = None if self._lost else interfaces.look(route, self._index)
            if state is not None:
                self.mtu = state.mtu
        if state is None:
            if not self._lost:
                self._lose()
            try:
                self._adopt(self._make())
            except OSError as error:
                log.info("%s: %s", self.name, error)
                return RETRY
            log.warning("interface %s is there again", self.name)
            self._changed()
            return None
        self.name = state.name
        carrier = state.carrier and self._is_bridged(route, state)
        if (carrier, state.mtu) != (self._carrier, before):
            self._carrier = carrier
            self._changed()
        return None

    def _is_bridged(self, route: IPRoute, state: interfaces.State) -> bool:
        """Puts the interface into a bridge that came. Returns false while the one it belongs in is
        gone.

        Somebody who takes it out of a bridge that is there wants it so.
        """
        bridge = self._spec.bridge
        if bridge is None or state.master is not None:
            return True
        found = interfaces.find_bridge(route, bridge)
        if found is not None and found == self._master:
            return True
        if found is None:
            if self._master is not None:
                log.error("bridge %s has vanished; the network card has no link", bridge)
                self._counters["vanished"] += 1
                self._master = None
            return False
        interfaces.join(route, state.index, bridge, self._wanted_mtu)
        self._master = found
        log.warning("bridge %s is there again", bridge)
        return True

    def _lose(self) -> None:
        log.error(
            "interface %s has vanished from the host; the network card has no link", self.name
        )
        with self._lock:
            self._lost = True
            self._carrier = False
            self._counters["vanished"] += 1
            for port in self._ports:
                port.empty()
        self._changed()

    def carrier(self) -> bool:
        """Tells whether the interface is up and has its own carrier."""
        return self._carrier

    def port(self, queue: int) -> Port:
        """Returns the queue's port."""
        return self._ports[queue]

    def set_mtu(self, mtu: int) -> None:
        """Gives the interface this MTU. Raises OSError, of rights for one that is another's."""
        if self._lost:
            raise LinkDown(f"interface {self.name} has vanished from the host")
        with self._mtu_lock:
            if mtu != self.mtu:
                call_in(self._place, lambda: interfaces.set_mtu(self._index, mtu))
                self.mtu = self._wanted_mtu = mtu

    def use_queues(self, count: int) -> None:
        """Attaches the first ``count`` queues, detaches the others."""
        if not 1 <= count <= self.queues:
            raise ValueError(f"{self.name} has 1 to {self.queues} queues, not {count}")
        with self._lock:
            before, self._used = self._used, count
            if self._lost:
                return
            there = self._ports[: self._attached]
            for port in there[count:before]:
                _set_queue(port.fileno(), _IFF_DETACH_QUEUE)
            for port in there[before:count]:
                _set_queue(port.fileno(), _IFF_ATTACH_QUEUE)

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Tells the kernel what it may leave undone."""
        with self._lock:
            self._receiving = wanted
            if not self._lost:
                self._set_offloads()

    def _set_offloads(self) -> None:
        wanted = self._receiving
        flags = 0
        if wanted.checksum:
            flags = _CHECKSUM | wanted.tso4 * _TSO4 | wanted.tso6 * _TSO6
        fcntl.ioctl(self._ports[0].fileno(), _TUNSETOFFLOAD, flags)

    def stats(self) -> dict[str, int]:
        """Returns how many frames were dropped, by reason, and how often the interface, or its
        bridge, vanished.
        """
        return {
            "too_long": sum(port.too_long for port in self._ports),
            "send_failed": sum(port.refused for port in self._ports),
            **self._counters,
        }

    def close(self) -> None:
        """Gives the descriptors up; with them goes a TAP that was made here."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for port in self._ports:
            port.close()
        if self._namespace is not None:
            self._namespace.close()


def own_mac(mac: bytes | None) -> bytes:
    """Returns the station address of the host's end of a cable, 6 bytes.

    ``mac`` is the card's, if known. The result is the same each time for a ``mac``, so that who
    talked to it goes on after a restart; otherwise, and for one that would be the same as the
    card's, it is random.
    """
    if mac is None or mac[0] == _LAST:
        return bytes([_LAST]) + os.urandom(5)
    return bytes([_LAST]) + mac[1:]


def _attach(name: str, flags: int) -> tuple[int, str]:
    """Attaches one more queue of the TAP ``name``.

    Returns its descriptor, and the name that the kernel chose.
    """
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags |= _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        answer = fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd, answer[:16].rstrip(b"\0").decode()


def _set_queue(fd: int, flag: int) -> None:
    fcntl.ioctl(fd, _TUNSETQUEUE, _IFREQ.pack(b"", flag))


def _explained(error: OSError, existing: str | None) -> str:
    """Returns what is missing, and what would work."""
    otherwise = "or use NET=user, which needs no rights"
    reason = error.strerror or str(error)
    if error.filename == DEVICE:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return f"there is no {DEVICE}: load the module (modprobe tun), {otherwise}"
        return f"{DEVICE}: {reason}: be in its group or root, {otherwise}"
    if error.errno in (errno.EPERM, errno.EACCES):
        if existing is not None:
            return f"{reason}: it is not yours; be root (CAP_NET_ADMIN), {otherwise}"
        return (
            f"{reason}: making one needs CAP_NET_ADMIN; be root, or use one that root has made "
            "for you (ip tuntap add dev tap0 mode tap multi_queue vnet_hdr user $USER; "
            f"NET=tap:tap0), {otherwise}"
        )
    if error.errno == errno.EBUSY:
        return "it is in use by another program"
    if error.errno == errno.EINVAL and existing is not None:
        return "it is no TAP"
    return reason
