# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine that is stopped, and back ends in the test's own process that do not answer."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.support.vhost_user_server import Running, running
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vm.qmp import Monitor

DEVICE = {"driver": "vhost-user-vmbus", "chardev": "c0", "id": "dev0"}
SHORT = 2000
"""The milliseconds that a back end has for an answer where it is known to give none."""
LATE = r"did not answer in 2 seconds"


class Qemu:
    """A machine that is stopped, with two monitors; ``said`` is what QEMU has to say."""

    def __init__(self, command: list[str], said: Path) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        words = [*command, "-S"]
        for name, (_, theirs) in zip("ab", pairs, strict=True):
            words += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
            words += ["-mon", f"{name},mode=control"]
        self.said = said
        with said.open("w") as stderr:
            self.child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[theirs.fileno() for _, theirs in pairs],
            )
        for _, theirs in pairs:
            theirs.close()
        self.monitor, self.other = (Monitor(ours) for ours, _ in pairs)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self.monitor.close()
        self.other.close()


@contextlib.contextmanager
def qemu_with(command: list[str], folder: Path) -> Iterator[Qemu]:
    qemu = Qemu(command, folder / "said")
    try:
        yield qemu
    finally:
        qemu.close()


def add_dimm(qemu: Qemu, number: int) -> None:
    """Plugs 2 MiB of memory in, under a name with ``number``."""
    memory = {"qom_type": "memory-backend-memfd", "id": f"m{number}", "size": 2 << 20}
    qemu.monitor.command("object-add", share=True, **memory)
    qemu.monitor.command("device_add", driver="pc-dimm", memdev=f"m{number}", id=f"d{number}")


def options(path: Path, device: str | None = None) -> tuple[str, ...]:
    """Returns QEMU's options for the back end at ``path``.

    Its device is plugged if ``device`` has its properties, or is empty.
    """
    words = ["vhost-user-vmbus,chardev=c0,id=dev0", *([device] if device else [])]
    return (
        *("-object", "memory-backend-memfd,id=mem,size=128M,share=on"),
        *("-machine", "memory-backend=mem"),
        *("-chardev", f"socket,id=c0,path={path},reconnect-ms=20"),
        *(() if device is None else ("-device", ",".join(words))),
    )


class Stall:
    """Has a back end stop to answer when it is asked for ``what``, until the test is over."""

    def __init__(self, run: Running, what: str) -> None:
        self.run = run
        self.reached = threading.Semaphore(0)
        self._what = what
        self._delay = 0.0
        self._over = threading.Event()
        back_end = run.back_end
        back_end.make_inflight = self._no_inflight  # type: ignore[attr-defined]
        back_end.connected = lambda: self._note("connected")  # type: ignore[method-assign]
        back_end.open_channel = lambda *words: self._note("open")  # type: ignore[method-assign]
        back_end._note = self._note  # type: ignore[method-assign]

    def stop_at(self, what: str) -> None:
        """Has the back end stop to answer at the next request for ``what``."""
        self._what = what

    def _no_inflight(self, channels: int) -> NoReturn:
        raise OSError("none here")

    def slow_down(self, seconds: float) -> None:
        """Has the back end take so long for each request from now on."""
        self._delay = seconds

    def _note(self, *call: object) -> None:
        self.run.back_end.calls.append(call)
        time.sleep(self._delay)
        if call[0] == self._what:
            self._wait()
        if call[0] in self.run.back_end.refuse:
            raise self.run.back_end.refuse[str(call[0])]

    def _wait(self) -> None:
        self.reached.release()
        assert self._over.wait(60)

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def stalling(path: Path, what: str = "", limits: ConnectionLimits | None = None) -> Iterator[Stall]:
    """A back end at ``path`` that stops to answer when it is asked for ``what``, if at all."""
    with running(path, limits=limits) as run:
        stall = Stall(run, what)
        try:
            yield stall
        finally:
            stall.end()


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(30)
        yield listener
    path.unlink()
