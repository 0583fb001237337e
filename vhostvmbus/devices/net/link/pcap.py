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

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vhostvmbus.devices.net.link import Capabilities, Link, LinkDown
from vhostvmbus.devices.net.link.port import Port
from vhostvmbus.engine import ffi, lib

if TYPE_CHECKING:
    from vhostvmbus._engine import vvb_net_recording_state_p

log = logging.getLogger(__name__)

_SECTION: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_BYTE_ORDER: Final = 0x1A2B3C4D
_ETHERNET: Final = 1
"""The format's LINKTYPE_ETHERNET."""
_SNAP_LENGTH: Final = 1 << 18
_OPTION_NAME: Final = 2
_OPTION_RESOLUTION: Final = 9
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
    """Returns what a file begins with; ``name`` is the interface's, for the reader."""
    section = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)
    options = _option(_OPTION_NAME, name.encode()[:255]) + _option(_OPTION_RESOLUTION, b"\x09")
    interface = struct.pack("<HHI", _ETHERNET, 0, _SNAP_LENGTH) + options + bytes(4)
    return _block(_SECTION, section) + _block(_INTERFACE, interface)


class Recording:
    """A file that frames are appended to as they pass a port, in C (``native/recording.c``).

    A thread of its own logs what happens to the file.
    """

    def __init__(self, path: str, name: str) -> None:
        """Begins ``path`` anew. Raises LinkDown if that is impossible or another records there."""
        self._path = path
        self._closing = False
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
        except BlockingIOError as error:
            os.close(self._fd)
            raise LinkDown(f"pcap={path}: another one records there") from error
        except OSError as error:
            os.close(self._fd)
            if isinstance(error, LinkDown):
                raise
            raise LinkDown(f"pcap={path}: {error.strerror}") from error
        self._news = os.eventfd(0, os.EFD_CLOEXEC)
        handle = lib.vvb_net_recording_new(self._fd, len(header), int(RETRY * 1e9), self._news)
        if handle == ffi.NULL:
            raise MemoryError("a recording")
        self._handle = ffi.gc(handle, lib.vvb_net_recording_free)
        self._thread = threading.Thread(target=self._watch, name="pcap", daemon=True)
        self._thread.start()

    def _state(self) -> vvb_net_recording_state_p:
        state = ffi.new("struct vvb_net_recording_state *")
        lib.vvb_net_recording_get_state(self._handle, state)
        return state

    @property
    def lost(self) -> int:
        """The number of frames that could not be recorded."""
        return int(self._state().lost)

    def record(self, port: Port) -> None:
        """Appends what passes there from now on, until the port is closed."""
        port.record(self._handle)

    def _watch(self) -> None:
        said = 0
        while not self._closing:
            os.eventfd_read(self._news)
            said = self._say(said)

    def _say(self, said: int) -> int:
        """Logs what has become of the file since ``said`` was what kept it from being written."""
        state = self._state()
        error = int(state.error)
        if error and not said:
            reason = os.strerror(error) if error != errno.ENOSPC else "no space left on device"
            log.error("pcap=%s: %s; frames are not recorded for now", self._path, reason)
            if state.cut_error:
                log.error("pcap=%s: %s", self._path, os.strerror(state.cut_error))
        elif said and not error:
            log.warning("pcap=%s: recording again", self._path)
        return error

    def close(self) -> None:
        """Closes the file, which nobody appends to any more."""
        if not self._closing:
            self._closing = True
            os.eventfd_write(self._news, 1)
            self._thread.join()
            lib.vvb_net_recording_end(self._handle)
            os.close(self._news)
            os.close(self._fd)


class Recorded:
    """A link whose frames are recorded; all else is the other link's."""

    def __init__(self, link: Link, path: str) -> None:
        """Makes the file; raises LinkDown if it cannot be made, and ``link`` stays the caller's
        then.
        """
        self._recording = Recording(path, link.name)
        self._link = link
        for queue in range(link.queues):
            self._recording.record(link.port(queue))

    @property
    def name(self) -> str:
        """The link's own name."""
        return self._link.name

    @property
    def queues(self) -> int:
        """The link's own number of queues."""
        return self._link.queues

    @property
    def mtu(self) -> int:
        """The link's own MTU."""
        return self._link.mtu

    @property
    def mac(self) -> bytes | None:
        """The link's own station address."""
        return self._link.mac

    @property
    def capabilities(self) -> Capabilities:
        """The link's own capabilities."""
        return self._link.capabilities

    def start(self, changed: Callable[[], None]) -> None:
        """Starts the link."""
        self._link.start(changed)

    def carrier(self) -> bool:
        """Tells whether the link has a carrier."""
        return self._link.carrier()

    def port(self, queue: int) -> Port:
        """Returns the link's port; what passes there is recorded."""
        return self._link.port(queue)

    def use_queues(self, count: int) -> None:
        """Has the link use so many queues."""
        self._link.use_queues(count)

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Has the link use these offloads."""
        self._link.use_receive_offloads(wanted)

    def set_mtu(self, mtu: int) -> None:
        """Sets the link's MTU."""
        self._link.set_mtu(mtu)

    def stats(self) -> dict[str, int]:
        """Returns the link's counters, and the number of frames that could not be recorded."""
        return {**self._link.stats(), "not_recorded": self._recording.lost}

    def close(self) -> None:
        """Closes the link; then the file is complete."""
        self._link.close()
        self._recording.close()
