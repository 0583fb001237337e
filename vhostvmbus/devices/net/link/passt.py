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
import logging
import os
import select
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from vhostvmbus.devices.net.link import PLAIN, Buffer, Capabilities, LinkDown, Offload
from vhostvmbus.devices.net.link.frames import FrameSocket, StreamBroken, connected_pair
from vhostvmbus.devices.net.link.idle import Slot
from vhostvmbus.devices.net.link.spec import MAX_MTU, LinkSpec

log = logging.getLogger(__name__)

PROGRAM: Final = "passt"
SOCKET_BUFFER: Final = 4 << 20
START_PATIENCE: Final = 5.0
"""Seconds that passt has from its start until it takes frames."""
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
"""Seconds between its end and its next start: doubled each time that it did not live long."""
_LAST_WORDS: Final = 10
_NOISE: Final = ("Failed to send", "Don't run as root")
"""What passt says to a system without a system logger, and to root."""
_NO_NETWORK: Final = "External interface not usable"
"""What passt says when the host itself has no network."""
_PROBE: Final = bytes(6) + b"\x02" + bytes(5) + b"\x88\xb5" + bytes(46)
"""A frame of the "local experimental" type (IEEE 802, 88-B5), which nobody answers."""


class Passt:
    """A link to a passt process; see :class:`~vhostvmbus.devices.net.link.Link`."""

    name = "user"
    queues = 1
    capabilities = Capabilities()
    direct = False

    def __init__(self, spec: LinkSpec) -> None:
        """Start passt. Raises LinkDown if it is not there or does not start.

        A host without network is no reason to fail: the link is down until there is one.
        """
        program = shutil.which(PROGRAM)
        if program is None:
            raise LinkDown("user-mode network needs the program passt: apt install passt")
        self.mac = spec.mac
        self.mtu = spec.mtu or 1500
        self._words = [program, *arguments(spec, self.mtu)]
        self._changed: Callable[[], None] = lambda: None
        self._slot = Slot()
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: FrameSocket | None = None
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._broken = self._silent = False
        """Frames cannot be made of what comes; nothing more will be said."""
        self._said: deque[str] = deque(maxlen=_LAST_WORDS)
        self._counters = {"send_failed": 0, "too_long": 0, "ended": 0}
        self._pause = FIRST_PAUSE
        self._started_at = 0.0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
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
        """Start passt and wait until it takes frames. Raises LinkDown."""
        ours, theirs = connected_pair(SOCKET_BUFFER)
        frames = FrameSocket(ours)
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
                frames.close()
                raise LinkDown(f"passt cannot be started: {error.strerror}") from error
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        if not self._takes_frames(process, frames):
            frames.close()
            self._end(process)
            raise LinkDown(f"passt did not start: {self._last_words()}")
        with self._sending, self._receiving:
            self._slot.put(os.dup(ours.fileno()))
            self._process, self._frames = process, frames
            self._broken = self._silent = False

    def _takes_frames(self, process: "subprocess.Popen[bytes]", frames: FrameSocket) -> bool:
        """Send a frame that nobody answers, and see whether it is taken."""
        frames.send([_PROBE])
        deadline = time.monotonic() + START_PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if not frames.unread():
                return True
            time.sleep(0.01)
        return False

    def _listen(self, process: "subprocess.Popen[bytes]") -> bool:
        """Take what passt has to say; False when it will say nothing more."""
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
        """See a process off, one that does not end by itself too."""
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listen(process)
        assert process.stderr is not None
        process.stderr.close()

    def start(self, changed: Callable[[], None]) -> None:
        """Look after the process from now on."""
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
        """Wait until there is something to do for the process that runs."""
        process, frames = self._process, self._frames
        assert process is not None
        assert process.stderr is not None
        assert frames is not None
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if not self._silent:
            poll.register(process.stderr.fileno(), select.POLLIN)
        poll.register(frames.socket, select.POLLOUT if frames.unfinished else 0)
        ready = dict(poll.poll())
        if self._closing:
            return
        if self._wake in ready:
            os.eventfd_read(self._wake)
        state = ready.get(frames.socket.fileno(), 0)
        if state & select.POLLOUT:
            with self._sending:
                frames.flush()
        self._silent = not self._listen(process)
        if state & (select.POLLHUP | select.POLLERR):
            self._lose(process, frames)

    def _lose(self, process: "subprocess.Popen[bytes]", frames: FrameSocket) -> None:
        with self._sending, self._receiving:
            self._slot.empty()
            self._process = self._frames = None
            frames.close()
        self._end(process)
        self._counters["ended"] += 1
        log.error(
            "passt ended with status %s (%s); the network card has no link until it runs again",
            process.returncode,
            self._last_words(),
        )
        self._changed()

    # -- the link ----------------------------------------------------------------------------------

    def carrier(self) -> bool:
        """Whether passt runs."""
        return self._frames is not None and not self._broken

    def fileno(self, queue: int) -> int:
        """The socket."""
        return self._slot.number

    def receive_into(self, queue: int, buffers: Sequence[memoryview]) -> tuple[int, Offload] | None:
        """One frame from passt."""
        with self._receiving:
            frames = self._frames
            if frames is None or self._broken:
                return None
            try:
                size = frames.receive_into(buffers)
            except StreamBroken as error:
                self._broken = True
                self._said.append(str(error))
                self._slot.empty()
                frames.shut_down()  # the thread that looks after it sees to the rest
                return None
            finally:
                self._counters["too_long"] += frames.take_too_long()
        return None if size is None else (size, PLAIN)

    def send(self, queue: int, pieces: Sequence[Buffer], offload: Offload) -> bool:
        """One frame to passt."""
        with self._sending:
            frames = self._frames
            if frames is None or offload.needs_checksum or offload.gso or not frames.send(pieces):
                self._counters["send_failed"] += 1
                return False
            if frames.unfinished:
                os.eventfd_write(self._wake, 1)
        return True

    def use_queues(self, count: int) -> None:
        """There is one."""
        if count != 1:
            raise ValueError("user-mode network has one queue")

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """passt leaves nothing undone."""

    def set_mtu(self, mtu: int) -> None:
        """passt takes packets of any size; what it gave by DHCP stays given."""
        if mtu > MAX_MTU:
            raise OSError(22, f"passt takes packets of up to {MAX_MTU} bytes")
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        """Frames dropped, by reason; how often passt ended."""
        return dict(self._counters)

    def close(self) -> None:
        """End passt: its connection is closed."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        if self._frames is not None:
            self._frames.close()
        self._slot.close()  # the last descriptor of the connection
        if self._process is not None:
            self._end(self._process)
        os.close(self._wake)


def arguments(spec: LinkSpec, mtu: int) -> list[str]:
    """passt's command line, but for the socket."""
    words = ["--foreground", "--quiet", "--mtu", str(mtu)]
    for forward in spec.forwards:
        option = "--tcp-ports" if forward.protocol == "tcp" else "--udp-ports"
        words += [option, f"{forward.address}/{forward.host_port}:{forward.guest_port}"]
    return words
