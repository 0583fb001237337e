# SPDX-License-Identifier: GPL-2.0-or-later
"""Ethernet frames on a stream socket: each has its length before it, 32 bits, big-endian.

It is how QEMU's ``-netdev stream`` and passt talk (passt(1)). Invariants: the socket is readable
exactly while a frame, or a part of one, waits: with a frame the length of the next one is read,
and nothing further. A frame that came whole goes from the socket straight into the reader's
buffers; one that came in parts is put together here first. Nothing waits; what cannot be sent is
refused whole, except for the rest of a frame whose beginning is sent, which is kept.
"""

import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Final

from vhostvmbus.devices.net.link import Buffer

LENGTH_SIZE: Final = 4
MIN_FRAME: Final = 14
MAX_FRAME: Final = 65535 + 18
"""Bytes: the longest IP packet, an Ethernet header and a VLAN tag."""
_SNDBUFFORCE: Final = 32
"""``asm-generic/socket.h``."""
MAX_PIECES: Final = 1000
"""Below IOV_MAX of Linux, 1024."""


class StreamBroken(Exception):
    """The peer closed its end, or what it sends is not frames."""


class FrameSocket:
    """A connected stream socket, non-blocking from now on. One thread at a time in each
    direction; :meth:`close` by anybody who keeps both out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._too_long = 0
        self._length = bytearray(LENGTH_SIZE)
        self._known = 0
        """Bytes of ``_length`` that are here."""
        self._partial: bytearray | None = None
        """The beginning of a frame whose rest has not come."""
        self._rest = b""
        """The rest of a frame whose beginning was sent."""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def shut_down(self) -> None:
        """End the connection, so that everybody who polls the socket sees it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def unread(self) -> int:
        """Whether the peer has not yet read all that was sent: more than 0."""
        answer = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        unread: int = struct.unpack("=i", answer)[0]
        return unread

    def take_too_long(self) -> int:
        """Frames dropped, since the last call, because the reader had too little room."""
        count, self._too_long = self._too_long, 0
        return count

    # -- receiving ---------------------------------------------------------------------------------

    def receive_into(self, buffers: Sequence[memoryview]) -> int | None:
        """One frame, scattered over *buffers*: its length; None if none is here whole.

        A frame longer than the buffers is dropped and counted. Raises :class:`StreamBroken`.
        """
        while True:
            size = self._frame_length()
            if size is None:
                return None
            if self._partial is None and (places := _trimmed(buffers, size)) is not None:
                got = self._read([*places, self._length])
                if got is None:
                    return None
                if got >= size:
                    self._known = got - size
                    return size
                self._partial = bytearray(b"".join(places)[:got])
            frame = self._read_rest(size)
            if frame is None:
                return None
            self._partial, self._known = None, 0
            if (places := _trimmed(buffers, size)) is not None:
                _scatter(frame, places)
                return size
            self._too_long += 1

    def _frame_length(self) -> int | None:
        while self._known < LENGTH_SIZE:
            got = self._read([memoryview(self._length)[self._known :]])
            if got is None:
                return None
            self._known += got
        size: int = struct.unpack(">I", self._length)[0]
        if not MIN_FRAME <= size <= MAX_FRAME:
            raise StreamBroken(f"a frame of {size} bytes")
        return size

    def _read_rest(self, size: int) -> bytearray | None:
        """The frame that began in ``_partial``, when it is whole."""
        if self._partial is None:
            self._partial = bytearray()
        while len(self._partial) < size:
            piece = bytearray(size - len(self._partial))
            got = self._read([piece])
            if got is None:
                return None
            self._partial += memoryview(piece)[:got]
        return self._partial

    def _read(self, places: Sequence[bytearray | memoryview]) -> int | None:
        try:
            got = self.socket.recvmsg_into(places)[0]
        except BlockingIOError:
            return None
        except OSError as error:
            raise StreamBroken(error.strerror or str(error)) from error
        if got == 0:
            raise StreamBroken("the connection was closed")
        return got

    # -- sending -----------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether the rest of a frame waits; call :meth:`flush` when the socket is writable."""
        return bool(self._rest)

    def flush(self) -> bool:
        """Send what is left of a frame; True if nothing is left."""
        while self._rest:
            try:
                self._rest = self._rest[self.socket.send(self._rest) :]
            except OSError:
                return False
        return True

    def send(self, pieces: Sequence[Buffer]) -> bool:
        """One frame; False if there is no room for it, or nobody at the other end."""
        size = sum([len(piece) for piece in pieces])
        if not MIN_FRAME <= size <= MAX_FRAME or not self.flush():
            return False
        if len(pieces) > MAX_PIECES:
            pieces = [b"".join(pieces)]
        length = struct.pack(">I", size)
        try:
            sent = self.socket.sendmsg([length, *pieces])
        except OSError:
            return False
        if sent < LENGTH_SIZE + size:
            self._rest = b"".join([length, *pieces])[sent:]
            self.flush()
        return True


def _trimmed(buffers: Sequence[memoryview], size: int) -> list[memoryview] | None:
    """The first *size* bytes of *buffers*; None if there are not so many."""
    places = []
    for buffer in buffers:
        if len(buffer) >= size:
            places.append(buffer if len(buffer) == size else buffer[:size])
            return places
        places.append(buffer)
        size -= len(buffer)
    return None


def _scatter(frame: Buffer, places: Sequence[memoryview]) -> None:
    start = 0
    for place in places:
        place[:] = frame[start : start + len(place)]
        start += len(place)


def connected_pair(buffer_size: int) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that hold *buffer_size* bytes, or as many as the host allows.

    An ordinary user gets at most ``net.core.wmem_max``, root as many as wanted.
    """
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, buffer_size)
        except OSError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_size)
    return pair
