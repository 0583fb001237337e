# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves bytes between the guest's serial ports and what is to be done with them.

One thread reads. What a command wrote is delivered before the message that it ended: the guest
sends that message last, so when it is here, the output is already in our sockets.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from vhostvmbus.vm.ports import Console, Control
from vhostvmbus.vm.qemu_args import PORTS

BLOCK = 1 << 16
Sink = Callable[[bytes], None]


def discard(data: bytes) -> None:
    """Drops output that nobody asked for."""


class Streams:
    """The four ports of one machine. Give :attr:`guest_fds` to QEMU, then :meth:`start`."""

    def __init__(self, log: BinaryIO) -> None:
        self.log_error: OSError | None = None
        """The error that kept some of the console's output from its log."""
        self.lost: dict[str, OSError] = {}
        """The outputs that a sink did not take, and why; a reader that has gone is no loss."""
        self._log = log
        self.console = Console(sinks=[self._write_log])
        self.control = Control()
        self.stdout: Sink = discard
        self.stderr: Sink = discard
        self.changed = threading.Condition()
        self._ours: dict[str, socket.socket] = {}
        self._theirs: dict[str, socket.socket] = {}
        for name, _, _ in PORTS:
            self._ours[name], self._theirs[name] = socket.socketpair()
            self._ours[name].setblocking(False)
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._pump, name="streams", daemon=True)

    @property
    def guest_fds(self) -> dict[str, int]:
        """The ends that QEMU gets, by name."""
        return {name: sock.fileno() for name, sock in self._theirs.items()}

    def start(self) -> None:
        """Reads from now on; QEMU has its ends."""
        for sock in self._theirs.values():
            sock.close()
        self._thread.start()

    def send(self, port: str, data: bytes) -> None:
        """Sends bytes into a port; waits while the guest does not take them."""
        view = memoryview(data)
        sock = self._ours[port]
        while view:
            try:
                view = view[sock.send(view) :]
            except BlockingIOError:
                time.sleep(0.01)
            except (BrokenPipeError, ConnectionResetError):
                return

    def close(self) -> None:
        """Stops reading, after the bytes that are there have been read."""
        self._waker.close()
        if self._thread.is_alive():
            self._thread.join(10.0)
        for sock in (*self._ours.values(), *self._theirs.values(), self._wake):
            sock.close()

    def _pump(self) -> None:
        with selectors.DefaultSelector() as selector:
            for name, sock in self._ours.items():
                selector.register(sock, selectors.EVENT_READ, name)
            selector.register(self._wake, selectors.EVENT_READ, "wake")
            while True:
                ready = {key.data for key, _ in selector.select()}
                for name in ready - {"wake"}:
                    if not self._take(name):
                        selector.unregister(self._ours[name])
                if "wake" in ready:
                    return

    def _take(self, name: str) -> bool:
        """Handles the bytes that one port has; returns false when the port has ended."""
        try:
            data = self._ours[name].recv(BLOCK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        with self.changed:
            if data and name == "control":  # what the guest wrote before that comes before it
                for output in ("console", "stdout", "stderr"):
                    self._drain(output)
            if data:
                self._deliver(name, data)
            self.changed.notify_all()
        return bool(data)

    def _drain(self, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := self._ours[name].recv(BLOCK):
                self._deliver(name, data)

    def _deliver(self, name: str, data: bytes) -> None:
        if name == "console":
            self.console.feed(data)
        elif name == "control":
            ready = self.control.ready
            self.control.feed(data)
            if self.control.ready > ready:
                self.console.booting = False
        elif name not in self.lost:  # what comes behind a gap is of no use
            try:
                (self.stdout if name == "stdout" else self.stderr)(data)
            except BrokenPipeError:
                pass  # the command goes on, as in a pipe without signals
            except OSError as error:
                self.lost[name] = error

    def _write_log(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._log.write(data) :]
        except OSError as error:
            self.log_error = self.log_error or error
