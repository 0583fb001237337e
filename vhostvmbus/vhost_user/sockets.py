# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes with descriptors on UNIX stream sockets, and the socket file's life.

Descriptors received here are close-on-exec. :func:`bind_listener` never takes a path from a live
process, and replaces a socket file that a dead one left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vhostvmbus.vhost_user.codec import MAX_FDS
from vhostvmbus.vhost_user.errors import NotASocket, SocketInUse, WrongFds, WrongFdType

_FD_SIZE = 4
OWNER_ONLY = 0o600
"""Permissions: nobody but the owner."""
LOCK_PATIENCE = 10.0
"""The seconds for which another process may be just replacing a socket."""


def close_all(fds: Iterable[int]) -> None:
    """Closes every descriptor, and goes on if closing one of them fails."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def receive(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Returns up to ``size`` bytes and the descriptors that came with the first of them.

    Empty bytes mean that the peer closed its end. Raises :class:`WrongFds` when more descriptors
    came than any message carries; all of them are closed then. ``flags`` are those of recvmsg().
    """
    space = socket.CMSG_SPACE((MAX_FDS + 1) * _FD_SIZE)
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC | flags)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(content) - len(content) % _FD_SIZE
            fds += memoryview(content)[:whole].cast("i").tolist()
    if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
        close_all(fds)
        raise WrongFds(f"at most {MAX_FDS} descriptors at a time", field="fds", value=len(fds))
    return data, fds


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Sends all of ``data``; ``fds`` go with the first byte."""
    sent = socket.send_fds(sock, [data], list(fds)) if fds else 0
    if sent < len(data):
        sock.sendall(data[sent:])


def receive_before(sock: socket.socket, size: int, deadline: float) -> tuple[bytes, list[int]]:
    """Does what :func:`receive` does, but raises ``TimeoutError`` at ``deadline``
    (``time.monotonic``).
    """
    while True:
        _wait_before(sock, select.POLLIN, deadline)
        with contextlib.suppress(BlockingIOError):
            return receive(sock, size, socket.MSG_DONTWAIT)


def send_before(sock: socket.socket, data: bytes, deadline: float) -> None:
    """Sends all of ``data``, or raises ``TimeoutError`` at ``deadline`` (``time.monotonic``)."""
    left = memoryview(data)
    while left:
        _wait_before(sock, select.POLLOUT, deadline)
        with contextlib.suppress(BlockingIOError):
            left = left[sock.send(left, socket.MSG_DONTWAIT) :]


def _wait_before(sock: socket.socket, event: int, deadline: float) -> None:
    # Whether a socket blocks is a property of the open file, which the peer may have as well and
    # may change at any time: so it is asked for with each call, and waiting is done here.
    poll = select.poll()
    poll.register(sock, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("the peer neither reads nor writes")


def require_eventfd(fd: int, name: str) -> None:
    """Raises :class:`WrongFdType` unless ``fd`` is an eventfd."""
    target = os.readlink(f"/proc/self/fd/{fd}")
    if target != "anon_inode:[eventfd]":
        raise WrongFdType("this descriptor has to be an eventfd", field=name, value=target)


def require_stream_socket(fd: int, name: str) -> socket.socket:
    """Returns a socket object for a duplicate of ``fd``.

    Raises :class:`WrongFdType` unless ``fd`` is a stream socket.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise WrongFdType(
            "this descriptor has to be a socket",
            field=name,
            value=os.readlink(f"/proc/self/fd/{fd}"),
        )
    copy = os.dup(fd)
    try:
        sock = socket.socket(fileno=copy)
    except OSError as error:  # of a family that cannot be asked
        os.close(copy)
        raise WrongFdType(
            "this descriptor has to be a UNIX stream socket", field=name, value=str(error)
        ) from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        kind = f"family {int(sock.family)} type {int(sock.type)}"  # not all of them have names
        sock.close()
        raise WrongFdType("this descriptor has to be a UNIX stream socket", field=name, value=kind)
    return sock


@contextlib.contextmanager
def bind_listener(
    path: Path, mode: int = OWNER_ONLY, group: int | None = None
) -> Iterator[socket.socket]:
    """Gives a socket that listens at ``path``; the file is removed in the end.

    ``mode`` are the file's permissions, whatever the umask is, and ``group`` is the number of the
    group that it gets. Nobody can connect to whom they do not allow it, at no moment.

    Raises :class:`SocketInUse` if a live process listens there, :class:`NotASocket` if something
    else lies there, ``OSError`` that names the path if it cannot be listened at.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _naming(path), _locked(path):
            _remove_stale(path)
            # Linux takes the file's mode from the socket's (less the umask).
            os.fchmod(listener.fileno(), OWNER_ONLY)
            listener.bind(str(path))
            identity = _identity(path)
            try:
                _permit(path, mode, group)
                listener.listen(8)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        try:
            yield listener
        finally:
            # While it is listened at, nobody takes it for one that was left, and replaces it.
            # Who did all the same keeps theirs.
            if _identity(path) == identity:
                path.unlink(missing_ok=True)
    finally:
        listener.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has an ``OSError`` name ``path``, which those of sockets do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        number, words = error.errno or errno.EINVAL, error.strerror or str(error)
        raise OSError(number, words, str(path)) from error


def _permit(path: Path, mode: int, group: int | None) -> None:
    """Gives the socket's file its group, then its permissions."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # By the descriptor: what lies at the path now may be another one.
        this = f"/proc/self/fd/{fd}"
        if group is not None:
            os.chown(this, -1, group)
        os.chmod(this, mode)
    finally:
        os.close(fd)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks ``path``: of two processes that find a stale socket, only one replaces it.

    The lock is a file beside it that only its owner can open, and so only its owner can lock; it is
    gone afterwards. Raises ``OSError`` if somebody has held it for :data:`LOCK_PATIENCE` seconds.
    """
    beside = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + LOCK_PATIENCE
    while (fd := _try_lock(beside)) is None:
        if time.monotonic() > deadline:
            raise OSError(errno.EAGAIN, "another process holds this lock", str(beside))
        time.sleep(0.01)
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    """Returns the descriptor of the locked file ``path``, or ``None`` if another process has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, OWNER_ONLY)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS):
            raise
        words = f"{error.strerror}: the folder for a socket"
        raise OSError(error.errno, words, str(path.parent)) from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "somebody else's lock is in the way", str(path))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had the lock before has removed the file: it is another one that counts now.
        if (found.st_dev, found.st_ino) == _identity(path):
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise NotASocket(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(str(path))
    # EAGAIN: it is alive, but its queue is full.
    if result in (0, errno.EAGAIN):
        raise SocketInUse(f"another process listens on {path}")
    if result != errno.ECONNREFUSED:
        raise OSError(result, os.strerror(result), str(path))
    path.unlink()
