# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces by name: work in one, and make one for as long as somebody uses it.

A namespace is a property of a thread (setns(2)), and what a thread opens there (a socket, a TAP's
descriptor) belongs to that namespace for good, whoever uses it. So :func:`call_in` enters it in
a thread that does nothing else and then ends; no other thread ever leaves its own.

A name in ``/run/netns`` outlives the process that made it. Of those that were made here there is
a record, a file in :data:`RECORDS` that every user of the namespace keeps locked (flock(2), which
ends with the process, however that ends). The last user removes the namespace. One whose record
nobody locks was left by a process that was killed: the next to ask for that name takes it over,
with whoever lives in it; the next to ask for another one removes it, unless somebody does.

Nobody else's namespace is taken for one of those. A record holds the inode number of its namespace,
which may come again, and a random mark that is the alias of the loopback interface in it.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
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
_RECORD = re.compile(
    r"(?P<identity>\d+:\d+) (?P<mark>vhostvmbus [0-9a-f]{32}) (?P<interfaces>.*)\n"
)
"""A record: which namespace, the alias of its loopback interface, the interfaces of a new one."""
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
                _remove_left_over(but=name)
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
                if _lock(self._record):
                    log.warning("network namespace %s: taken over as it was left", self.name)
                fcntl.flock(self._record, fcntl.LOCK_SH)
            return
        self._record = _open(path)
        fcntl.flock(self._record, fcntl.LOCK_SH)
        netns.create(self.name)
        if not (NAMES / self.name).exists():
            path.unlink()
            raise PermissionError(1, "cannot be made")
        mark = f"vhostvmbus {secrets.token_hex(16)}"
        interfaces = call_in(self.name, lambda: _furnish(mark))
        record = f"{_identity(NAMES / self.name)} {mark} {' '.join(interfaces)}\n"
        os.ftruncate(self._record, 0)
        os.pwrite(self._record, record.encode(), 0)

    def close(self) -> None:
        """Ends the use; the last one removes a namespace that was made here."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._record < 0:
            return
        try:
            with _alone():
                if _lock(self._record):
                    if _made_here(self._record, self.name) is not None:
                        netns.remove(self.name)
                    (RECORDS / self.name).unlink()
        except OSError as error:
            log.warning("network namespace %s: %s", self.name, error)
        finally:
            os.close(self._record)
            self._record = -1


def _furnish(mark: str) -> list[str]:
    """Makes a new namespace fit for use. Returns the names of its interfaces."""
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname="lo")
        route.link("set", index=index, state="up", ifalias=mark)
    return sorted(_interfaces())


def _interfaces() -> dict[str, str | None]:
    """Returns the alias of each interface, by name."""
    with IPRoute() as route:
        return {
            link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_IFALIAS")
            for link in route.get_links()
        }


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


def _lock(record: int) -> bool:
    """Locks a record for nobody else. Returns whether nobody had it locked."""
    try:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(path: Path) -> str:
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _remove_left_over(but: str) -> None:
    """Removes namespaces, and records, of processes that were killed, but for the one called so."""
    for path in RECORDS.iterdir():
        if path.name == ".lock":
            continue
        record = _open(path)
        try:
            if _lock(record):
                interfaces = _made_here(record, path.name)
                if interfaces is None:
                    path.unlink()
                elif path.name != but and not _lived_in(path.name, interfaces):
                    netns.remove(path.name)
                    path.unlink()
        finally:
            os.close(record)


def _made_here(record: int, name: str) -> set[str] | None:
    """Returns which interfaces a namespace had when it was made here.

    ``None`` if this record is not of the one that has the name now: its number may have come again,
    the mark inside has not.
    """
    made = _RECORD.fullmatch(os.pread(record, 4096, 0).decode(errors="replace"))
    if made is None:
        return None
    try:
        if _identity(NAMES / name) != made["identity"]:
            return None
        mark = call_in(name, _interfaces).get("lo")
    except OSError:
        return None  # there is none
    return set(made["interfaces"].split()) if mark == made["mark"] else None


def _lived_in(name: str, interfaces: set[str]) -> bool:
    """Tells whether a namespace has other interfaces than these, or processes."""
    return call_in(name, _interfaces).keys() != interfaces or _has_process(_identity(NAMES / name))


def _has_process(identity: str) -> bool:
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has ended, or may not be looked at
            if _identity(process) == identity:
                return True
    return False
