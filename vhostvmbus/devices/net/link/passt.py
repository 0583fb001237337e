# SPDX-License-Identifier: GPL-2.0-or-later
"""User-mode network: passt(1) turns the guest's packets into sockets of an ordinary user.

One passt process for each card. It answers DHCP, NDP and DNS for the guest, carries its TCP, UDP
and pings out, and forwarded ports in. It is given its end of a socket pair (``--fd``), so it
ends with that connection, that is, with this process at the latest. When it ends by itself, the
link is down, and it is started again.

Frames on the socket are whole: passt knows no offloads, and :attr:`Passt.capabilities` say so.
Made for passt 2023-03-09 (Debian 12) and newer.
"""

import contextlib
import fcntl
import logging
import os
import select
import shutil
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from vhostvmbus.devices.net.link import Capabilities, LinkDown
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.devices.net.link.spec import MAX_MTU, LinkSpec

log = logging.getLogger(__name__)

PROGRAM: Final = "passt"
SOCKET_BUFFER: Final = 4 << 20
_SNDBUFFORCE: Final = 32
"""The option's number in ``asm-generic/socket.h``."""
START_PATIENCE: Final = 5.0
"""The seconds that passt has from its start until it takes frames."""
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
"""The most seconds between two starts: doubled each time that passt did not live long."""
_LAST_WORDS: Final = 10
_NOISE: Final = ("Failed to send", "Don't run as root")
"""Words of passt to a system without a system logger, and to root, which are not repeated."""
_NO_NETWORK: Final = "External interface not usable"
"""The words of passt when the host itself has no network."""
_PROBE: Final = bytes(6) + b"\x02" + bytes(5) + b"\x88\xb5" + bytes(46)
"""A frame of the "local experimental" type (IEEE 802, 88-B5), which nobody answers."""


class Passt:
    """A link to a passt process; see :class:`~vhostvmbus.devices.net.link.Link`."""

    name = "user"
    queues = 1
    capabilities = Capabilities()

    def __init__(self, spec: LinkSpec) -> None:
        """Starts passt. Raises LinkDown if it is not there or does not start.

        A host without network is no reason to fail: the link is down until there is one.
        """
        program = shutil.which(PROGRAM)
        if program is None:
            raise LinkDown("user-mode network needs the program passt: apt install passt")
        self.mac = spec.mac
        self.mtu = spec.mtu or 1500
        self._words = [program, *arguments(spec, self.mtu)]
        self._changed: Callable[[], None] = lambda: None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._silent = False
        """Set once nothing more will be said."""
        self._said: deque[str] = deque(maxlen=_LAST_WORDS)
        self._ended = 0
        self._pause = FIRST_PAUSE
        self._started_at = 0.0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._port = Port(Framing.STREAM, self._wake)
        self._closing = False
        self._thread = threading.Thread(target=self._tend, name="passt", daemon=True)
        try:
            self._start()
        except LinkDown as error:
            if _NO_NETWORK not in str(error):
                self.close()
                raise
            log.warning("%s; trying again until the host has a network", error)
        except BaseException:
            self.close()
            raise

    # -- the process -------------------------------------------------------------------------------

    def _start(self) -> None:
        """Starts passt and wait until it takes frames. Raises LinkDown."""
        ours, theirs = connected_pair(SOCKET_BUFFER)
        ours.setblocking(False)
        self._started_at = time.monotonic()
        self._said.clear()
        with theirs:
            try:
                process = subprocess.Popen(
                    [*self._words, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise LinkDown(f"passt cannot be started: {error.strerror}") from error
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        if not self._takes_frames(process, ours):
            ours.close()
            self._end(process)
            raise LinkDown(f"passt did not start: {self._last_words()}")
        self._silent = False
        self._port.put(ours.fileno())
        self._process, self._socket = process, ours

    def _takes_frames(self, process: "subprocess.Popen[bytes]", ours: socket.socket) -> bool:
        """Sends a frame that nobody answers. Returns whether it was taken."""
        with contextlib.suppress(OSError):  # it has ended already
            ours.send(struct.pack(">I", len(_PROBE)) + _PROBE)
        deadline = time.monotonic() + START_PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if not _unread(ours):
                return True
            time.sleep(0.01)
        return False

    def _listen(self, process: "subprocess.Popen[bytes]") -> bool:
        """Takes what passt has to say. Returns false when it will say nothing more."""
        assert process.stderr is not None
        while True:
            data = process.stderr.read(4096)
            if data is None:
                return True
            if not data:
                return False
            for line in data.decode(errors="replace").splitlines():
                if line.strip() and not line.startswith(_NOISE):
                    self._said.append(line.strip())
                    log.info("passt: %s", line.strip())

    def _last_words(self) -> str:
        return "; ".join(self._said) or "it said nothing"

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """Ends a process, one that does not end by itself too."""
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listen(process)
        assert process.stderr is not None
        process.stderr.close()

    def start(self, changed: Callable[[], None]) -> None:
        """Looks after the process from now on."""
        self._changed = changed
        self._thread.start()

    def _tend(self) -> None:
        while not self._closing:
            if self._process is None:
                self._restart()
            else:
                self._wait()

    def _restart(self) -> None:
        if time.monotonic() - self._started_at > 2 * LONGEST_PAUSE:
            self._pause = FIRST_PAUSE
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._closing or poll.poll(self._pause * 1000) or self._closing:
            return
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        try:
            self._start()
        except LinkDown as error:
            log.warning("%s", error)
            return
        log.warning("passt runs; the network card has its link")
        self._changed()

    def _wait(self) -> None:
        """Waits until there is something to do for the process that runs."""
        process, ours = self._process, self._socket
        assert process is not None
        assert process.stderr is not None
        assert ours is not None
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if not self._silent:
            poll.register(process.stderr.fileno(), select.POLLIN)
        poll.register(ours, 0 if self._port.flush() else select.POLLOUT)
        ready = dict(poll.poll())
        if self._closing:
            return
        if self._wake in ready:
            os.eventfd_read(self._wake)
        self._silent = not self._listen(process)
        if ready.get(ours.fileno(), 0) & (select.POLLHUP | select.POLLERR):
            self._lose(process, ours)

    def _lose(self, process: "subprocess.Popen[bytes]", ours: socket.socket) -> None:
        bad, closed = self._port.bad_length, self._port.broken
        if closed and bad is None:
            self._said.append(closed)
        self._process = self._socket = None
        self._port.empty()
        ours.close()
        self._end(process)
        self._ended += 1
        if bad is None:
            why = f"ended with status {process.returncode} ({self._last_words()})"
        else:
            why = f"was ended, because it sent a frame of {bad} bytes"
        log.error(
            "passt %s; the network card has no link until it runs again, and the guest's "
            "connections of before hang",
            why,
        )
        self._changed()

    # -- the link ----------------------------------------------------------------------------------

    def carrier(self) -> bool:
        """Tells whether passt runs."""
        return self._socket is not None and self._port.broken is None

    def port(self, queue: int) -> Port:
        """Returns the port to the socket."""
        return self._port

    def use_queues(self, count: int) -> None:
        """Takes one queue, which there is."""
        if count != 1:
            raise ValueError("user-mode network has one queue")

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Does nothing: passt leaves nothing undone."""

    def set_mtu(self, mtu: int) -> None:
        """Does nothing: passt takes packets of any size, and what it gave by DHCP stays given."""
        if mtu > MAX_MTU:
            raise OSError(22, f"passt takes packets of up to {MAX_MTU} bytes")
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        """Returns how many frames were dropped, by reason, and how often passt ended."""
        return {
            "send_failed": self._port.refused,
            "too_long": self._port.too_long,
            "missing": self._port.missing,
            "ended": self._ended,
        }

    def close(self) -> None:
        """Ends passt: its connection is closed."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        if self._socket is not None:
            self._socket.close()
        self._port.close()  # the last descriptor of the connection
        if self._process is not None:
            self._end(self._process)
        os.close(self._wake)


def arguments(spec: LinkSpec, mtu: int) -> list[str]:
    """Returns passt's command line, but for the socket."""
    words = ["--foreground", "--quiet", "--mtu", str(mtu)]
    for forward in spec.forwards:
        option = "--tcp-ports" if forward.protocol == "tcp" else "--udp-ports"
        words += [option, f"{forward.address}/{forward.host_port}:{forward.guest_port}"]
    return words


def _unread(ours: socket.socket) -> int:
    """Returns more than 0 if the peer has not yet read all that was sent."""
    answer = fcntl.ioctl(ours, termios.TIOCOUTQ, bytes(4))
    unread: int = struct.unpack("=i", answer)[0]
    return unread


def connected_pair(buffer_size: int) -> tuple[socket.socket, socket.socket]:
    """Returns two connected sockets that hold ``buffer_size`` bytes, or as many as the host allows.

    An ordinary user gets at most ``net.core.wmem_max``, root as many as asked for.
    """
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, buffer_size)
        except OSError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_size)
    return pair
