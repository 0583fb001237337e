# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports: the queues of a link, as the card's data path in C takes frames from them and sends them.

A :class:`Port` is a descriptor number that is constant until :meth:`Port.close`. Threads of the
card read and write it while the link replaces what is behind it, in one step: a number that was
closed could be somebody else's file a moment later. How frames go through it is its
:class:`Framing`; the rules are in ``native/ports.c``.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from vhostvmbus.engine import ffi, lib

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_net_port, vvb_net_port_state_p, vvb_net_recording

HEADER_SIZE: Final[int] = lib.VVB_NET_VNET
"""The bytes of the virtio-net header in front of a frame, of :attr:`Framing.DATAGRAM`."""
_PLAIN: Final = bytes(HEADER_SIZE)


class Framing(IntEnum):
    """A way for frames to go through a descriptor, which must not block."""

    DATAGRAM = lib.VVB_NET_PORT_DATAGRAM
    """Each frame has a virtio-net header (Virtual I/O Device 1.2, section 5.1.6) in front, and a
    read or write of its own. TAP devices do it so.
    """
    STREAM = lib.VVB_NET_PORT_STREAM
    """Each frame stands on a stream socket behind its length, 32 bits, big-endian; checksums are
    complete. QEMU's ``-netdev stream`` and passt do it so (passt(1)).
    """


class Port:
    """One queue of a link. Any thread may use it; one at a time in each direction."""

    def __init__(self, framing: Framing, wake_fd: int = -1) -> None:
        """Makes a port with nothing behind it, on which no frame comes and which takes none.

        ``wake_fd`` is an eventfd that is signalled when the rest of a frame waits for room in a
        stream: :meth:`flush` it when the socket is writable.
        """
        handle = lib.vvb_net_port_new(framing, wake_fd)
        if handle == ffi.NULL:
            raise OSError(errno.EMFILE, f"a link's port: {os.strerror(errno.EMFILE)}, or no memory")
        self._port = ffi.gc(handle, lib.vvb_net_port_free)
        self._recording: Pointer[vvb_net_recording] | None = None

    @property
    def handle(self) -> Pointer[vvb_net_port]:
        """The data path's ``struct vvb_net_port *``."""
        return self._port

    def fileno(self) -> int:
        """Returns the descriptor's number; -1 once the port is closed."""
        return int(lib.vvb_net_port_fd(self.handle))

    def put(self, fd: int) -> None:
        """Lets the number mean what ``fd`` means, which stays the caller's.

        What was begun on the descriptor before, in either direction, is forgotten.
        """
        error = lib.vvb_net_port_put(self.handle, fd)
        if error:
            raise OSError(error, os.strerror(error))

    def empty(self) -> None:
        """Lets the number mean nothing."""
        self.put(-1)

    def flush(self) -> bool:
        """Sends what is left of a frame. Returns true if nothing is left."""
        return bool(lib.vvb_net_port_flush(self.handle))

    def _state(self) -> vvb_net_port_state_p:
        state = ffi.new("struct vvb_net_port_state *")
        lib.vvb_net_port_get_state(self._port, state)
        return state

    @property
    def refused(self) -> int:
        """The number of frames that could not be sent."""
        return int(self._state().refused)

    @property
    def too_long(self) -> int:
        """The number of frames that were dropped because the card had too little room for them."""
        return int(self._state().too_long)

    @property
    def missing(self) -> int:
        """The number of frames of a stream of which only the length came."""
        return int(self._state().missing)

    @property
    def broken(self) -> str | None:
        """The reason that frames cannot be made of what comes; ``None`` as long as they can."""
        bad = self.bad_length
        if bad is not None:
            return f"a frame of {bad} bytes"
        closed = self._state().broken == lib.VVB_NET_PORT_CLOSED
        return "the connection was closed" if closed else None

    @property
    def bad_length(self) -> int | None:
        """The length of a frame that cannot be, which ended the stream; ``None`` if none did."""
        state = self._state()
        return state.bad_length if state.broken == lib.VVB_NET_PORT_NONSENSE else None

    def send(self, frame: bytes, header: bytes = _PLAIN) -> bool:
        """Sends a frame that is no card's. Returns false if it was refused."""
        if len(header) != HEADER_SIZE:
            raise ValueError(f"a virtio-net header has {HEADER_SIZE} bytes")
        return bool(lib.vvb_net_port_send(self.handle, header, frame, len(frame)))

    def receive(self, room: int = 1 << 17) -> tuple[bytes, bytes] | None:
        """Takes a frame that is for no card. Returns the virtio-net header and the frame.

        Returns ``None`` if no frame waits. One that is longer than ``room`` bytes is dropped.
        """
        header, data = ffi.new("char[]", HEADER_SIZE), ffi.new("char[]", room)
        size = lib.vvb_net_port_receive(self.handle, header, data, room)
        if size < 0:
            return None
        return bytes(ffi.buffer(header)), bytes(ffi.buffer(data, size))

    def record(self, recording: Pointer[vvb_net_recording]) -> None:
        """Appends what passes from now on to a recording, ``struct vvb_net_recording *``."""
        self._recording = recording  # the port points to it
        lib.vvb_net_port_record(self._port, recording)

    def close(self) -> None:
        """Gives the descriptor up; a second time it does nothing. No frame comes or is taken any
        more.
        """
        lib.vvb_net_port_close(self._port)
