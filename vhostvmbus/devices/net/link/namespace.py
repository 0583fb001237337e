# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces by name: work in one, and make one for as long as somebody uses it.

A namespace is a property of a thread (setns(2)), and what a thread opens there (a socket, a TAP's
descriptor) belongs to that namespace for good, whoever uses it. So :func:`call_in` enters it in
a thread that does nothing else and then ends; no other thread ever leaves its own.

A name in ``/run/netns`` outlives the process that made it. Of those that were made here there is
a record, a file in :data:`RECORDS` that every user of the namespace keeps locked (flock(2), which
ends with the process, however that ends). The last user removes the namespace; one whose record
nobody locks was left by a process that was killed, and the next to come removes it. The record
holds the namespace's inode number, which the kernel soon gives to another one, and when the inode
was made, so that another's namespace of the same name is let alone.
"""

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkError

from vhostvmbus.devices.net.link import LinkDown

log = logging.getLogger(__name__)

NAMES = Path("/var/run/netns")
RECORDS = Path("/run/vhostvmbus/netns")
RIGHTS = "a network namespace needs CAP_SYS_ADMIN (be root); NET=user needs no rights"
_Result = TypeVar("_Result")


def enter(name: str | None) -> None:
    """Moves the calling thread into the namespace ``name``, which may be the path of one.

    ``None`` means to stay. Raises ``OSError``.
    """
    if name is not None:
        netns.setns(name, flags=0)


def call_in(name: str | None, work: Callable[[], _Result]) -> _Result:
    """Does ``work`` in a thread of its own in the namespace ``name``, and waits for it.

    ``None`` is the caller's namespace. Raises what ``work`` raises; an error that the kernel
    reports is an ``OSError``.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with kernel_errors():
                enter(name)
                results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"netns {name}", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def kernel_errors() -> Iterator[None]:
    """Makes netlink's errors what other errors of the kernel are."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


class Namespace:
    """A use of the namespace ``name``, which is made if there is none, until :meth:`close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._record = self._fd = -1
        try:
            RECORDS.mkdir(mode=0o755, parents=True, exist_ok=True)
            with _alone():
                _remove_left_over()
                self._use()
                self._fd = os.open(NAMES / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise LinkDown(f"network namespace {name}: {error.strerror}; {RIGHTS}") from error

    @property
    def path(self) -> str:
        """The way to it for :func:`enter`, also when somebody has removed its name."""
        return f"/proc/self/fd/{self._fd}"

    def _use(self) -> None:
        path = RECORDS / self.name
        if (NAMES / self.name).exists():
            if path.exists():
                self._record = _open(path)
                fcntl.flock(self._record, fcntl.LOCK_SH)
            return
        self._record = _open(path)
        fcntl.flock(self._record, fcntl.LOCK_SH)
        netns.create(self.name)
        if not (NAMES / self.name).exists():
            path.unlink()
            raise PermissionError(1, "cannot be made")
        os.write(self._record, _identity(self.name))
        call_in(self.name, _loopback_up)

    def close(self) -> None:
        """Ends the use; the last one removes a namespace that was made here."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._record < 0:
            return
        try:
            with _alone():
                _remove_if_unused(self._record, self.name)
        except OSError as error:
            log.warning("network namespace %s: %s", self.name, error)
        finally:
            os.close(self._record)
            self._record = -1


def _loopback_up() -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname="lo")
        route.link("set", index=index, state="up")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Sees to it that, of all processes, only one makes or removes at a time."""
    fd = _open(RECORDS / ".lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _identity(name: str) -> bytes:
    found = os.stat(NAMES / name)
    return f"{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}".encode()


def _remove_left_over() -> None:
    for path in RECORDS.iterdir():
        if path.name == ".lock":
            continue
        fd = _open(path)
        try:
            _remove_if_unused(fd, path.name)
        finally:
            os.close(fd)


def _remove_if_unused(record: int, name: str) -> None:
    try:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    made = os.pread(record, 100, 0)
    with contextlib.suppress(FileNotFoundError):
        if made == _identity(name):
            netns.remove(name)
    (RECORDS / name).unlink(missing_ok=True)
