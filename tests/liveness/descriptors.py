# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors of every kind that a front end could pass, most of which are none that it should.

:func:`make` gives one by the name of its kind. What a machine does not have (an address family that
its kernel was built without) is replaced by a socket that it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import tempfile
from collections.abc import Callable

EVENTFD_FULL = 0xFFFFFFFFFFFFFFFE


def _eventfd(flags: int, start: int = 0) -> int:
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    if start:
        os.eventfd_write(fd, start)
    return fd


def _pipe(end: int, full: bool = False) -> int:
    fds = os.pipe()
    if full:
        os.set_blocking(fds[1], False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fds[1], bytes(65536))
        os.set_blocking(fds[1], True)
    keep = os.dup(fds[end])
    for fd in fds:
        os.close(fd)
    return keep


def _pair(kind: int = socket.SOCK_STREAM, peer: str = "closed") -> int:
    """Returns one end of a pair; the other one is closed, or has written garbage and is closed."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    if peer == "garbage":
        other.sendall(b"\xff" * 64)
    other.close()
    return one.detach()


def _full_pair() -> int:
    """Returns an end into which nothing more can be written: its peer, alive, reads nothing."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(4096))
    one.setblocking(True)
    # The peer lives as long as the queue of this pair has its descriptor: it is sent to itself.
    socket.send_fds(other, [b"x"], [other.fileno()])
    other.close()
    return one.detach()


def _socket(family: int, kind: int, protocol: int = 0) -> int:
    try:
        return socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol).detach()
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()


def _listener() -> int:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("")  # a name that the kernel chooses
    sock.listen(1)
    return sock.detach()


def _memfd(size: int, seals: int = 0) -> int:
    fd = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _epoll() -> int:
    poll = select.epoll()
    fd = os.dup(poll.fileno())
    poll.close()
    return fd


def _file(flags: int) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 20)
        return os.open(file.name, flags | os.O_CLOEXEC)


SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

KINDS: dict[str, Callable[[], int]] = {
    "eventfd": lambda: _eventfd(os.EFD_NONBLOCK),
    "eventfd-blocking": lambda: _eventfd(0),
    "eventfd-full": lambda: _eventfd(os.EFD_NONBLOCK, EVENTFD_FULL),
    "eventfd-blocking-full": lambda: _eventfd(0, EVENTFD_FULL),
    "eventfd-semaphore": lambda: _eventfd(os.EFD_SEMAPHORE | os.EFD_NONBLOCK, 1000),
    "pipe-read": lambda: _pipe(0),
    "pipe-write": lambda: _pipe(1),
    "pipe-full": lambda: _pipe(1, full=True),
    "socket-closed": _pair,
    "socket-garbage": lambda: _pair(peer="garbage"),
    "socket-full": _full_pair,
    "socket-dgram": lambda: _pair(socket.SOCK_DGRAM),
    "socket-seqpacket": lambda: _pair(socket.SOCK_SEQPACKET),
    "socket-listening": _listener,
    "socket-unconnected": lambda: _socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "socket-inet": lambda: _socket(socket.AF_INET, socket.SOCK_STREAM),
    "socket-mptcp": lambda: _socket(socket.AF_INET, socket.SOCK_STREAM, 262),
    "socket-type-10": lambda: _socket(socket.AF_INET, 10, 768),
    "socket-inet6": lambda: _socket(socket.AF_INET6, socket.SOCK_DGRAM),
    "socket-netlink": lambda: _socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "socket-packet": lambda: _socket(socket.AF_PACKET, socket.SOCK_RAW),
    "socket-alg": lambda: _socket(38, socket.SOCK_SEQPACKET),
    "socket-vsock": lambda: _socket(40, socket.SOCK_STREAM),
    "socket-xdp": lambda: _socket(44, socket.SOCK_RAW),
    "memfd": lambda: _memfd(1 << 20),
    "memfd-empty": lambda: _memfd(0),
    "memfd-sealed": lambda: _memfd(1 << 20, SEALED),
    "memfd-no-write": lambda: _memfd(1 << 20, fcntl.F_SEAL_WRITE),
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
    "path": lambda: os.open("/", os.O_PATH | os.O_CLOEXEC),
    "file": lambda: _file(os.O_RDWR),
    "file-read-only": lambda: _file(os.O_RDONLY),
    "null": lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "epoll": _epoll,
    "pidfd": lambda: os.pidfd_open(os.getpid()),
}
"""How to make each kind of descriptor."""


def make(kind: str) -> int:
    """Returns a new descriptor of ``kind``, the caller's."""
    return KINDS[kind]()
