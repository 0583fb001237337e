# SPDX-License-Identifier: GPL-2.0-or-later
"""Records what crosses a link, in a file that Wireshark and tcpdump open.

The format is pcapng (draft-ietf-opsawg-pcapng): one section, one Ethernet interface, and an
enhanced packet block for each frame with its time in nanoseconds and its direction as the host
sees it (inbound: from the guest). A frame is recorded as it crosses: checksums that are left to be
computed are not there yet, and a segment that is left to be cut is one long frame.

Invariants: after each frame the file is whole, for whoever reads it meanwhile; traffic never
suffers. When the disk is full, the file ends with the last whole block, what cannot be recorded is
counted, and recording goes on when there is room again.
"""

import fcntl
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from vhostvmbus.devices.net.link import Buffer, Capabilities, Link, LinkDown, Offload

log = logging.getLogger(__name__)

_SECTION: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_PACKET: Final = 6
_BYTE_ORDER: Final = 0x1A2B3C4D
_ETHERNET: Final = 1
"""LINKTYPE_ETHERNET."""
_SNAP_LENGTH: Final = 1 << 18
_OPTION_NAME: Final = 2
_OPTION_RESOLUTION: Final = 9
_OPTION_FLAGS: Final = 2
INBOUND: Final = 1
OUTBOUND: Final = 2
_FRAME: Final = struct.Struct("<IIIIIII")
"""Block type and length, interface, time (high, low), captured and original length."""
_FRAME_END: Final = struct.Struct("<HHIHHI")
"""The option "flags", the end of options, and the block's length again."""
MAX_PIECES: Final = 1000
"""Below IOV_MAX of Linux, 1024."""
RETRY: Final = 1.0
"""Seconds for which nothing is recorded after the file could not be written."""


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes) -> bytes:
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def file_header(name: str) -> bytes:
    """What a file begins with; *name* is the interface's, for the reader."""
    section = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)
    options = _option(_OPTION_NAME, name.encode()[:255]) + _option(_OPTION_RESOLUTION, b"\x09")
    interface = struct.pack("<HHI", _ETHERNET, 0, _SNAP_LENGTH) + options + bytes(4)
    return _block(_SECTION, section) + _block(_INTERFACE, interface)


class Recording:
    """A file that frames are appended to; any thread may."""

    def __init__(self, path: str, name: str) -> None:
        """Begin *path* anew. Raises LinkDown if that is impossible or another records there."""
        self._path = path
        self._lock = threading.Lock()
        self._end = 0
        self._not_before = 0.0
        self.lost = 0
        """Frames that could not be recorded."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise LinkDown(f"pcap={path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise LinkDown(f"pcap={path}: not a file")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            header = file_header(name)
            if os.write(self._fd, header) != len(header):
                raise LinkDown(f"pcap={path}: no space left on device")
            self._end = len(header)
        except BlockingIOError as error:
            os.close(self._fd)
            raise LinkDown(f"pcap={path}: another one records there") from error
        except OSError as error:
            os.close(self._fd)
            if isinstance(error, LinkDown):
                raise
            raise LinkDown(f"pcap={path}: {error.strerror}") from error

    def add(self, direction: int, pieces: Sequence[Buffer], size: int, when: int) -> None:
        """Record the first *size* bytes of *pieces*, a frame, *when* nanoseconds after 1970."""
        if len(pieces) > MAX_PIECES:
            pieces = [b"".join(pieces)]
        padding = -size % 4
        total = _FRAME.size + size + padding + _FRAME_END.size
        words: list[Buffer] = [
            _FRAME.pack(_PACKET, total, 0, when >> 32, when & 0xFFFFFFFF, size, size)
        ]
        left = size
        for piece in pieces:
            if len(piece) >= left:
                words.append(memoryview(piece)[:left])
                break
            words.append(piece)
            left -= len(piece)
        end = _FRAME_END.pack(_OPTION_FLAGS, 4, direction, 0, 0, total)
        words.append(bytes(padding) + end)
        with self._lock:
            self._append(words, total)

    def _append(self, words: Sequence[Buffer], total: int) -> None:
        if self._not_before and time.monotonic() < self._not_before:
            self.lost += 1
            return
        try:
            written = os.pwritev(self._fd, words, self._end)
            if written == total:
                self._end += total
                if self._not_before:
                    log.warning("pcap=%s: recording again", self._path)
                    self._not_before = 0.0
                return
            reason = "no space left on device"
        except OSError as error:
            reason = error.strerror or str(error)
        self.lost += 1
        if not self._not_before:
            log.error("pcap=%s: %s; frames are not recorded for now", self._path, reason)
        self._not_before = time.monotonic() + RETRY
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            log.error("pcap=%s: %s", self._path, error.strerror)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Recorded:
    """A link whose frames are recorded; all else is the other link's."""

    def __init__(self, link: Link, path: str) -> None:
        """Raises LinkDown if the file cannot be made; *link* stays the caller's then."""
        self._recording = Recording(path, link.name)
        self._link = link

    @property
    def name(self) -> str:
        """As of the link."""
        return self._link.name

    @property
    def queues(self) -> int:
        """As of the link."""
        return self._link.queues

    @property
    def mtu(self) -> int:
        """As of the link."""
        return self._link.mtu

    @property
    def mac(self) -> bytes | None:
        """As of the link."""
        return self._link.mac

    @property
    def direct(self) -> bool:
        """False: all frames have to come by."""
        return False

    @property
    def capabilities(self) -> Capabilities:
        """As of the link."""
        return self._link.capabilities

    def start(self, changed: Callable[[], None]) -> None:
        """As of the link."""
        self._link.start(changed)

    def carrier(self) -> bool:
        """As of the link."""
        return self._link.carrier()

    def fileno(self, queue: int) -> int:
        """As of the link."""
        return self._link.fileno(queue)

    def receive_into(self, queue: int, buffers: Sequence[memoryview]) -> tuple[int, Offload] | None:
        """As of the link, and recorded."""
        received = self._link.receive_into(queue, buffers)
        if received is not None:
            self._recording.add(OUTBOUND, buffers, received[0], time.time_ns())
        return received

    def send(self, queue: int, pieces: Sequence[Buffer], offload: Offload) -> bool:
        """As of the link, and recorded if the link took it."""
        when = time.time_ns()  # the answer may be recorded before this frame is
        sent = self._link.send(queue, pieces, offload)
        if sent:
            self._recording.add(INBOUND, pieces, sum([len(piece) for piece in pieces]), when)
        return sent

    def use_queues(self, count: int) -> None:
        """As of the link."""
        self._link.use_queues(count)

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """As of the link."""
        self._link.use_receive_offloads(wanted)

    def set_mtu(self, mtu: int) -> None:
        """As of the link."""
        self._link.set_mtu(mtu)

    def stats(self) -> dict[str, int]:
        """As of the link, and the frames that could not be recorded."""
        return {**self._link.stats(), "not_recorded": self._recording.lost}

    def close(self) -> None:
        """As of the link; then the file is complete."""
        self._link.close()
        self._recording.close()
